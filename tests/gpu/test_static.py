"""The library's own kernels on a GPU, under the engine: sums at indices, small products, one-pass Jacobians of linear maps."""

import itertools

import pytest
import torch
import wengert
from support.launches import kernels_of
from torch import nn
from torch.nn import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width, positions", [(11, 6, 40), (50_000, 64, 4096), (30, 1000, 100_000), (100, 1, 1000)])
def test_embedding_gradients(gpu, dtype, rows, width, positions):
    weight = torch.randn(rows, width, device=gpu, dtype=dtype, requires_grad=True)
    index = torch.randint(0, rows, (positions,), device=gpu)
    y = F.embedding(index, weight)
    ct = torch.randn_like(y)
    (ours,) = wengert.grad(y, weight, ct, retain_graph=True)
    expected = torch.zeros(rows, width, dtype=torch.float64, device=gpu).index_add_(0, index, ct.double())
    size = torch.zeros(rows, width, dtype=torch.float64, device=gpu).index_add_(0, index, ct.double().abs())
    assert ((ours.double() - expected).abs() <= TOLERANCE[dtype] * (1 + size)).all()
    assert torch.equal(ours, wengert.grad(y, weight, ct, retain_graph=True)[0])
    if width > 1:
        assert any("segment_sum" in name for name in kernels_of(lambda: wengert.grad(y, weight, ct, retain_graph=True)))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("sizes", [(4, 16, 8), (4, 16, 16, 3), (24, 32, 32, 24), (64, 128, 64)])
@pytest.mark.parametrize("batch", [1, 17, 1000])
def test_dense_nets(gpu, dtype, sizes, batch):
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*layers[:-1]).to(gpu, dtype).requires_grad_(False)
    x = torch.randn(batch, sizes[0], device=gpu, dtype=dtype)
    expected = torch.func.vmap(torch.func.jacrev(net.double()))(x.double())
    net.to(dtype)
    ours = wengert.batch_jacobian(net, x)
    torch.testing.assert_close(ours.double(), expected, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    assert torch.equal(ours, wengert.batch_jacobian(net, x))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("m, k, n", [(1, 3, 5), (4, 4, 4), (16, 31, 8), (32, 32, 32)])
@pytest.mark.parametrize("batch", [1, 100, 20_000])
def test_products_of_batches(gpu, dtype, m, k, n, batch):
    a = torch.randn(batch, m, k, device=gpu, dtype=dtype, requires_grad=True)
    b = torch.randn(batch, k, n, device=gpu, dtype=dtype, requires_grad=True)
    y = torch.bmm(a, b)
    ct = torch.randn_like(y)
    expected = (ct.double() @ b.double().mT, a.double().mT @ ct.double())
    for ours, wanted in zip(wengert.grad(y, (a, b), ct, retain_graph=True), expected):
        torch.testing.assert_close(ours.double(), wanted, rtol=10 * TOLERANCE[dtype], atol=32 * TOLERANCE[dtype])


LINEAR = {
    "scaled": lambda x: 3 * x,
    "reversed": lambda x: x.flip(0),
    "differences": lambda x: x[1:] - x[:-1],
    "padded": lambda x: F.pad(x, (2, 3)),
    "joined": lambda x: torch.cat([x, 2 * x]),
    "weighted": lambda x: x * torch.linspace(-1, 1, x.numel(), device=x.device, dtype=x.dtype),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 5, 1000, 4099])
@pytest.mark.parametrize("name", LINEAR)
def test_jacobians_of_linear_maps(gpu, name, count, dtype):
    x = torch.randn(count, device=gpu, dtype=dtype)
    if name == "differences" and count == 1:
        pytest.skip("there are none")
    expected = torch.autograd.functional.jacobian(LINEAR[name], x, vectorize=True)
    assert torch.equal(wengert.jacobian(LINEAR[name], x), expected)
