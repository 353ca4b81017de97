"""Plans are verified when they are made: what the verifier refuses, and programs whose nests leave little room."""

import pytest
import torch
import wengert
from support.check import DEVICE, check_against_torch
from torch.nn import functional as nnf
from wengert import _C


def vec(*shape: int) -> torch.Tensor:
    return torch.linspace(-0.9, 1.1, torch.Size(shape).numel(), dtype=torch.float64, device=DEVICE).reshape(shape)


def stencil(y):
    return torch.sin(y) * y.roll(1, -1)


def rk4(x, steps=2):
    def g(y):
        return torch.sin(y) - 0.5 * y.roll(1, -1) * y

    for _ in range(steps):
        a = g(x)
        b = g(x + 0.05 * a)
        c = g(x + 0.05 * b)
        d = g(x + 0.1 * c)
        x = x + 0.1 / 6 * (a + 2 * b + 2 * c + d)
    return x


def times(n, f):
    def repeated(x):
        for _ in range(n):
            x = f(x)
        return x

    return repeated


def outer(x):
    return (x[:, :3, None] * x[:, None, :2]).reshape(x.shape[0], -1)


# Shifted nests over arrays whose axes are moved by several loops at once: their union is wider than the array.
PROGRAMS = {
    "steps of RK4, then pairs": (lambda x: torch.tanh(rk4(x)).unsqueeze(2).expand(1, 3, 2).reshape(-1), (1, 3)),
    "stencils, then kron": (lambda x: torch.kron(times(4, stencil)(x), torch.ones(2, dtype=x.dtype, device=x.device)), (8,)),
    "stencils, then an outer product": (lambda x: torch.outer(times(3, stencil)(x), times(3, stencil)(x)).reshape(-1), (3,)),
    "outer products, then stencils": (lambda x: times(4, stencil)(outer(x)), (2, 4)),
    "rolled and flipped, then RK4": (
        lambda x: rk4(torch.cat([outer(x).roll(1, 1), outer(x).flip(1), outer(x)], 1), 1),
        (2, 5),
    ),
    "stencils, then repeat": (lambda x: times(4, stencil)(x).repeat(3), (5,)),
    "stencils over two axes": (lambda x: times(3, lambda y: y.roll(1, 0) * y.roll(-1, 1).sin())(x).reshape(-1), (3, 4)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_shifted_nests(name):
    fn, shape = PROGRAMS[name]
    wengert.reset_stats()
    check_against_torch(fn, vec(*shape), modes=("jacobian", "graph", "create_graph"))
    refused = [reason for reasons in wengert.stats().fallback.values() for reason in reasons]
    assert not any("slots" in reason for reason in refused), refused


FAULTY = {
    **PROGRAMS,
    "dense net": (lambda x: torch.tanh(x @ vec(4, 40) @ vec(40, 30)).square(), (9, 4)),
    "reads at an index": (lambda x: x.sin()[torch.tensor([3, 0, 3, 1], device=x.device)] * x, (4,)),
    "additions at an index": (lambda x: x.index_add(0, torch.tensor([1, 1, 0], device=x.device), x[:3].sin()), (4, 2)),
    "a called node": (lambda x: torch.linalg.cholesky(x @ x.mT + 2 * torch.eye(3, dtype=x.dtype, device=x.device)), (2, 3, 3)),
    "windows": (lambda x: nnf.conv1d(x.view(1, 1, -1), vec(1, 1, 3)).cumsum(-1), (8,)),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_coordinate_beyond_its_axis_is_refused(name):
    """Every coordinate of every step, one at a time, one place beyond either end; and steps that are left out."""
    fn, shape = FAULTY[name]
    x = vec(*shape).requires_grad_()
    tried, unseen = _C.plan_faults([fn(x)], [x])
    assert tried > 2
    assert not unseen


def test_a_constant_beside_a_mask_is_summed_with_it():
    """Large enough for a matrix product, which needs two matrices."""
    x = vec(8, 1024, 8).requires_grad_()
    found = []
    for grad in (wengert.grad, torch.autograd.grad):
        (g,) = grad(nnf.normalize(x, dim=0).sum(), x, create_graph=True)
        found += grad(g.sum(), x)
    torch.testing.assert_close(*found)
