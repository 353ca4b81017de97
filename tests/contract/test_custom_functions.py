"""Custom Functions: whose code runs, how often, in which backward pass, and what is said of it."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import wengert
from support.compare import Outcome, assert_same, assert_same_error
from torch.autograd import functional as F
from torch.utils.checkpoint import checkpoint

native_only = pytest.mark.skipif(bool(os.environ.get("WENGERT_DISABLE")), reason="is about the engine")


def function(backward, forward=lambda ctx, x: x * 2):
    """apply of a Function of one tensor with that backward(ctx, g)."""
    return type("Own", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}).apply


def vec(n=3, **options):
    return torch.linspace(0.5, 1.5, n, dtype=torch.float64, **options)


WRONG = {
    "shape": lambda ctx, g: g[:1],
    "number": lambda ctx, g: g.sum(),
    "complex": lambda ctx, g: torch.complex(g, g),
    "more gradients than inputs": lambda ctx, g: (g, g),
    "no tensor": lambda ctx, g: "gradient",
}


@pytest.mark.parametrize("backward", WRONG.values(), ids=WRONG)
def test_gradients_that_pytorch_refuses(backward):
    own = function(backward)
    x = vec(requires_grad=True)
    assert_same_error(lambda: wengert.grad(own(x * 2).sum(), x), lambda: torch.autograd.grad(own(x * 2).sum(), x))
    f = lambda x: own(x * 2) * x
    assert_same_error(lambda: wengert.jacobian(f, vec()), lambda: F.jacobian(f, vec()))
    assert_same_error(lambda: wengert.hessian(lambda x: f(x).sum(), vec()), lambda: F.hessian(lambda x: f(x).sum(), vec()))


ACCEPTED = {
    "another dtype": lambda ctx, g: g.float(),
    "an expanded one": lambda ctx, g: g.sum().expand(3),
    "integers": lambda ctx, g: (g * 4).long(),
    "a broadcast axis": lambda ctx, g: g.expand(2, 3),
    "conjugated": lambda ctx, g: torch.complex(g, g).conj().imag,
    "None after the last": lambda ctx, g: (g, None, None),
}


@pytest.mark.parametrize("backward", ACCEPTED.values(), ids=ACCEPTED)
def test_gradients_that_pytorch_mends(backward):
    own = function(backward)
    f = lambda x: own(x.sin()) * x
    assert_same(wengert.jacobian(f, vec()), F.jacobian(f, vec()))
    x = vec(requires_grad=True)
    assert_same(wengert.grad(f(x).sum(), x), torch.autograd.grad(f(x).sum(), x))


class Halves(torch.autograd.Function):
    """No gradient in the second argument; counts its backward."""

    calls = 0

    @staticmethod
    def forward(ctx, x, y):
        return x * y

    @staticmethod
    def backward(ctx, g):
        Halves.calls += 1
        return g * 2, None


GRAPHS = {
    "leaf": lambda x, y: Halves.apply(x, y),
    "below": lambda x, y: Halves.apply(x.sin(), (y * 2).exp()),
    "beside": lambda x, y: Halves.apply(x, y.sin()) + y.cos(),
    "twice": lambda x, y: Halves.apply(Halves.apply(x, y.sin()), x * y),
    "above an infinite derivative": lambda x, y: Halves.apply(x, (y - y).sqrt()) * 2,
}


@pytest.mark.parametrize("f", GRAPHS.values(), ids=GRAPHS)
def test_a_function_that_gives_none_runs_once(f):
    def outcome(grad, **options):
        x, y = vec(requires_grad=True), vec(requires_grad=True)
        out = f(x, y).sum()
        Halves.calls = 0
        found = grad(out, (x, y), allow_unused=True, **options)
        return found, Halves.calls

    for options in ({}, {"create_graph": True}, {"retain_graph": True}, {"materialize_grads": True}):
        (ours, our_calls), (theirs, their_calls) = outcome(wengert.grad, **options), outcome(torch.autograd.grad, **options)
        assert [g is None for g in ours] == [g is None for g in theirs]
        assert_same([g for g in ours if g is not None], [g for g in theirs if g is not None])
        assert our_calls == their_calls
    assert_same(wengert.jacobian(f, (vec(), vec())), F.jacobian(f, (vec(), vec())))
    Halves.calls = 0
    wengert.jacobian(f, (vec(), vec()))
    assert Halves.calls <= 2  # once a call in the graph, for all rows


@native_only
def test_the_graph_is_freed_where_a_function_gave_none():
    x, y = vec(requires_grad=True), vec(requires_grad=True)
    out = Halves.apply(x.exp(), y.exp()).sum()
    wengert.grad(out, (x, y), allow_unused=True)
    for leaf in (x, y):
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, leaf)


def test_functions_below_one_that_gives_none():
    """PyTorch calls them with zeros."""
    own = function(lambda ctx, g: g * 2)
    for f in (lambda x, y: Halves.apply(x, own(y)), lambda x, y: Halves.apply(x, own(y.sin()).cos())):
        x, y = vec(requires_grad=True), vec(requires_grad=True)
        ours, theirs = (grad(f(x, y).sum(), (x, y), allow_unused=True) for grad in (wengert.grad, torch.autograd.grad))
        assert_same(ours, theirs)


class Auxiliary(torch.autograd.Function):
    """Adds the gradient of a loss, whatever arrives."""

    @staticmethod
    def forward(ctx, x, loss):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g, torch.ones((), dtype=g.dtype)


class Two(torch.autograd.Function):
    """A backward that wants a tensor for each of two results that are used."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.sin(), x.exp()

    @staticmethod
    def backward(ctx, a, b):
        (x,) = ctx.saved_tensors
        return a * x.cos() + b * x.exp()


WITHOUT_VALUES = {  # what passes nothing on but zeros
    "slice": lambda kept, lost: torch.cat([kept, lost])[: len(kept)],
    "row": lambda kept, lost: torch.stack([kept, lost])[0],
    "nothing of it": lambda kept, lost: kept + lost[:0].sum(),
    "round": lambda kept, lost: kept + lost.round(),
    "sign": lambda kept, lost: kept * lost.sign(),
    "power": lambda kept, lost: kept + lost**0,
    "overwritten": lambda kept, lost: kept + lost.clone().zero_(),
}


@pytest.mark.parametrize("used", WITHOUT_VALUES.values(), ids=WITHOUT_VALUES)
@pytest.mark.parametrize("create_graph", [False, True])
def test_zeros_arrive_as_tensors(used, create_graph):
    def check(f):
        assert_same(wengert.jacobian(f, vec(), create_graph=create_graph), F.jacobian(f, vec(), create_graph=create_graph))
        total = lambda x: f(x).sum()
        assert_same(wengert.vjp(total, vec()), F.vjp(total, vec()))
        if Outcome.of(lambda: F.hessian(total, vec())).error is None:
            assert_same(wengert.hessian(total, vec()), F.hessian(total, vec()))
        else:  # the Function is called with one of the two
            assert_same_error(lambda: wengert.hessian(total, vec()), lambda: F.hessian(total, vec()))

    check(lambda x: used(x.cos(), Auxiliary.apply(x.sin(), x.square().sum())))
    check(lambda x: used(*Two.apply(x)))
    check(lambda x: used(*reversed(Two.apply(x))))


def test_errors_where_only_zeros_arrive():
    def backward(ctx, g):
        raise ValueError("no derivative")

    f = lambda x: torch.cat([function(backward)(x), x])[3:]
    assert_same_error(lambda: wengert.jacobian(f, vec()), lambda: F.jacobian(f, vec()))
    nothing = lambda x: function(lambda ctx, g: None)(x).round()
    assert_same_error(lambda: wengert.jacobian(nothing, vec(), strict=True), lambda: F.jacobian(nothing, vec(), strict=True))


def test_rows_without_a_gradient_are_zero():
    """By rows a Function may give None for some of them."""

    def backward(ctx, g):
        return None if float(g[0]) == 0 else g.sin()

    f = lambda x: function(backward)(x.exp())
    assert_same(wengert.jacobian(f, vec()), F.jacobian(f, vec()))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("call", ["jacobian", "vmap"])
def test_what_ends_a_program_is_not_swallowed(error, call):
    calls = []

    def backward(ctx, g):
        calls.append(1)
        raise error

    f = function(backward)
    with pytest.raises(error):
        if call == "jacobian":
            wengert.jacobian(f, vec())
        else:
            x = vec(requires_grad=True)
            wengert.grad(f(x), x, torch.eye(3, dtype=torch.float64), is_grads_batched=True)
    assert len(calls) == 1


INTERRUPTED = """
import sys, torch, wengert
from torch._functorch import pyfunctorch

class Double(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(lambda x: x * 2)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(lambda ctx, g: Double.apply(g))

pop, calls = pyfunctorch.pop_dynamic_layer_stack, []
def interrupted():
    layer = pop()
    calls.append(1)
    if len(calls) == 1:
        raise KeyboardInterrupt
    return layer

x = torch.rand(3, requires_grad=True)
y = Double.apply(x)
pyfunctorch.pop_dynamic_layer_stack = interrupted
try:
    wengert.grad(y, x, torch.eye(3), is_grads_batched=True)
except BaseException as error:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    print("interrupted", error is not None, len(calls))
"""


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_while_what_ends_a_program_is_handled_all_is_as_ever(error):
    """Final results are computed after an interrupt."""

    def by_rows(ctx, g):
        return torch.from_numpy(g.detach().cpu().numpy() * 2.0).to(g)

    x = torch.rand(4, 3, dtype=torch.float64)
    cases = [
        lambda m, n: m.jacobian(function(by_rows), vec()),
        lambda m, n: n.vmap(n.grad(lambda z: z.max()))(x),
        lambda m, n: n.vmap(n.jacrev(lambda z: z.median()))(x),
        lambda m, n: n.jacfwd(lambda z: (z * z.detach()).float())(x[0]),
    ]
    for case in cases:
        try:
            raise error
        except error:
            ours = case(wengert, wengert.func)
        assert_same(ours, case(F, torch.func))


def test_strict_hessians_that_are_constant_through_user_code():
    f = lambda x: function(lambda ctx, g: g * 2)(x).square().sum()
    for create_graph in (False, True):
        ours, theirs = (m.hessian(f, vec(), create_graph=create_graph, strict=True) for m in (wengert, F))
        assert_same(ours, theirs)
        assert ours.requires_grad == theirs.requires_grad


def test_exceptions_whose_contexts_go_in_circles():
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__context__, second.__context__ = second, first

    def fails(x):
        raise first

    with pytest.raises(RuntimeError, match="first"):
        wengert.func.jacfwd(fails)(vec())


def test_an_interrupt_within_pytorchs_transforms_is_not_swallowed():
    """PyTorch itself raises an error about its stack of transforms while the interrupt is on its way: in a process of its own."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "interrupted True 1\n"


def test_what_only_batching_breaks_is_done_by_rows():
    """A NumPy backward, a branch on a value, an own error type."""

    class Own(Exception):
        pass

    def branches(ctx, g):
        return g * 3 if g.sum() > 0 else g

    def through_numpy(ctx, g):
        return torch.from_numpy(g.cpu().numpy() * 3).to(g)

    def raises(ctx, g):
        if torch._C._functorch.is_batchedtensor(g):
            raise Own("batched")
        return g * 3

    for backward in (branches, through_numpy, raises):
        own = function(backward)
        f = lambda x, own=own: own(x.sin()) * x
        assert_same(wengert.jacobian(f, vec()), F.jacobian(f, vec()))


def test_errors_of_the_function_are_its_own():
    class Own(Exception):
        pass

    def backward(ctx, g):
        raise Own("mine")

    x = vec(requires_grad=True)
    for call in (lambda: wengert.jacobian(function(backward), vec()), lambda: wengert.grad(function(backward)(x).sum(), x)):
        with pytest.raises(Own, match="mine"):
            call()


FORMS = {
    "jacobian": lambda m, f, x: m.jacobian(f, x),
    "hessian": lambda m, f, x: m.hessian(lambda x: (f(x) ** 2).sum(), x),
    "hvp": lambda m, f, x: m.hvp(lambda x: (f(x) ** 2).sum(), x, torch.ones_like(x)),
    "create_graph": lambda m, f, x: m.jacobian(f, x, create_graph=True),
}
FUNCTIONS = {
    "local": lambda x: torch.nn.functional.layer_norm(x, (4,)).cumsum(0),
    "tabulated": lambda x: torch.special.i0(x) + x.clamp(0.6, 1.2) + x.renorm(2, 0, 1.0) if x.dim() > 1 else x.clamp(0.6, 1.2),
    "custom": function(lambda ctx, g: g.sin()),
    "mixed": lambda x: x.sort()[0].prod() * torch.nn.functional.huber_loss(x, x.flip(0).detach(), reduction="none"),
}


@pytest.mark.parametrize("place", ["backward", "tensor hook", "node hook"])
@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
def test_inside_another_backward_pass(f, place):
    """Which wants other nodes, does not keep its graph, and of which nothing may be asked."""
    x, seen = vec(4), {}

    def work():
        with torch.enable_grad():
            for name, form in FORMS.items():
                seen[name] = form(wengert, f, x), form(F, f, x)
            seen["jacrev"] = wengert.func.jacrev(f)(x), F.jacobian(f, x)

    def backward(ctx, g):
        work()
        return g * 2

    z = vec(4, requires_grad=True)
    out = function(backward)(z) if place == "backward" else (z * 2).exp()
    if place == "tensor hook":
        out.register_hook(lambda g: work())
    elif place == "node hook":
        out.grad_fn.register_hook(lambda inputs, outputs: work())
    torch.autograd.grad(out.sum(), z)
    assert len(seen) == len(FORMS) + 1
    for name, (ours, theirs) in seen.items():
        assert_same(ours, theirs, name)


@native_only
def test_inside_another_backward_pass_the_engine_runs():
    def backward(ctx, g):
        wengert.jacobian(lambda x: x.cumsum(0).sin(), vec())
        return g

    x = vec(requires_grad=True)
    wengert.reset_stats()
    torch.autograd.grad(function(backward)(x).sum(), x)
    assert wengert.stats().native == {"jacobian": 1} and not wengert.stats().fallback


def test_callbacks_at_the_end_of_the_pass():
    """A backward may ask for the pass it runs in: as data-parallel training does."""

    def outcome(grad):
        seen = []

        def backward(ctx, g):
            seen.append(torch._C._current_graph_task_id() != -1)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: seen.append("end"))
            return g

        x = vec(requires_grad=True)
        grad(function(backward)(x).sum(), x)
        return seen

    assert outcome(wengert.grad) == outcome(torch.autograd.grad) == [True, "end"]


def test_a_recursive_call_in_a_backward():
    def at_depth(depth):
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                inner = at_depth(depth - 1) if depth else torch.sin
                return g * wengert.jacobian(inner, x).diagonal()

        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        return function(backward, forward)

    x = vec()
    assert_same(wengert.jacobian(at_depth(5), x), torch.diag(x.cos()))


@pytest.mark.parametrize("form", ["grad", "vjp"])
def test_compiled_functions_whose_buffers_are_given_away(form):
    """Their backward asks whether the graph is kept: it must not be, where PyTorch's would not be."""
    import torch._dynamo as dynamo

    f = lambda x: (torch.tanh(x.sin() * x.cos()) @ x).sum()
    x = vec(4, requires_grad=True)
    try:
        compiled = torch.compile(f, backend="aot_eager")
        if form == "grad":
            assert_same(wengert.grad(compiled(x), x), torch.autograd.grad(f(x), x))
        else:
            assert_same(wengert.vjp(compiled, x.detach())[1], F.vjp(f, x.detach())[1])
        for options in ({"retain_graph": True}, {"create_graph": True}):
            outcomes = []
            for grad in (wengert.grad, torch.autograd.grad):
                with pytest.raises(RuntimeError) as error:
                    grad(compiled(x), x, **options)
                outcomes.append(str(error.value)[:80])
            assert outcomes[0] == outcomes[1]
    finally:
        dynamo.reset()


@native_only
def test_functions_that_save_through_hooks_are_pytorch_s():

    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    own = function(lambda ctx, g: g * ctx.saved_tensors[0].cos(), forward)
    f = lambda x: checkpoint(own, x, use_reentrant=False) * x
    wengert.reset_stats()
    assert_same(wengert.jacobian(f, vec()), F.jacobian(f, vec()))
    assert wengert.stats().fallback == {"jacobian": {"saved tensors with hooks": 1}}


BACKWARDS = {"an error besides": lambda ctx, g: 1 / 0, "no error besides": lambda ctx, g: g}


@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS)
def test_warnings_that_are_errors(backward):
    """They are raised, never thrown on the way out of another error."""

    def call(grad):
        x = vec(requires_grad=True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            y = torch.Tensor.put(function(backward)(x), torch.tensor([0]), torch.tensor([5.0], dtype=torch.float64), False)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                return grad(y.sum(), x)
        finally:
            torch.use_deterministic_algorithms(False)

    ours, theirs = Outcome.of(lambda: call(wengert.grad)), Outcome.of(lambda: call(torch.autograd.grad))
    assert ours.describe() == theirs.describe()


def test_indices_that_were_freed():
    x = vec(5, requires_grad=True)
    for index in (torch.tensor([0, 2, 2]), (x > 0.8)):
        y = x[index].sum()
        torch.autograd.grad(y, x)
        with pytest.raises(RuntimeError, match="second time"):
            wengert.grad(y, x)


FOLLOWED_BY = {
    "abs": torch.abs,
    "relu": torch.relu,
    "hinge": lambda y: (1 - y).clamp(min=0),
    "l1_loss": lambda y: torch.nn.functional.l1_loss(y, torch.zeros_like(y), reduction="none"),
    "another behind relu": lambda y: PENALTY(y.relu()).abs(),
}
PENALTY = function(lambda ctx, g: g + 0.1 * ctx.saved_tensors[0].sign(), lambda ctx, x: ctx.save_for_backward(x) or x.clone())


@pytest.mark.parametrize("after", FOLLOWED_BY.values(), ids=FOLLOWED_BY)
def test_zeros_arrive_from_derivatives_that_are_zero(after):
    """A backward that makes something of zeros: the second derivative is what it makes, as in PyTorch."""
    f = lambda x: (after(PENALTY(x)) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).sum()
    x = torch.tensor([0.7, -2.0, 3.0], dtype=torch.float64)
    for name, arguments in (("hessian", ()), ("vhp", (x,)), ("hvp", (x,))):
        assert_same(getattr(wengert, name)(f, x, *arguments), getattr(F, name)(f, x, *arguments))

    def second(grad):
        leaf = x.clone().requires_grad_()
        (gradient,) = grad(f(leaf), leaf, create_graph=True)
        return grad(gradient.square().sum(), leaf)

    for _ in range(2):
        assert_same(second(wengert.grad), second(torch.autograd.grad))


@pytest.mark.parametrize("form", ["grad", "batched", "jacobian", "vhp"])
def test_a_checkpoint_of_nodes_that_are_called_runs_as_often_as_in_pytorch(form):
    """Nobody reads what they saved, but a call would: the running statistics would move each time."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 3), torch.nn.BatchNorm1d(2), torch.nn.Conv1d(2, 2, 2)).double()
    x = torch.randn(3, 2, 6, dtype=torch.float64)

    def tracked(m, grad):
        net[1].reset_running_stats()
        f = lambda x: checkpoint(net, x, use_reentrant=False).sum(1)
        leaf = x.clone().requires_grad_()
        if form == "grad":
            grad(f(leaf).sum(), [leaf, *net.parameters()])
        elif form == "batched":
            y = f(leaf)
            grad(y, leaf, torch.ones(2, *y.shape, dtype=y.dtype), is_grads_batched=True)
        elif form == "jacobian":
            m.jacobian(f, x[:, :, :4], vectorize=True)
        else:
            m.vhp(lambda x: f(x).square().sum(), x, x)
        return net[1].num_batches_tracked.item()

    assert tracked(wengert, wengert.grad) == tracked(F, torch.autograd.grad)


def test_functions_of_tensors_without_elements():
    """Their backward runs, gives nothing or raises, as ever."""
    runs = []

    def gives_one(ctx, a):
        runs.append(a)
        return a * 2, None

    def raises(ctx, a):
        raise ValueError("mine")

    def make(backward):
        methods = {"forward": staticmethod(lambda ctx, x, y: x * 2), "backward": staticmethod(backward)}
        return type("Empty", (torch.autograd.Function,), methods).apply

    x, y = (torch.rand(0, 3, requires_grad=True) for _ in range(2))
    for grad in (torch.autograd.grad, wengert.grad):
        out = make(gives_one)(x, y)
        found = grad(out, (x, y), torch.ones_like(out), allow_unused=True)
        assert found[0].shape == x.shape and found[1] is None
        with pytest.raises(RuntimeError, match="appears to not have been used"):
            grad(make(gives_one)(x, y), (x, y), torch.ones(0, 3))
        with pytest.raises(ValueError, match="mine"):
            grad(make(raises)(x, y), x, torch.ones(0, 3))
        q = torch.rand(3, requires_grad=True)
        grad(make(gives_one)(q[:0], q[:0]).sum() + q.sum(), q)
    assert len(runs) == 6
