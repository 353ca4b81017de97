"""One-pass materialisation against sums of blocks in PyTorch: same bits, in any order of threads, and every byte written once."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from wengert import _C

NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
CHUNK = 16 * 1024  # bytes a thread block owns


@dataclass
class Block:
    start: int
    extents: list[int]
    steps: list[int]
    value: Tensor  # expanded to the extents, of any strides

    def targets(self) -> Tensor:
        out = torch.full((), self.start)
        for extent, step in zip(self.extents, self.steps):
            out = out.unsqueeze(-1) + step * torch.arange(extent)
        return out


def block(start, extents, steps, dtype=torch.float32, moves=None) -> Block:
    """A block of random values; with `moves`, those loops only have values of their own."""
    shape = [extent if moves is None or k in moves else 1 for k, extent in enumerate(extents)]
    return Block(start, list(extents), list(steps), torch.randn(shape).to(dtype).expand(extents))


def plan(out: Tensor, blocks) -> dict | None:
    given = [(b.start, b.extents, b.steps, b.value.data_ptr(), list(b.value.stride())) for b in blocks]
    return _C.cuda.plan_materialize(out.data_ptr(), NAMES[out.dtype], out.numel(), given)


def reference(count: int, dtype: torch.dtype, blocks) -> Tensor:
    """Blocks are added one after the other, each sum rounded to the dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.zeros(count, dtype=dtype)
    for b in blocks:
        targets = b.targets().reshape(-1)
        out[targets] = (out[targets].to(wide) + b.value.reshape(-1).to(wide)).to(dtype)
    return out


def new_output(count: int, dtype: torch.dtype, lead: int) -> tuple[Tensor, Tensor]:
    """Memory full of nans and, `lead` elements after a 16-byte border, the output in it."""
    size = dtype.itemsize
    memory = torch.full((count * size + 64,), 255, dtype=torch.uint8).view(dtype)
    begin = -memory.data_ptr() % 16 // size + lead
    return memory, memory[begin : begin + count]


def check(execute, count, blocks, dtype=torch.float32, lead=0, orders=(0, 1, 2)):
    expected = reference(count, dtype, blocks)
    for order in orders:
        memory, out = new_output(count, dtype, lead)
        launch = plan(out, blocks)
        execute("materialize", launch, [out, *(b.value for b in blocks)], order, seed=7)
        assert torch.equal(out, expected)
        assert memory.isnan().sum() == memory.numel() - count, "elements beside the output were written"
    read = sum(len(set(offsets(b.value))) for b in blocks)
    assert launch["bytes_written"] == count * dtype.itemsize
    assert launch["bytes_read"] == read * dtype.itemsize
    return launch


def offsets(value: Tensor) -> list[int]:
    out = torch.zeros((), dtype=torch.int64)
    for extent, stride in zip(value.shape, value.stride()):
        out = out.unsqueeze(-1) + stride * torch.arange(extent)
    return out.reshape(-1).tolist()


def shapes(dtype) -> dict[str, tuple[int, list[Block]]]:
    """Structures of Jacobians: (elements of the array, blocks)."""
    n, batch, rows, columns = 150, 13, 7, 11
    return {
        "nothing": (5000, []),
        "diagonal": (n * n, [block(0, [n], [n + 1], dtype)]),
        "constant diagonal": (n * n, [block(0, [n], [n + 1], dtype, moves=())]),
        "band": (n * n, [block(max(-d, 0) * n + max(d, 0), [n - abs(d)], [n + 1], dtype) for d in (-2, -1, 0, 1, 2)]),
        "batch diagonal": (
            (batch * rows) * (batch * columns),
            [block(0, [batch, rows, columns], [rows * batch * columns + columns, batch * columns, 1], dtype)],
        ),
        "dense": (rows * n, [block(0, [rows, n], [n, 1], dtype)]),
        "dense row and diagonal": (n * n, [block(3 * n, [n], [1], dtype), block(0, [n], [n + 1], dtype)]),
        "dense column": (n * n, [block(5, [n], [n], dtype)]),
        "same everywhere": (n * n, [block(0, [n, n], [n, 1], dtype, moves=()), block(0, [n], [n + 1], dtype)]),
        "six loops": (
            2 * 60 * 500,
            [block(17, [2, 3, 2, 5, 3, 4], [29000, 9000, 4000, 600, 100, 13], dtype, moves=(1, 2, 4, 5))],
        ),
        "overlapping": (900, [block(50 * k, [300 - 10 * k], [1], dtype) for k in range(7)] + [block(0, [300], [3], dtype)]),
        "one element": (1, [block(0, [], [], dtype)]),
        "one element of many": (20000, [block(12345, [1, 1], [0, 5], dtype)]),
        "strides": (
            60 * 60,
            [
                Block(0, [60, 4], [1, 900], torch.randn(4, 60).to(dtype).t()),
                Block(59, [20], [60], torch.randn(60).to(dtype)[::3]),
            ],
        ),
    }


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("name", shapes(torch.float32))
def test_structures(execute, name, dtype):
    count, blocks = shapes(dtype)[name]
    check(execute, count, blocks, dtype, orders=(2,) if dtype == torch.bfloat16 else (0, 1, 2))


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_misaligned_outputs_and_chunk_borders(execute, dtype):
    chunk = CHUNK // dtype.itemsize
    for lead in range(16 // dtype.itemsize):
        for count in (1, 2, 3, chunk - lead - 1, chunk - lead, chunk - lead + 1, 2 * chunk + 1):
            blocks = [block(0, [count], [1], dtype), block(count - 1, [1], [1], dtype)]
            if count > chunk // 2:
                blocks.append(block(count // 2, [9], [1], dtype))
            check(execute, count, blocks, dtype, lead, orders=(1,))


def test_chunk_borders_fall_within_any_loop(execute):
    """Blocks much smaller and much larger than a chunk, with borders at the first, an inner and the last iteration of a loop."""
    chunk = CHUNK // 4
    for start in (0, 1, chunk - 5, chunk - 4, chunk - 1, chunk):
        check(execute, 3 * chunk, [block(start, [3, 4, 5], [40, 9, 1]), block(start, [2, 3], [chunk, 2])], orders=(0,))
    check(execute, 3 * chunk, [block(2, [chunk // 2], [5])], orders=(0, 1))
    check(execute, 5 * chunk, [block(0, [5, chunk], [chunk, 1], moves=(1,))], orders=(0,))


@pytest.mark.parametrize("seed", range(40))
def test_random_nests(execute, seed):
    """Nests of random loops in random order and direction, over a few chunks; steps leave gaps or are as tight as they may be."""
    rng = random.Random(seed)
    count, blocks = 3 * CHUNK // 8 + rng.randrange(100), []
    for _ in range(rng.randint(1, 4)):
        loops, within = [], 0
        for _ in range(rng.randint(0, 6)):
            extent, step = rng.randint(1, 9), within + 1 + rng.choice([0, 0, rng.randrange(20)])
            if within + step * (extent - 1) < count:
                loops.append((extent, step))
                within += step * (extent - 1)
        rng.shuffle(loops)
        flips = [rng.random() < 0.3 for _ in loops]
        start = rng.randrange(count - within) + sum(step * (extent - 1) for (extent, step), flip in zip(loops, flips) if flip)
        steps = [-step if flip else step for (_, step), flip in zip(loops, flips)]
        moves = [k for k in range(len(loops)) if rng.random() < 0.8]
        blocks.append(block(start, [extent for extent, _ in loops], steps, torch.float64, moves))
    check(execute, count, blocks, torch.float64, rng.randrange(2), orders=(2,))


def test_values_are_stored_as_they_are(execute):
    """No rounding, no lost sign of zero and no lost payload where a single block writes."""
    special = torch.tensor([-0.0, float("inf"), float("-inf"), 1e-45, float("nan"), 3.4e38])
    _, out = new_output(12, torch.float32, 1)
    blocks = [Block(0, [6], [2], special)]
    execute("materialize", plan(out, blocks), [out, special])
    assert torch.equal(out[::2].view(torch.int32), special.view(torch.int32))
    assert not out[1::2].view(torch.int32).any()


def test_falling_and_unordered_loops(execute):
    forward = block(0, [4, 5], [10, 2])
    backward = Block(38, [5, 4], [-2, -10], forward.value.flip(0, 1).t().contiguous())
    assert torch.equal(reference(40, torch.float32, [forward]), reference(40, torch.float32, [backward]))
    check(execute, 40, [backward])


def test_zero_size(execute):
    check(execute, 0, [])
    check(execute, 0, [block(0, [0], [1])])
    check(execute, 10, [block(99, [3, 0], [1, 1]), block(2, [2], [3])])
    assert plan(torch.empty(0), [])["grid"] == (0, 1, 1)


def test_what_the_kernel_does_not_take():
    out = torch.empty(1000)
    assert plan(out, [block(0, [10, 10], [1, 1])]) is None, "antidiagonals visit elements again"
    assert plan(out, [block(0, [10, 3], [2, 1])]) is None, "loops interleave"
    assert plan(out, [block(0, [10, 3], [0, 1])]) is None, "a loop that moves nothing"
    assert plan(out, [block(k, [2], [100]) for k in range(9)]) is None, "nine blocks"
    assert plan(torch.empty(2000), [block(0, [2] * 7, [3**k for k in range(7)])]) is None, "seven loops"
    assert plan(out, [block(0, [2] * 6, [3**k for k in range(6)])]) is not None
    assert plan(out, [block(0, [2] * 8, [2**k for k in range(8)])]) is None, "eight loops whose values are not in order"
    contiguous = Block(0, [2] * 8, [2**k for k in range(7, -1, -1)], torch.randn(256).view([2] * 8))
    assert plan(out, [contiguous]) is not None, "eight loops that are one"
    for bad in (block(0, [11], [100]), block(-1, [2], [1]), block(5, [7], [-1])):
        with pytest.raises(ValueError, match="outside of the output"):
            plan(out, [bad])
    with pytest.raises(ValueError, match="differ in number"):
        _C.cuda.plan_materialize(0, "f32", 10, [(0, [2, 2], [1], 0, [1])])
    with pytest.raises(ValueError, match="floating dtypes only"):
        _C.cuda.plan_materialize(0, "i64", 10, [])
    with pytest.raises(ValueError, match="aligned to its dtype"):
        _C.cuda.plan_materialize(2, "f32", 10, [])


def test_wide_index():
    """Outputs, and values, that 32-bit offsets do not reach."""
    n = 50000
    diagonal = (0, [n], [n + 1], 4096, [1])
    huge = _C.cuda.plan_materialize(1 << 40, "f32", n * n, [diagonal])
    assert huge["entry"] == "materialize_f32_wide"
    assert huge["grid"] == (-(-n * n * 4 // CHUNK), 1, 1)
    assert (huge["bytes_written"], huge["bytes_read"]) == (4 * n * n, 4 * n)
    assert _C.cuda.plan_materialize(1 << 40, "f32", n * 40000, [(0, [n], [1], 4096, [1])])["entry"] == "materialize_f32"
    assert _C.cuda.plan_materialize(1 << 40, "f64", n, [(0, [n], [1], 4096, [50000])])["entry"] == "materialize_f64_wide"
    for launch in (huge, _C.cuda.plan_materialize(0, "bf16", 10, [])):
        assert len(launch["parameters"]) <= 4096


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_wide_kernels_compute_the_same(execute, dtype):
    count, blocks = shapes(dtype)["batch diagonal"]
    _, out = new_output(count, dtype, 1)
    wide = wide_launch(out, blocks)
    assert wide["entry"] == f"materialize_{NAMES[dtype]}_wide"
    execute("materialize", wide, [out, *(b.value for b in blocks)], order=2)
    assert torch.equal(out, reference(count, dtype, blocks))


def wide_launch(out: Tensor, blocks) -> dict:
    """The plan of an output that is too large, cut to the grid and the element count of one that is not."""
    given = [(b.start, b.extents, b.steps, b.value.data_ptr(), list(b.value.stride())) for b in blocks]
    huge = _C.cuda.plan_materialize(out.data_ptr(), NAMES[out.dtype], 1 << 32, given)
    small = _C.cuda.plan_materialize(out.data_ptr(), NAMES[out.dtype], out.numel(), given)
    parameters = bytearray(huge["parameters"])
    parameters[8:16] = out.numel().to_bytes(8, "little")  # MaterializeParameters<int64_t>::count
    return huge | {"grid": small["grid"], "parameters": bytes(parameters)}


def test_every_byte_is_written_once(ptx_of):
    """The minimum is the output once and every distinct value once; the kernel has one vector store for whole vectors, one scalar
    store for the output's two ends, and never reads the output: its only loads are of values."""
    out = torch.empty(10**6)
    blocks = [block(0, [1000], [1001]), block(500, [1000], [1000], moves=())]
    launch = plan(out, blocks)
    minimum = 4 * (10**6 + 1000 + 1)
    assert (launch["bytes_read"] + launch["bytes_written"]) / minimum == 1.0
    text = ptx_of("materialize")
    for entry in ("materialize_f32", "materialize_f64_wide"):
        body = text[text.index(f".entry {entry}(") :].split("\n}", 1)[0]
        vectors, scalars = (len(re.findall(rf"st\.global\.{kind}", body)) for kind in ("v4", "(?!v)"))
        per_thread = CHUNK // 16 // 256
        elements = 16 // (4 if "f32" in entry else 8)
        assert vectors == per_thread, "one 128-bit store per vector"
        assert scalars == per_thread * elements, "and the same elements one by one at the ends"
        assert len(re.findall(r"ld\.global", body)) == 4, "the values of an unrolled loop"
