"""Modules and their parameters: functional_call dictionaries, shared weights, per-sample gradients, curvature."""

import pytest
import torch
import wengert
from support.check import DEVICE
from support.compare import assert_same
from support.zoo import Source
from torch import nn
from torch.nn.utils import stateless  # noqa: F401 - importing it must not disturb functional_call


def network():
    return Source(torch.float64).module(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))).requires_grad_(True)


def samples(*shape):
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def test_functional_call_dictionary():
    net, x = network(), samples(5, 3)
    params = {k: v.detach() for k, v in net.named_parameters()}
    f = lambda p: wengert.func.functional_call(net, p, (x,))
    g = lambda p: torch.func.functional_call(net, p, (x,))
    assert_same(wengert.func.jacrev(f)(params), torch.func.jacrev(g)(params))
    loss = lambda p: f(p).square().mean()
    assert_same(wengert.func.grad(loss)(params), torch.func.grad(lambda p: g(p).square().mean())(params))
    ours = wengert.func.hessian(loss)(params)
    assert_same(ours, torch.func.hessian(lambda p: g(p).square().mean())(params))


def test_graph_form_in_parameters():
    net, x = network(), samples(5, 3)
    params = tuple(net.parameters())
    y = net(x)
    expected = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=True)]) for v in y.flatten()]
    )
    ours = wengert.jacobian(y, params)
    assert torch.allclose(torch.cat([j.reshape(y.numel(), -1) for j in ours], 1), expected)
    assert all(p.grad is None for p in params)


def test_shared_weights():
    lin = network()[2]
    square = nn.Linear(4, 4).to(torch.float64).to(DEVICE)
    net = nn.Sequential(square, nn.Tanh(), square, lin)
    x = samples(3, 4)
    params = tuple(net.parameters())
    y = net(x).square().sum()
    first = torch.autograd.grad(y, params, create_graph=True)
    ours = wengert.hessian(y, params)
    for g, row in zip(first, ours):
        for p, h in zip(params, row):
            rows = [torch.autograd.grad(v, p, retain_graph=True, allow_unused=True)[0] for v in g.flatten()]
            expected = torch.stack([torch.zeros_like(p) if r is None else r for r in rows]).reshape(h.shape)
            torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("mode", (True, False))
def test_train_and_eval(mode):
    net = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU(), nn.Linear(4, 1))
        .double()
        .to(DEVICE)
    )
    net.train(mode)
    x = samples(5, 3)
    assert_same(wengert.jacobian(net, x), torch.autograd.functional.jacobian(net, x))


def test_running_statistics_move_once_a_call():
    net = nn.BatchNorm1d(3).double().to(DEVICE)
    x = samples(4, 3)
    wengert.jacobian(net, x)
    assert int(net.num_batches_tracked) == 1


def test_per_sample_gradients_of_a_module():
    net, x, y = network(), samples(6, 3), samples(6, 2)
    params = {k: v.detach() for k, v in net.named_parameters()}

    def loss(call, p, x, y):
        return (call(net, p, (x[None],))[0] - y).square().sum()

    ours = wengert.func.vmap(wengert.func.grad(lambda *a: loss(wengert.func.functional_call, *a)), (None, 0, 0))(params, x, y)
    theirs = torch.func.vmap(torch.func.grad(lambda *a: loss(torch.func.functional_call, *a)), (None, 0, 0))(params, x, y)
    assert_same(ours, theirs)


def test_gauss_newton_from_jacobians():
    net, x = network(), samples(6, 3)
    params = tuple(net.parameters())
    y = net(x)
    j = torch.cat([p.reshape(y.numel(), -1) for p in wengert.jacobian(y, params)], 1)
    ggn = j.t() @ j
    v = samples(ggn.shape[0])
    pieces = torch.split(v, [p.numel() for p in params])
    names = list(dict(net.named_parameters()))
    f = lambda *ps: torch.func.functional_call(net, dict(zip(names, ps)), (x,))
    dv = tuple(a.view_as(p) for a, p in zip(pieces, params))
    plain = tuple(p.detach() for p in params)
    _, jv = wengert.jvp(f, plain, dv)
    _, back = wengert.vjp(f, plain, jv)
    torch.testing.assert_close(torch.cat([b.flatten() for b in back]), ggn @ v)


def test_convolutional_net_in_batches():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double().to(DEVICE).requires_grad_(False)
    x = samples(5, 1, 4, 4)
    expected = torch.func.vmap(torch.func.jacrev(lambda z: net(z[None])[0]))(x)
    assert_same(wengert.batch_jacobian(net, x), expected)
