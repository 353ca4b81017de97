"""The benchmark problems at small sizes, in every mode; and batch_jacobian and vmap on the batched ones."""

import pytest
import torch
import wengert
from problems import LIBRARY
from support.check import DEVICE, check_against_torch, weights_like
from support.compare import assert_same
from support.zoo import Source

SMALL = {name: p for name, p in LIBRARY.items() if p.small is not None}


def build(problem, dtype):
    r = Source(dtype)
    return problem.build(r, r.positive, problem.small)


@pytest.mark.parametrize(
    "mode", ("jacobian", "graph", "func", "forward", "hessian", "products", "create_graph", "strided", "float32")
)
@pytest.mark.parametrize("name", SMALL)
def test_every_mode(name, mode):
    fn, x = build(SMALL[name], torch.float64)
    check_against_torch(fn, x, modes=(mode,), single=build(SMALL[name], torch.float32))


BATCHED = [name for name, p in SMALL.items() if p.kind == "batchjac"]


@pytest.mark.parametrize("name", BATCHED)
def test_batch_jacobian(name):
    fn, x = build(SMALL[name], torch.float64)
    expected = torch.func.vmap(torch.func.jacrev(fn))(x)
    assert_same(wengert.batch_jacobian(fn, x), expected, "batch_jacobian")
    for transform in ("jacrev", "jacfwd"):
        ours = wengert.func.vmap(getattr(wengert.func, transform)(fn))(x)
        assert_same(ours, expected, f"vmap({transform})")
    ours = wengert.func.vmap(wengert.func.jacrev(fn), chunk_size=2)(x)
    assert_same(ours, expected, "vmap(jacrev), chunks")


@pytest.mark.parametrize("name", BATCHED)
def test_vmap_of_hessian(name):
    fn, x = build(SMALL[name], torch.float64)

    def scalar(s):
        y = fn(s)
        return (y * weights_like(y)).sum()

    assert_same(
        wengert.func.vmap(wengert.func.hessian(scalar))(x), torch.func.vmap(torch.func.hessian(scalar))(x), "vmap(hessian)"
    )


def test_per_sample_gradients():
    r = Source(torch.float64)
    params = {"w1": r(3, 5), "b1": r(5), "w2": r(5, 1)}

    def loss(p, x, y):
        return (((x @ p["w1"] + p["b1"]).tanh() @ p["w2"]) - y).square().sum()

    x, y = r(6, 3), r(6, 1)
    ours = wengert.func.vmap(wengert.func.grad(loss), (None, 0, 0))(params, x, y)
    theirs = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    assert_same(ours, theirs, "vmap(grad)")


def test_coupled_samples_are_refused():
    x = torch.randn(4, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"couple|sample"):
        wengert.batch_jacobian(lambda z: z - z.mean(0), x)
