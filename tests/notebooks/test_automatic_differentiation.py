"""A textbook chapter: backward on scalars and vectors, detaching, control flow, running backward twice, plots of derivatives."""

import pytest
import torch
import wengert
from support.check import DEVICE
from support.compare import assert_same, assert_same_call
from torch.autograd import functional as torch_functional


def leaf():
    return torch.arange(4.0, device=DEVICE).requires_grad_()


def test_two_x_dot_x():
    x = leaf()
    y = 2 * torch.dot(x, x)
    assert_same(wengert.grad(y, x, retain_graph=True), (4 * x.detach(),))
    assert_same(wengert.hessian(y, x), 4 * torch.eye(4, device=DEVICE))
    assert x.grad is None
    y.backward()
    assert_same(x.grad, 4 * x.detach())


def test_backward_accumulates_and_ours_does_not_touch_it():
    x = leaf()
    x.sum().backward()
    wengert.grad((x * x).sum(), x)
    wengert.jacobian(x * x, x)
    assert_same(x.grad, torch.ones(4, device=DEVICE))


def test_vector_output():
    x = leaf()
    assert_same_call(lambda: wengert.grad(x * x, x), lambda: torch.autograd.grad(x * x, x), "implicit gradient of a vector")
    assert_same(wengert.grad(x * x, x, grad_outputs=torch.ones_like(x)), (2 * x.detach(),))
    assert_same(wengert.grad(sum(x * x), x), (2 * x.detach(),))
    assert_same(wengert.jacobian(x * x, x), torch.diag(2 * x.detach()))


def test_detached_factor():
    x = leaf()
    y = x * x
    u = y.detach()
    assert_same(wengert.grad((u * x).sum(), x), (u,))
    assert_same(wengert.grad(y.sum(), x), (2 * x.detach(),))
    assert_same(wengert.jacobian(u * x, x), torch.diag(u))


def maze(a):
    b = a * 2
    while b.norm().item() < 1000:
        b = b * 2
    return b if b.sum().item() > 0 else 100 * b


@pytest.mark.parametrize("shape", ((), (1,), (2, 3)))
def test_control_flow(shape):
    a = torch.randn(shape, device=DEVICE).requires_grad_()
    d = maze(a)
    k = (d / a).detach()
    assert_same(wengert.grad(d.sum(), a, retain_graph=True), (k,))
    expected = torch.diag(k.flatten()).reshape(shape + shape)
    assert_same(wengert.jacobian(d, a), expected)
    assert_same(wengert.jacobian(maze, a.detach()), torch_functional.jacobian(maze, a.detach()))


def test_control_flow_with_in_place_division():
    def f(a):
        d = a / 10 if a.item() > 100 else a * 1
        while d.item() > 1:
            d /= 10
        return d

    a = torch.tensor(200.0, device=DEVICE).requires_grad_()
    assert_same(wengert.jacobian(f(a), a), torch.autograd.grad(f(a), a)[0])


def test_backward_twice():
    x = leaf()
    y = (x * x).sum()
    y.backward(retain_graph=True)
    assert_same(wengert.grad(y, x, retain_graph=True), (2 * x.detach(),))
    assert_same(wengert.grad(y, x), (2 * x.detach(),))
    assert_same_call(lambda: wengert.grad(y, x), lambda: torch.autograd.grad(y, x), "freed graph")


def test_the_derivative_of_sine_for_a_plot():
    x = torch.linspace(-5, 5, steps=200, requires_grad=True, device=DEVICE)
    (ours,) = wengert.grad(torch.sin(x).sum(), x)
    torch.testing.assert_close(ours, torch.cos(x).detach())
    rows = wengert.jacobian(torch.sin, x.detach())
    torch.testing.assert_close(rows.diagonal(), torch.cos(x).detach())
    assert int((rows != 0).sum()) == int((rows.diagonal() != 0).sum())
