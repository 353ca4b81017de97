"""A linear model's notebook: the per-row Jacobian of a*x + b by backward, grad and jacobian; the same with nn.Linear."""

import torch
import wengert
from support.check import DEVICE
from support.compare import assert_same, assert_same_call
from torch.autograd import functional as torch_functional

ROWS = 1000


def linear(x, a, b):
    return a * x + b


def parameters():
    return tuple(torch.randn(1, device=DEVICE).requires_grad_() for _ in range(2))


def check_gradient_vect(x, grad_y):
    return bool((grad_y[:, 0] == x.squeeze()).all() and (grad_y[:, 1] == torch.ones(x.shape[0], device=DEVICE)).all())


def test_one_row():
    x = torch.randn(1, device=DEVICE)
    a, b = parameters()
    assert_same(wengert.grad(linear(x, a, b), (a, b)), (x, torch.ones(1, device=DEVICE)))


def test_gradient_of_many_rows_is_refused():
    x = torch.randn(ROWS, 1, device=DEVICE)
    a, b = parameters()
    y = linear(x, a, b)
    assert_same_call(lambda: wengert.grad(y, a), lambda: torch.autograd.grad(y, a), "many rows")
    row = torch.eye(ROWS, device=DEVICE)[3].reshape(ROWS, 1)
    assert_same(wengert.grad(y, (a, b), row), (x[3], torch.ones(1, device=DEVICE)))


def test_row_loop_with_backward_is_left_alone():
    x = torch.randn(5, 1, device=DEVICE)
    a, b = parameters()
    y = linear(x, a, b)
    expected = torch.hstack([j.reshape(5, 1) for j in wengert.jacobian(y, (a, b))])
    rows = torch.empty(5, 2, device=DEVICE)
    for i in range(5):
        y.backward(torch.eye(5, device=DEVICE)[i].reshape(5, 1), retain_graph=True)
        rows[i, 0], rows[i, 1] = a.grad, b.grad
        a.grad.zero_()
        b.grad.zero_()
    assert_same(rows, expected)


def test_functional_form_in_everything():
    a, b = parameters()
    x = torch.randn(ROWS, 1, device=DEVICE)
    jac_x, jac_a, jac_b = wengert.jacobian(linear, (x, a, b))
    assert jac_x.shape == (ROWS, 1, ROWS, 1) and jac_a.shape == jac_b.shape == (ROWS, 1, 1)
    assert check_gradient_vect(x, torch.hstack((jac_a.squeeze(dim=2), jac_b.squeeze(dim=2))))
    assert_same(jac_x.reshape(ROWS, ROWS), a.detach() * torch.eye(ROWS, device=DEVICE))


def test_functional_form_in_the_parameters():
    a, b = parameters()
    x = torch.randn(ROWS, 1, device=DEVICE)
    f = lambda a, b: linear(x, a, b)
    jac_a, jac_b = wengert.jacobian(f, (a, b))
    assert check_gradient_vect(x, torch.hstack((jac_a.squeeze(dim=2), jac_b.squeeze(dim=2))))
    assert_same((jac_a, jac_b), torch_functional.jacobian(f, (a, b), vectorize=True))


def test_functional_form_on_one_row():
    a, b = parameters()
    x = torch.randn(1, device=DEVICE)
    assert_same(wengert.jacobian(linear, (x, a, b)), torch_functional.jacobian(linear, (x, a, b)))


def test_graph_form():
    a, b = parameters()
    x = torch.randn(ROWS, 1, device=DEVICE)
    jac_a, jac_b = wengert.jacobian(linear(x, a, b), (a, b))
    assert check_gradient_vect(x, torch.hstack((jac_a.squeeze(dim=2), jac_b.squeeze(dim=2))))


def test_second_derivatives_of_a_field():
    """The cell of partial derivatives of u(x, t), with a function that exists."""
    x = torch.randn(100, device=DEVICE).requires_grad_()
    t = torch.randn(2, device=DEVICE).requires_grad_()
    u = torch.sin(x) * t.sum() + x**3 * t.prod()
    (dt,) = wengert.grad(u.sum(), t, retain_graph=True)
    (dx,) = wengert.grad(u.sum(), x, create_graph=True)
    (ddx,) = wengert.grad(dx.sum(), x)
    assert dt.shape == (2,)
    torch.testing.assert_close(ddx, (-torch.sin(x) * t.sum() + 6 * x * t.prod()).detach(), rtol=1e-5, atol=1e-5)


def test_module_without_and_with_batch():
    model = torch.nn.Linear(1, 1).to(DEVICE)
    a, b = model.weight, model.bias
    x = torch.randn(10, 1, device=DEVICE)

    def partial_model(a, b):
        return torch.func.functional_call(model, {"weight": a, "bias": b}, (x,))

    jac_a, jac_b = wengert.jacobian(partial_model, (a, b))
    assert jac_a.shape == (10, 1, 1, 1) and jac_b.shape == (10, 1, 1)
    assert bool((jac_a[:, 0, 0, 0] == x[:, 0]).all()) and bool((jac_b == 1).all())
    assert_same(wengert.jacobian(model(x), (a, b)), (jac_a, jac_b))
    assert_same(wengert.jacobian(linear, (x, a, b)), torch_functional.jacobian(linear, (x, a, b)))


def test_module_whose_parameters_are_swapped_in_place():
    """The notebook assigns to model._parameters inside the function; plain tensors then stand where Parameters were."""
    model = torch.nn.Linear(1, 1).to(DEVICE)
    a, b = model.weight, model.bias
    x = torch.randn(10, 1, device=DEVICE)

    def partial_model(a, b):
        model._parameters["weight"] = a
        model._parameters["bias"] = b
        return model(x)

    ours = wengert.jacobian(partial_model, (a, b))
    assert_same(ours, torch_functional.jacobian(partial_model, (a, b)))
