"""Results do not depend on where tensors lie: fresh threads have fresh scratch memory, padded heaps move all else."""

import threading

import pytest
import torch
from support.check import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter's scratch memory")

# One nest for each way a chunk runs: packed short rows or long rows; summed inside, outside or both; stored beside it.
NESTS = {
    "packed, summed inside": ((1, 6, 7, 24), (6, 1, 7, 1), "out t0 f64 sum=2\n", (2,)),
    "packed, summed along rows": ((30, 20), (30, 1), "out t0 f64 sum=1\n", (1,)),
    "packed, summed along columns": ((30, 20), (1, 20), "out t0 f64 sum=0\n", (0,)),
    "long rows, summed": ((3, 700), (3, 1), "out t0 f64 sum=1\n", (1,)),
    "long rows, summed outside": ((5, 512), (1, 512), "out t0 f64 sum=0\n", (0,)),
    "summed over everything": ((6, 80), (6, 1), "out t0 f64 sum=0,1\n", (0, 1)),
}


@pytest.mark.parametrize("name", NESTS)
def test_sums_wherever_memory_lies(name):
    first, second, output, axes = NESTS[name]
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in (first, second))
    text = f"fused v1 rank={a.dim()} operands=2 compute=f64\nt0 = mul a0 a1\n{output}"
    want, wrong = (a * b).sum(axes, keepdim=True), []
    size = want.numel()

    def attempt(pad):
        front = torch.empty(8 * pad + 8, dtype=torch.float64)
        before, held = [torch.empty(size, dtype=torch.float64) for _ in range(16)], []
        torch.ops.wengert.fused([a, b], text)
        while before:
            before.pop()
            held.append(torch.ops.wengert.fused([a, b], text)[0])
            if float((held[-1] - want).abs().max()) > 1e-9:
                wrong.append((pad, len(before), front.data_ptr()))

    for pad in range(192):
        thread = threading.Thread(target=attempt, args=(pad,))
        thread.start()
        thread.join()
    assert not wrong, f"{len(wrong)} of 3072 calls are wrong"
