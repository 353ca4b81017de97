"""One launch of every static kernel and of each kind of generated nest, small enough for compute-sanitizer to watch."""

import pytest
import torch
import wengert
from support.long_programs import agree_relatively, product_of_sines, values
from torch.nn import functional as F
from wengert import reference

fused = torch.ops.wengert.fused
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_materialize(gpu, dtype):
    x = torch.randn(131, device=gpu, dtype=dtype, requires_grad=True)
    weights = torch.randn(131, device=gpu, dtype=dtype)
    jacobian = wengert.jacobian(x * weights, x)
    assert torch.equal(jacobian, torch.diag(weights))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows, width", [(11, 6), (5, 70), (300, 1)])
def test_segment_sum(gpu, dtype, rows, width):
    weight = torch.randn(rows, width, device=gpu, dtype=dtype, requires_grad=True)
    index = torch.arange(257, device=gpu) % (rows - 1)  # the last row stays empty
    y = F.embedding(index, weight)
    ct = torch.randn_like(y)
    (ours,) = wengert.grad(y, weight, ct)
    wanted = torch.zeros(rows, width, dtype=torch.float64, device=gpu).index_put_((index,), ct.double(), accumulate=True)
    bound = torch.zeros_like(wanted).index_put_((index,), ct.double().abs(), accumulate=True)
    assert ((ours.double() - wanted).abs() <= TOLERANCE[dtype] * (1 + bound)).all()


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("m, k, n", [(1, 3, 5), (4, 4, 4), (9, 13, 8), (32, 31, 32)])
def test_small_matmul(gpu, dtype, m, k, n):
    a = torch.randn(23, m, k, device=gpu, dtype=dtype, requires_grad=True)
    b = torch.randn(23, k, n, device=gpu, dtype=dtype, requires_grad=True)
    y = torch.bmm(a, b)
    ct = torch.randn_like(y)
    ours = wengert.grad(y, (a, b), ct)
    wanted = (ct.double() @ b.double().mT, a.double().mT @ ct.double())
    for one, other in zip(ours, wanted):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=32 * TOLERANCE[dtype])


def test_scaled_small_matmul(gpu):
    a, b = torch.randn(8, 8, device=gpu), torch.randn(5, 8, device=gpu)
    x = torch.randn(40, 8, device=gpu)

    def function(x):
        return (x @ a).tanh() @ b.T

    torch.testing.assert_close(wengert.batch_jacobian(function, x), torch.func.vmap(torch.func.jacrev(function))(x))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sums", ["", " sum=0", " sum=1", " sum=0,1"])
@pytest.mark.parametrize("size", [(33, 65), (1, 5003), (5003, 1), (3, 70_001)], ids=str)
def test_nests(gpu, dtype, sums, size):
    """Maps, sums of rows and of columns, within a block and in pieces, contiguous and transposed."""
    name = NAMES[dtype]
    compute = "f64" if dtype == torch.float64 else "f32"
    text = f"fused v1 rank=2 operands=2 compute={compute}\nt0 = mul a0 a1\nt1 = tanh t0\nout t1 {name}{sums}\nout t0 {name}\n"
    x, y = torch.randn(size, device="cpu").to(dtype), torch.randn(size, device="cpu").to(dtype)
    wanted = reference.evaluate([x.double(), y.double()], text.replace(name, "f64").replace(compute, "f64"))
    for layout in (lambda t: t.to(gpu), lambda t: t.t().contiguous().to(gpu).t()):
        for ours, other in zip(fused([layout(x), layout(y)], text), wanted, strict=True):
            scale = max(1.0, other.abs().max().item()) * (x.numel() ** 0.5 if other.numel() < x.numel() else 1)
            assert (ours.cpu().double() - other.double()).abs().max() <= 4 * TOLERANCE[dtype] * scale


def test_operands_beyond_a_kernels_parameters(gpu):
    with torch.device("cpu"):
        text, operands = product_of_sines(2900), values(2900, (40,))
        (twin,) = reference.evaluate(operands, text)
    agree_relatively(fused([x.to(gpu) for x in operands], text)[0].cpu(), twin)
