"""A beginner's notebook: scalars, chained and higher derivatives, vector calculus, pointwise derivatives, components."""

import math

import torch
import wengert
from support.check import DEVICE
from support.compare import assert_same, assert_same_call
from torch.autograd import functional as torch_functional


def scalar(value):
    return torch.tensor(value, device=DEVICE, requires_grad=True)


def test_without_requires_grad():
    y = 4.0 * torch.tensor(4.0, device=DEVICE) ** 2
    x = torch.tensor(4.0, device=DEVICE)
    assert_same_call(lambda: wengert.grad(y, x), lambda: torch.autograd.grad(y, x), "nothing requires grad")


def test_scalar_derivatives_and_accumulation():
    x = scalar(4.0)
    first, second = 4 * x**2, 3 * x**3
    assert_same(wengert.grad(first, x, retain_graph=True), (torch.tensor(32.0, device=DEVICE),))
    assert_same(wengert.grad(second, x, retain_graph=True), (torch.tensor(144.0, device=DEVICE),))
    first.backward()
    second.backward()
    assert_same(x.grad, torch.tensor(176.0, device=DEVICE))


def test_partial_derivatives():
    x, z = scalar(4.0), scalar(3.0)
    y = 4 * x**2 + z**3
    assert_same(
        wengert.grad(y, (x, z), retain_graph=True), (torch.tensor(32.0, device=DEVICE), torch.tensor(27.0, device=DEVICE))
    )
    f = lambda x, z: 4 * x**2 + z**3
    assert_same(wengert.hessian(y, (x, z)), torch_functional.hessian(f, (x.detach(), z.detach())))


def test_retained_gradient_of_a_middle_tensor():
    """torch's grad fills the .grad of a tensor that retains it; ours leaves the same fields behind."""

    def run(grad):
        x = scalar(3.0)
        z = 2 * x**2
        z.retain_grad()
        y = z**2
        found = grad(y, (x, z), retain_graph=True)
        y.backward()
        return found, x.grad, z.grad

    ours = run(wengert.grad)
    assert [float(g) for g in ours[0]] == [432.0, 36.0]
    assert_same(ours, run(torch.autograd.grad))


def test_higher_derivatives():
    x = scalar(4.0)
    y = 4 * x**3
    (first,) = wengert.grad(y, x, create_graph=True)
    (second,) = wengert.grad(first, x, create_graph=True)
    assert x.grad is None
    (third,) = wengert.grad(second, x)
    assert [float(v) for v in (first, second, third)] == [192.0, 96.0, 24.0]
    assert not third.requires_grad
    assert_same_call(lambda: wengert.grad(third, x), lambda: torch.autograd.grad(third, x), "no graph of the third")


def test_vector_jacobian_product():
    x = torch.tensor([[2.0], [3.0]], requires_grad=True, device=DEVICE)
    a = torch.tensor([[1.0, 2.0], [-1.0, 3.0]], device=DEVICE)
    f = lambda x: torch.matmul(a, x) + x**2
    y = f(x)
    product = torch.tensor([[4.0], [11.0]], device=DEVICE)
    assert_same(wengert.grad(y, x, grad_outputs=torch.ones_like(x), retain_graph=True), (product,))
    jac = wengert.jacobian(y, x)
    assert_same(jac.reshape(2, 2), torch.tensor([[5.0, 2.0], [-1.0, 9.0]], device=DEVICE))
    assert_same(wengert.vjp(f, x, torch.ones_like(x))[1], product)


def test_pointwise_derivatives():
    x = torch.linspace(0, 2 * math.pi, 5, requires_grad=True, device=DEVICE)
    y = torch.sin(x)
    assert_same_call(lambda: wengert.grad(y, x), lambda: torch.autograd.grad(y, x), "implicit gradient")
    (ours,) = wengert.grad(y, x, grad_outputs=torch.ones_like(y), create_graph=True)
    torch.testing.assert_close(ours.detach(), torch.cos(x).detach())
    (second,) = wengert.grad(ours, x, grad_outputs=torch.ones_like(y))
    torch.testing.assert_close(second, -torch.sin(x).detach())
    ours.detach().cpu().numpy()


def test_no_grad_block():
    x = scalar(10.0)
    y = 4 * x**2
    with torch.no_grad():
        z = 4 * x**2
        assert not z.requires_grad
        assert_same(wengert.grad(y, x), (torch.tensor(80.0, device=DEVICE),))
    assert_same_call(lambda: wengert.grad(z, x), lambda: torch.autograd.grad(z, x), "made under no_grad")


def test_components_of_an_input():
    xy = torch.linspace(0, 2, 20, requires_grad=True, device=DEVICE).reshape(2, -1).T
    value = xy[:, 0] ** 2 + xy[:, 1] ** 3
    (by_sum,) = wengert.grad(torch.sum(value), xy, retain_graph=True)
    (by_ones,) = wengert.grad(value, xy, grad_outputs=torch.ones_like(value), create_graph=True)
    torch.testing.assert_close(by_sum, by_ones.detach())
    expected = torch.stack([2 * xy[:, 0], 3 * xy[:, 1] ** 2], 1).detach()
    torch.testing.assert_close(by_sum, expected)
    rows = wengert.jacobian(value, xy)
    torch.testing.assert_close(rows.diagonal(dim1=0, dim2=1).T, expected)
