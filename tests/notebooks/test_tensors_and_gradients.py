"""A physicist's notebook: gradients and full Hessians of computed tensors, row loops, vmapped rows, batches of outputs."""

# ruff: noqa: B023 - every function made in a loop is called within the same iteration

import pytest
import torch
import wengert
from support.check import DEVICE
from support.compare import assert_same, assert_same_call
from torch.autograd import functional as torch_functional

DATA = -1.4519


def hessian_setting():
    dep_vars = torch.tensor([6.0, -2.0], requires_grad=True, device=DEVICE)
    value = (dep_vars[0] ** DATA) + dep_vars[1].square()
    (jac,) = torch.autograd.grad(value, dep_vars, retain_graph=True, create_graph=True)
    return dep_vars, value, jac


def row_loop(jac, x):
    return torch.stack([torch.autograd.grad(j, x, retain_graph=True, create_graph=True)[0] for j in jac.unbind(0)])


def test_gradient_of_a_product():
    dep_var = torch.tensor([6.0], requires_grad=True, device=DEVICE)
    data = torch.randn(1, device=DEVICE)
    assert_same(wengert.grad(outputs=data * dep_var, inputs=dep_var), (data,))


def test_functional_forms_on_two_inputs():
    f = lambda data, dep_var: data * dep_var
    inputs = (torch.tensor([0.1603], device=DEVICE), torch.tensor([6.0], requires_grad=True, device=DEVICE))
    assert_same(wengert.jacobian(f, inputs), torch_functional.jacobian(f, inputs))
    assert_same(wengert.hessian(f, inputs), torch_functional.hessian(f, inputs))


def test_two_variables_and_the_diagonal_of_the_second_derivative():
    a = torch.tensor([6.0], requires_grad=True, device=DEVICE)
    b = torch.tensor([-2.0], requires_grad=True, device=DEVICE)
    value = (a**DATA) + b.square()
    ours = wengert.grad(value, (a, b), retain_graph=0, create_graph=True)
    assert all(g.grad_fn is not None for g in ours)
    value = (a**DATA) + b.square()
    theirs = torch.autograd.grad(value, (a, b), create_graph=True)
    assert_same(ours, theirs)
    second = wengert.grad(ours, (a, b), retain_graph=True, create_graph=True)
    assert_same(second, torch.autograd.grad(theirs, (a, b), retain_graph=True, create_graph=True))


def test_gradient_of_a_vector_is_refused():
    dep_vars, _, jac = hessian_setting()
    for ours, theirs in ((wengert.grad, torch.autograd.grad),):
        assert_same_call(
            lambda: ours(jac, dep_vars, retain_graph=True), lambda: theirs(jac, dep_vars, retain_graph=True), "vector"
        )


def test_hessian_from_the_ready_gradient():
    dep_vars, value, jac = hessian_setting()
    expected = row_loop(jac, dep_vars)
    assert_same(wengert.jacobian(jac, dep_vars), expected.detach())
    assert_same(wengert.hessian(value, dep_vars), expected.detach())
    kept = wengert.jacobian(jac, dep_vars, create_graph=True)
    assert kept.requires_grad
    assert_same(kept, expected)


def test_hessian_rows_by_our_grad():
    dep_vars, _, jac = hessian_setting()
    ours = torch.stack([wengert.grad(j, dep_vars, retain_graph=True, create_graph=True)[0] for j in jac.unbind(0)])
    assert_same(ours, row_loop(jac, dep_vars))
    eye = torch.eye(len(jac), device=DEVICE)
    by_switch = torch.stack([wengert.grad(jac, dep_vars, grad_outputs=i, retain_graph=True, create_graph=True)[0] for i in eye])
    assert_same(by_switch, ours)
    batched = wengert.grad(jac, dep_vars, grad_outputs=eye, retain_graph=True, create_graph=True, is_grads_batched=True)[0]
    assert_same(batched, ours)


def test_rows_under_the_legacy_vmap():
    from torch._vmap_internals import _vmap

    dep_vars, _, jac = hessian_setting()
    row = lambda i: wengert.grad(jac, dep_vars, grad_outputs=i, retain_graph=True, create_graph=True)[0]
    assert_same(_vmap(row)(torch.eye(2, device=DEVICE)), row_loop(jac, dep_vars))


def test_jacobian_of_a_batch_of_values():
    dep_vars = torch.tensor([6.0, -2.0], requires_grad=True, device=DEVICE)
    data = torch.rand(10, 2, device=DEVICE)
    f = lambda v: (v[0] ** data) + v[1].square()
    values = f(dep_vars)
    ours = wengert.jacobian(values, dep_vars)
    assert ours.shape == values.shape + dep_vars.shape == (10, 2, 2)
    assert_same(ours, torch_functional.jacobian(f, dep_vars.detach()))
    assert_same(wengert.jacobian(f, dep_vars), torch_functional.jacobian(f, dep_vars))
    assert_same_call(lambda: wengert.grad(values, dep_vars), lambda: torch.autograd.grad(values, dep_vars), "non-scalar output")


def test_the_notebooks_own_jacobian_function_under_patched():
    from torch._vmap_internals import _vmap

    def jacobian(y, x, create_graph=False, allow_unused=True):
        if len(y) == 0:
            return None
        flat_y = y.reshape(-1)

        def get_vjp(v):
            rows = torch.autograd.grad(flat_y, x, v, retain_graph=True, create_graph=create_graph, allow_unused=allow_unused)
            return rows[0].reshape(x.shape)

        return _vmap(get_vjp)(torch.eye(len(flat_y), device=y.device)).reshape(y.shape + x.shape)

    dep_vars = torch.tensor([6.0, -2.0], requires_grad=True, device=DEVICE)
    values = (dep_vars[0] ** torch.rand(10, 2, device=DEVICE)) + dep_vars[1].square()
    expected = jacobian(values, dep_vars)
    with wengert.patched():
        assert_same(jacobian(values, dep_vars), expected)


def test_no_grad_and_inference_contexts():
    x = torch.tensor([6.0, -2.0], requires_grad=True, device=DEVICE)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = x[0] ** 2 + x[1].square()
        assert not y.requires_grad
        assert_same_call(lambda: wengert.grad(y, x), lambda: torch.autograd.grad(y, x), context.__name__)


def test_modifying_a_leaf():
    a = torch.tensor([3.0], device=DEVICE).requires_grad_()
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        a[0] = 1.0
    f = lambda: (a * a).sum()
    with torch.no_grad():
        a[0] = 1.0
    assert_same(wengert.hessian(f(), a), torch.tensor([[2.0]], device=DEVICE))
    a.data[0] = 7.0
    assert_same(wengert.grad(f(), a), (torch.tensor([14.0], device=DEVICE),))
