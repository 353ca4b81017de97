"""Which derivatives with a history are left to PyTorch, whose own way there is shorter; in a process that compares the ways."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
from support.check import DEVICE

pytestmark = [
    pytest.mark.skipif(bool(os.environ.get("WENGERT_DISABLE")), reason="is about the engine"),
    pytest.mark.skipif(DEVICE.type == "cuda", reason="ways are compared on the CPU"),
]

PREFACE = """
import pytest, torch, wengert
from support.compare import assert_same_call
from torch.nn import functional as F

SHORTER = "PyTorch's way to a result with a history is shorter"

def counts():
    found = wengert.stats()
    wengert.reset_stats()
    return sum(found.native.values()), {reason: n for reasons in found.fallback.values() for reason, n in reasons.items()}

def same(a, b):
    torch.testing.assert_close(a, b)
    assert [t.requires_grad for t in a] == [t.requires_grad for t in b]

torch.manual_seed(0)
sizes = [(3, 8), (8, 8), (8, 1)]
net = torch.nn.Sequential(*(m for size in sizes for m in (torch.nn.Linear(*size), torch.nn.Softplus()))).double()
weights = list(net.parameters())
x = torch.randn(5, 3, dtype=torch.float64)

def energy(positions):
    r2 = (positions[1:] - positions[:-1]).square().sum(-1) + 0.5
    return (r2 ** -6 - r2 ** -3 + r2.sqrt().sin() * r2.log()).sum()
"""

CASES = {
    "where PyTorch's way is shorter and it cannot, the samples go one by one": """
        recurrent = torch.nn.LSTM(3, 3, 2, proj_size=1).double().requires_grad_(False)
        f = lambda x, h, c: sum((out * (k + 1)).sin().sum() for k, out in enumerate(recurrent(x, (h, c))[1]))
        for steps in (2, 3, 8):
            x, h, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((steps, 1, 3), (2, 2, 1, 1), (2, 2, 1, 3)))
            expected = torch.stack([torch.autograd.functional.hessian(lambda x: f(x, h[k], c[k]), x) for k in range(2)])
            for _ in range(2):
                torch.testing.assert_close(wengert.func.vmap(wengert.func.hessian(f), (None, 0, 0))(x, h, c), expected)
    """,
    "a network's gradient is PyTorch's, what follows is the engine's": """
        for _ in range(2):
            gradient = wengert.grad(net(x).square().sum(), weights, create_graph=True)
            same(gradient, torch.autograd.grad(net(x).square().sum(), weights, create_graph=True))
            assert counts() == (0, {SHORTER: 1})
            again = wengert.grad(sum(g.square().sum() for g in gradient), weights, allow_unused=True)
            assert counts() == (1, {})
    """,
    "every option where it is known": """
        y = net(x)
        number, unused = y.square().sum(), torch.ones(2, dtype=torch.float64, requires_grad=True)
        wengert.grad(y, weights, y.detach(), create_graph=True), wengert.grad(number, weights, create_graph=True)
        for outputs, inputs, options in [
            (y, weights, {}),  # not a number
            (number, weights, {}),
            (number, tuple(weights), {"retain_graph": True}),
            (number, weights[0], {}),
            ([number, y], weights, {"grad_outputs": [None, y.detach()]}),
            (y, weights, {"grad_outputs": y.detach()}),
            (y, weights, {"grad_outputs": (y.detach().float(),)}),
            (y, weights, {"grad_outputs": [y.detach()[:2]]}),
            (number, weights, {"grad_outputs": torch.tensor(2.0, dtype=torch.float64, requires_grad=True)}),
            (number, [*weights, unused], {}),
            (number, [*weights, unused], {"allow_unused": True}),
            (number, [*weights, unused], {"allow_unused": False}),
            (number, [*weights, unused], {"materialize_grads": True}),
            (number, {"a": weights[0]}, {}),
            (number, [], {}),
            ([], weights, {}),
            (weights[0], weights[0], {"grad_outputs": weights[0].detach()}),
            (weights[-1].sum(), weights[-1], {"allow_unused": True}),
            (number, [weights[0].detach()], {}),
            (number.detach(), weights, {}),
        ]:
            for _ in range(3):  # as long as its structure is new, and then
                assert_same_call(
                    lambda: wengert.grad(outputs, inputs, create_graph=True, **options),
                    lambda: torch.autograd.grad(outputs, inputs, create_graph=True, **options),
                    str(options),
                )
        for odd in (None, "a", 2):
            assert_same_call(
                lambda: wengert.grad(number, weights, retain_graph=True, create_graph=odd),
                lambda: torch.autograd.grad(number, weights, retain_graph=True, create_graph=odd),
                str(odd),
            )
        with pytest.warns(FutureWarning):
            wengert.grad(number, weights, create_graph=True, only_inputs=False)
        wengert.grad(number, weights, create_graph=True, retain_graph=False)
        with pytest.raises(RuntimeError, match="second time"):
            wengert.grad(number, weights, create_graph=True)
        assert counts()[1][SHORTER] > 8
    """,
    "an energy's gradient is the engine's": """
        p = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            same(wengert.grad(energy(p), p, create_graph=True), torch.autograd.grad(energy(p), p, create_graph=True))
            assert counts() == (1, {})
    """,
    "results of the engine's are not overlooked": """
        p = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            wengert.grad(net(x).square().sum(), weights, create_graph=True)
            assert counts() == (0, {SHORTER: 1})  # at a glance
        (force,) = wengert.grad(energy(p), p, create_graph=True)
        counts()
        wengert.grad(net(x).square().sum(), weights, create_graph=True)
        assert counts() == (0, {SHORTER: 1})  # by a walk: some result is alive
        wengert.grad(net(force[:5]).square().sum(), weights, create_graph=True)
        assert counts() == (1, {})  # it is in the graph
    """,
    "products with a Hessian": """
        v = [torch.randn_like(w) for w in weights]
        f = lambda *w: torch.func.functional_call(net, dict(zip(dict(net.named_parameters()), w)), (x,)).square().sum()
        at = tuple(w.detach() for w in weights)
        for name in ("hvp", "vhp"):
            for _ in range(2):
                ours, theirs = (getattr(m, name)(f, at, tuple(v)) for m in (wengert, torch.autograd.functional))
                torch.testing.assert_close(ours, theirs)
                assert counts() == (1, {SHORTER: 1})  # the gradient, then its derivative
    """,
    "batches are the engine's": """
        y = net(x)
        cotangents = torch.randn(7, *y.shape, dtype=y.dtype)
        for _ in range(2):
            wengert.grad(y, weights, cotangents, create_graph=True, is_grads_batched=True)
            assert counts() == (1, {})
            jacobian = wengert.batch_jacobian(net, x.clone().requires_grad_(), create_graph=True)
            assert counts() == (1, {})
    """,
    "a graph is freed where it is to be": """
        for _ in range(2):
            loss = net(x).square().sum()
            wengert.grad(loss, weights, create_graph=True, retain_graph=False)
            try:
                torch.autograd.grad(loss, weights)
                raise AssertionError("the graph was kept")
            except RuntimeError as error:
                assert "second time" in str(error)
    """,
    "what is behind the inputs or leads to none of them does not count": """
        def loss(before, beside):
            here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
            for _ in range(before):
                here = here * 1.0
            for _ in range(beside):
                there = there * 1.0
            return (net(here) * there[:, :1].sin()).square().sum(), here
        y, here = loss(50, 3)
        wengert.grad(y, [here, *weights], create_graph=True)
        assert counts() == (0, {SHORTER: 1})
        for before, beside in ((51, 50), (90, 7)):
            y, here = loss(before, beside)
            ours, theirs = (grad(y, [here, *weights], create_graph=True) for grad in (wengert.grad, torch.autograd.grad))
            same(ours, theirs)
            assert counts() == (0, {SHORTER: 1})
    """,
    "results of the engine's are differentiated by it, whose results lead where PyTorch's do": """
        def second(jacobian, grad):
            leaves = [torch.linspace(-1, k, 9, dtype=torch.float64).view(3, 3).requires_grad_() for k in (1, 2, 3)]
            a, w, u = leaves
            j = jacobian(lambda a: (a.relu() @ w).abs() @ u, a, create_graph=True)
            return grad((j * j).sum(), leaves, create_graph=True)
        index = torch.tensor([1, 0, 1])
        f = lambda a: (a[index].cumsum(0) ** 2).sum()
        a, v = torch.arange(9.0, dtype=torch.float64).view(3, 3), torch.ones(3, 3, dtype=torch.float64)
        for _ in range(2):
            same(second(wengert.jacobian, wengert.grad), second(torch.autograd.functional.jacobian, torch.autograd.grad))
            for name in ("hvp", "vhp"):
                call = lambda m: getattr(m, name)(f, a, v, create_graph=True, strict=True)
                same(call(wengert), call(torch.autograd.functional))
    """,
    "a Hessian of few elements and many steps": """
        def f(x):
            for _ in range(12):
                k = (x.roll(1) - 2 * x + x.roll(-1)).sin()
                x = x + 0.1 * (k + 0.05 * k.roll(1, 0).tanh() * x)
            return x.square().sum()
        x = torch.randn(1, 2, dtype=torch.float64)
        plain = wengert.hessian(f, x)
        assert counts() == (1, {})
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            ours, theirs = (m.hessian(f, leaf, create_graph=True) for m in (wengert, torch.autograd.functional))
            same([ours], [theirs])
            same(torch.autograd.grad(ours.sin().sum(), leaf), torch.autograd.grad(theirs.sin().sum(), leaf))
            assert counts() == (0, {SHORTER: 1})
    """,
}


@pytest.mark.parametrize("name", CASES)
def test_the_shorter_way(name):
    script = PREFACE + textwrap.dedent(CASES[name])
    path = os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "WENGERT_COMPARE_WAYS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
