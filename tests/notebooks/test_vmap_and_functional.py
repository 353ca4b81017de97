"""A seminar's notebook: vmap of everything, gradients of norms, Jacobians and Hessians by vmapped rows, named tensors."""

import pytest
import torch
import wengert
from support.check import BEFORE_2_13, DEVICE
from support.compare import assert_same, assert_same_call
from torch._vmap_internals import _vmap as legacy_vmap
from torch.autograd import functional as torch_functional


def test_vmap_of_plain_functions():
    fun = lambda x: x + 3
    ten = torch.ones(3, 3, device=DEVICE)
    assert_same(wengert.func.vmap(fun)(ten), fun(ten))
    assert_same(wengert.func.vmap(wengert.func.vmap(fun))(ten), fun(ten))
    x, y = torch.randn(3, 3, device=DEVICE), torch.randn(3, 3, device=DEVICE)
    assert_same(wengert.func.vmap(torch.mul)(x, y), x * y)
    assert_same(wengert.func.vmap(lambda x, y, z: x + y + z)(x, y, ten), x + y + ten)


def test_vmap_of_contractions():
    x, y = torch.randn(3, 2, 5, device=DEVICE), torch.randn(3, 2, 5, device=DEVICE)
    vvd = wengert.func.vmap(wengert.func.vmap(torch.dot))
    assert_same(vvd(x, y), torch.vmap(torch.vmap(torch.dot))(x, y))


def test_pointwise_function_of_the_timing_cell():
    fun = lambda x: x**2 / x * x**x
    x = torch.rand(50, device=DEVICE) + 0.5
    assert_same(wengert.func.vmap(fun)(x), torch.vmap(fun)(x))
    x = x.double()
    assert_same(wengert.jacobian(fun, x), torch_functional.jacobian(fun, x))
    each = wengert.func.vmap(wengert.func.grad(fun))(x)
    assert_same(each, wengert.jacobian(fun, x).diagonal())


def test_gradients_of_a_distance():
    x = torch.randn(2, requires_grad=True, device=DEVICE)
    t = torch.tensor([2.0, 3.0], requires_grad=True, device=DEVICE)
    y = torch.randn(2, requires_grad=True, device=DEVICE)
    f = sum((x * t - y) ** 2) ** 0.5
    expected = torch.autograd.grad(f, [x, t], retain_graph=True)
    assert_same(wengert.grad(f, inputs=[x, t]), expected)
    assert_same_call(lambda: wengert.grad(f, [x, t]), lambda: torch.autograd.grad(f, [x, t]), "second backward")


def seminar_jacobian(fun, x):
    x = x.detach().requires_grad_()
    y = fun(x)
    vs = torch.eye(y.numel(), device=x.device).view(y.numel(), *y.shape)
    return legacy_vmap(lambda v: torch.autograd.grad(y, x, v)[0])(vs).detach()


def seminar_hessian(fun, x):
    def first_grad(x):
        y = fun(x)
        return torch.autograd.grad(y, x, create_graph=True)[0]

    return seminar_jacobian(first_grad, x)


def test_jacobian_of_a_cube():
    f, x = (lambda x: x**3), torch.ones(3, device=DEVICE)
    assert_same(wengert.jacobian(f, x), seminar_jacobian(f, x))
    with wengert.patched():
        assert_same(seminar_jacobian(f, x), 3 * torch.eye(3, device=DEVICE))


def test_hessian_of_a_cube():
    g, x = (lambda x: (x**3).sum()), torch.ones(3, device=DEVICE)
    assert_same(wengert.hessian(g, x), seminar_hessian(g, x))
    with wengert.patched():
        assert_same(seminar_hessian(g, x), 6 * torch.eye(3, device=DEVICE))


def test_rows_as_lists():
    x = torch.randn(3, requires_grad=True, device=DEVICE)
    y = torch.randn(3, device=DEVICE)
    expected = torch.diag(y)
    rows = [wengert.grad([x * y], [x], grad_outputs=[v])[0] for v in torch.eye(3, device=DEVICE)]
    assert_same(torch.stack(rows), expected)
    batched = wengert.grad([x * y], [x], grad_outputs=[torch.eye(3, device=DEVICE)], is_grads_batched=True)
    assert_same(batched[0], expected)


def test_forward_and_reverse_agree():
    f, x = (lambda x: x.cumsum(0).sin() * x), torch.randn(5, dtype=torch.float64, device=DEVICE)
    reverse = wengert.func.jacrev(f)(x)
    torch.testing.assert_close(wengert.func.jacfwd(f)(x), reverse)
    torch.testing.assert_close(torch.stack([wengert.jvp(f, x, v)[1] for v in torch.eye(5).to(x)], 1), reverse)


def test_hessian_transposed_is_the_jacobian_of_the_gradient():
    q, x = (lambda x: (x.sin() * x.roll(1)).sum() + x.prod()), torch.randn(4, dtype=torch.float64, device=DEVICE)
    gradient = lambda z: torch.autograd.grad(q(z), z, create_graph=True)[0]
    torch.testing.assert_close(wengert.hessian(q, x).t(), wengert.jacobian(gradient, x))


def test_multilayer_perceptron_by_vmap():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 2), torch.nn.Sigmoid()).to(DEVICE)
    params = {k: v.detach() for k, v in net.named_parameters()}
    x = torch.rand(4, 3, device=DEVICE)
    one = lambda sample: wengert.func.functional_call(net, params, (sample,))
    torch.testing.assert_close(wengert.func.vmap(one)(x), net(x).detach())
    theirs = torch.func.vmap(torch.func.jacrev(lambda s: torch.func.functional_call(net, params, (s,))))(x)
    torch.testing.assert_close(wengert.func.vmap(wengert.func.jacrev(one))(x), theirs)


def test_depthwise_convolution():
    x, k = (
        torch.randn(2, 3, 5, 5, dtype=torch.float64, device=DEVICE),
        torch.randn(3, 1, 3, 3, dtype=torch.float64, device=DEVICE),
    )
    f = lambda k: torch.nn.functional.conv2d(x[:1], k, groups=3).tanh()
    assert_same(wengert.jacobian(f, k), torch_functional.jacobian(f, k))


@pytest.mark.skipif(BEFORE_2_13, reason="there are named tensors before 2.13")
def test_names_are_gone_from_torch():
    """This torch has no named tensors: what wengert meets is torch's own error."""
    with pytest.raises((TypeError, RuntimeError)) as ours:
        wengert.jacobian(lambda x: x * torch.ones(3, names=("X",)), torch.ones(3))
    with pytest.raises((TypeError, RuntimeError)) as theirs:
        torch_functional.jacobian(lambda x: x * torch.ones(3, names=("X",)), torch.ones(3))
    assert type(ours.value) is type(theirs.value) and str(ours.value) == str(theirs.value)


class Var:
    """The notebook's scalar reverse mode, as an oracle that owes torch nothing."""

    def __init__(self, value, grad_fn=list):
        self.v, self.grad_fn = value, grad_fn

    def __add__(self, other):
        return Var(self.v + other.v, lambda: [(self, 1.0), (other, 1.0)])

    def __mul__(self, other):
        return Var(self.v * other.v, lambda: [(self, other.v), (other, self.v)])

    def grad(self, seed=1.0):
        total = {self: seed}
        for source, value in self.grad_fn():
            for key, g in source.grad(value * seed).items():
                total[key] = total.get(key, 0) + g
        return total


def test_scalar_reverse_mode_by_hand():
    x, y = Var(1.5), Var(-0.5)
    f = x * x * x * y * x + y * y * y
    by_hand = f.grad()
    a = torch.tensor(1.5, requires_grad=True, dtype=torch.float64, device=DEVICE)
    b = torch.tensor(-0.5, requires_grad=True, dtype=torch.float64, device=DEVICE)
    ours = wengert.grad(a * a * a * b * a + b * b * b, (a, b))
    assert [float(g) for g in ours] == pytest.approx([by_hand[x], by_hand[y]])
