"""Nesting, dtypes, forms and ambient state of the functions that mirror torch.autograd and torch.autograd.functional."""

# ruff: noqa: B023 - the closures run inside their loop
import inspect
import itertools

import pytest
import torch
import wengert
from support.check import BEFORE_2_13
from support.compare import Outcome, assert_same, assert_same_call, same_error
from torch.autograd import forward_ad
from torch.autograd import functional as F
from torch.autograd.graph import get_gradient_edge


def vec(n=3, dtype=torch.float64, requires_grad=False):
    return torch.linspace(0.5, 1.5, n, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(getattr(wengert, name), getattr(F, name)) for name in ("jacobian", "hessian", "vjp", "jvp", "vhp", "hvp")]
    + [(wengert.grad, torch.autograd.grad)]
    + [
        (getattr(wengert.func, name), getattr(torch.func, name))
        for name in ("grad", "grad_and_value", "jacrev", "jacfwd", "hessian", "vmap", "vjp", "jvp", "functional_call")
    ],
)
def test_signatures(ours, theirs):
    """Same names, order and defaults; ours may have more behind them, by keyword only."""
    mine, torchs = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert list(mine)[: len(torchs)] == list(torchs)
    assert [p.default for p in mine.values()][: len(torchs)] == [p.default for p in torchs.values()]
    assert [p.kind for p in mine.values()][: len(torchs)] == [p.kind for p in torchs.values()]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(mine.values())[len(torchs) :])


FUNCTIONS = {
    "one to one": (lambda x: x.sin(), 1),
    "one to one-tuple": (lambda x: (x.sin(),), 1),
    "one to two": (lambda x: (x.sin(), x.prod()), 1),
    "two to one": (lambda x, y: x.sum() * y, 2),
    "two to two": (lambda x, y: (x.sum() * y, y[:, None] * x), 2),
    "unused": (lambda x, y: x**2, 2),
    "constant output": (lambda x: (x.sin(), torch.ones(2, dtype=torch.float64)), 1),
    "identity": (lambda x: x, 1),
    "same input twice": (lambda x: torch.stack([x, x]), 1),
}


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("options", [{}, {"vectorize": True}, {"create_graph": True}])
@pytest.mark.parametrize(("f", "count"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_nesting_of_jacobians(f, count, options, as_tuple):
    if count == 2 and not as_tuple:
        return
    xs = (vec(), vec(2))[:count] if as_tuple else vec()
    assert_same_call(lambda: wengert.jacobian(f, xs, **options), lambda: F.jacobian(f, xs, **options), "jacobian")


@pytest.mark.parametrize("options", [{}, {"vectorize": True}, {"create_graph": True}])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_nesting_of_hessians(options, shape):
    one = lambda x: x.sin().sum().reshape(shape)
    two = lambda x, y: (x.sum() * y.prod()).reshape(shape)
    for f, xs in ((one, vec()), (one, (vec(),)), (two, (vec(), vec(2))), (lambda x, y: x.prod(), (vec(), vec(2)))):
        assert_same_call(lambda: wengert.hessian(f, xs, **options), lambda: F.hessian(f, xs, **options), "hessian")


def test_graph_form_nests_like_the_function_form():
    for count, outputs_tuple, inputs_tuple in itertools.product((1, 2), (False, True), (False, True)):
        xs = (vec(requires_grad=True), vec(2, requires_grad=True))
        f = (lambda x, y: (x.sum() * y, y[:, None] * x)) if outputs_tuple else (lambda x, y: x.sum() * y)
        if not inputs_tuple or count == 1:
            g, xs = (lambda x, f=f: f(x, vec(2))), xs[:1]
        else:
            g = f
        given = xs if inputs_tuple else xs[0]
        assert_same(wengert.jacobian(g(*xs), given), F.jacobian(g, given))
    x = vec(requires_grad=True)
    assert_same(wengert.jacobian([x * 2, x.sum()], [x]), F.jacobian(lambda x: (x * 2, x.sum()), (x,)))


def test_graph_form_between_intermediate_tensors():
    x = vec(requires_grad=True)
    h = x.sin()
    y = h * h.sum()
    assert_same(wengert.jacobian(y, h), F.jacobian(lambda h: h * h.sum(), h.detach()))
    assert_same(wengert.jacobian(y, (x, h))[1], F.jacobian(lambda h: h * h.sum(), h.detach()))
    assert_same(wengert.hessian(y.sum(), h), F.hessian(lambda h: (h * h.sum()).sum(), h.detach()))
    assert_same(wengert.jacobian(x, x), torch.eye(3, dtype=torch.float64))


def test_graph_form_under_no_grad():
    x = vec(requires_grad=True)
    y = x.exp()
    total = y.sum()
    with torch.no_grad():
        plain, live = wengert.jacobian(y, x), wengert.jacobian(y, x, create_graph=True)
        second = wengert.hessian(total, x)
        assert not torch.is_grad_enabled()
    assert not plain.requires_grad and live.requires_grad
    assert_same(second, torch.diag(x.exp()).detach())


@pytest.mark.parametrize("into", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_follow_the_input(into):
    for start in (torch.float32, torch.float64):
        f = lambda x: (x * 2).to(into)
        assert_same_call(lambda: wengert.jacobian(f, vec(dtype=start)), lambda: F.jacobian(f, vec(dtype=start)), "jacobian")
        xs = (vec(dtype=start), vec(dtype=torch.float64))
        g = lambda x, y: (x.sum() * y.sum()).to(into)
        assert [t.dtype for t in wengert.jacobian(g, xs)] == [t.dtype for t in F.jacobian(g, xs)]


def test_complex_inputs_of_real_functions():
    z = torch.complex(vec(), vec() * 2)
    f = lambda z: (z * z.conj()).real
    assert_same(wengert.jacobian(f, z), F.jacobian(f, z))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 1)])
def test_small_and_empty_inputs(shape):
    x = torch.ones(shape, dtype=torch.float64)
    for f in (lambda x: x.sin(), lambda x: x.sum()):
        assert_same_call(lambda: wengert.jacobian(f, x), lambda: F.jacobian(f, x), "jacobian")
        assert_same_call(lambda: wengert.jacobian(f, x, vectorize=True), lambda: F.jacobian(f, x, vectorize=True), "vectorised")
    assert_same_call(lambda: wengert.hessian(torch.sum, x), lambda: F.hessian(torch.sum, x), "hessian")


def test_the_function_runs_once():
    for call in (wengert.jacobian, wengert.hessian, wengert.func.jacrev, wengert.func.grad):
        runs = []

        def f(x, runs=runs):
            runs.append(1)
            return (x * torch.rand_like(x)).sum()

        call(f, vec()) if call in (wengert.jacobian, wengert.hessian) else call(f)(vec())
        assert len(runs) == 1, call


def test_captured_parameters_stay_reachable():
    w = vec(requires_grad=True)
    f = lambda x: (w * x**2).sin()
    ours, theirs = (m(f, vec(), create_graph=True) for m in (wengert.jacobian, F.jacobian))
    assert_same(torch.autograd.grad(ours.sum(), w), torch.autograd.grad(theirs.sum(), w))
    assert not wengert.jacobian(f, vec()).requires_grad


def test_captured_inputs_are_constants():
    x = vec(requires_grad=True)
    f = lambda z: z * x
    for create_graph in (False, True):
        assert_same(wengert.jacobian(f, x, create_graph), F.jacobian(f, x, create_graph))


def test_results_hold_no_graph_unless_asked():
    x = vec(requires_grad=True)
    value, product = wengert.vjp(lambda x: x.sin(), x, vec())
    assert not value.requires_grad and not product.requires_grad
    assert not wengert.hessian(lambda x: x.sin().sum(), x).requires_grad
    assert wengert.hessian(lambda x: x.sin().sum(), x, create_graph=True).requires_grad
    assert x.grad is None


@pytest.mark.skipif(BEFORE_2_13, reason="torch.autograd.grad takes no dicts before 2.13")
def test_grad_forms():
    x, y = vec(requires_grad=True), vec(2, requires_grad=True)
    out = x.sin().sum() * y
    ones = torch.ones(2, dtype=torch.float64)
    calls = [
        lambda g: g(out, x, ones, retain_graph=True),
        lambda g: g(out, [x, y], ones, retain_graph=True),
        lambda g: g([out, out.sum()], (x, y), [ones, None], retain_graph=True),
        lambda g: g(out, {"a": x, "b": y}, ones, retain_graph=True),
        lambda g: g(out.sum(), [x, vec(requires_grad=True)], retain_graph=True, allow_unused=True),
        lambda g: g(out.sum(), [x, vec(requires_grad=True)], retain_graph=True, materialize_grads=True),
        lambda g: g(out, (x, y), torch.eye(2, dtype=torch.float64), is_grads_batched=True, retain_graph=True),
        lambda g: g(out, x, ones, create_graph=True),
        lambda g: g(out.sum(), get_gradient_edge(x), retain_graph=True),
        lambda g: g(get_gradient_edge(out), x, ones, retain_graph=True),
        lambda g: g((out for _ in range(1)), x, ones, retain_graph=True),
        lambda g: g(out, [x, x], ones, retain_graph=True),
    ]
    for call in calls:
        assert_same(call(wengert.grad), call(torch.autograd.grad))
    assert x.grad is None


def test_grad_of_grad():
    x = vec(requires_grad=True)
    for _ in range(2):
        first = [g(x.sin().prod(), x, create_graph=True)[0] for g in (wengert.grad, torch.autograd.grad)]
        second = [g(t.sum(), x, create_graph=True)[0] for g, t in zip((wengert.grad, torch.autograd.grad), first)]
        third = [g(t.prod(), x)[0] for g, t in zip((wengert.grad, torch.autograd.grad), second)]
        assert_same(third[0], third[1])


def test_deprecated_only_inputs_warns():
    x = vec(requires_grad=True)
    with pytest.warns(FutureWarning, match="only_inputs argument is deprecated"):
        wengert.grad(x.sum(), x, only_inputs=False)


class Marked(torch.Tensor):
    pass


AMBIENT = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "anomaly": torch.autograd.detect_anomaly,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dual level": forward_ad.dual_level,
    "default device": lambda: torch.device("cpu"),
    "deterministic": lambda: torch.utils.deterministic.fill_uninitialized_memory and torch.no_grad(),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("context", AMBIENT.values(), ids=AMBIENT)
def test_ambient_state(context):
    w = torch.linspace(-1, 1, 9).reshape(3, 3)
    f = lambda x: torch.tanh(w @ x)
    x = vec(dtype=torch.float32)
    with context():
        for ours, theirs in (
            (lambda: wengert.jacobian(f, x), lambda: F.jacobian(f, x)),
            (lambda: wengert.hessian(lambda x: f(x).sum(), x), lambda: F.hessian(lambda x: f(x).sum(), x)),
            (lambda: wengert.func.jacrev(f)(x), lambda: torch.func.jacrev(f)(x)),
            (lambda: wengert.func.hessian(f)(x), lambda: torch.func.hessian(f)(x)),
            (lambda: wengert.func.grad(lambda x: f(x).sum())(x), lambda: torch.func.grad(lambda x: f(x).sum())(x)),
        ):
            assert_same_call(ours, theirs, "under " + str(context), wengert_tolerance())


def wengert_tolerance():
    from support.compare import Tolerance

    return Tolerance(rtol=1e-5, atol=1e-6)


def test_subclasses_keep_their_type():
    x = vec().as_subclass(Marked)
    ours, theirs = wengert.jacobian(torch.sin, x), F.jacobian(torch.sin, x)
    assert type(ours) is type(theirs)
    assert_same(ours, theirs)


def test_meta_tensors():
    x = torch.ones(3, device="meta")
    ours, theirs = wengert.jacobian(torch.sin, x), F.jacobian(torch.sin, x)
    assert ours.device == theirs.device and ours.shape == theirs.shape


def test_sparse_inputs_take_torch_s_path():
    x = torch.eye(2, dtype=torch.float64).to_sparse()
    f = lambda x: torch.sparse.sum(x)
    assert_same_call(lambda: wengert.jacobian(f, x), lambda: F.jacobian(f, x), "sparse")


def test_inside_torch_func():
    f = lambda x: wengert.jacobian(torch.sin, x, create_graph=True).sum()
    g = lambda x: F.jacobian(torch.sin, x, create_graph=True).sum()
    assert_same_call(lambda: torch.func.grad(f)(vec()), lambda: torch.func.grad(g)(vec()), "inside torch.func.grad")
    assert_same_call(lambda: torch.func.vmap(f)(vec()[:, None]), lambda: torch.func.vmap(g)(vec()[:, None]), "inside vmap")


def test_gradcheck_through_our_results():
    """Forward mode only where torch has it: autograd.functional detaches dual inputs."""
    x = vec(requires_grad=True)
    f = lambda x: x.sin() * x.sum()
    assert torch.autograd.gradcheck(wengert.func.jacrev(f), x, check_batched_grad=True, check_forward_ad=True)
    for result in (
        lambda x: wengert.jacobian(f, x, create_graph=True),
        lambda x: wengert.hessian(lambda x: f(x).sum(), x, create_graph=True),
        wengert.func.jacrev(f),
        wengert.func.grad(lambda x: f(x).sum()),
    ):
        assert torch.autograd.gradcheck(result, x, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(result, x)


def test_forward_mode_through_a_derivative_in_graph_form():
    """The derivative is computed once from duals that require grad; its tangent is the directional second derivative."""
    x, t = vec(), vec() + 1
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), t)
        y = (dual.sin() * dual.sum()).sum()
        tangents = [
            forward_ad.unpack_dual(wengert.jacobian(y, dual, create_graph=True)).tangent.detach(),
            forward_ad.unpack_dual(torch.autograd.grad(y, dual, create_graph=True)[0]).tangent.detach(),
        ]
    assert_same(*tangents)


def test_dual_tensors_through_our_results():
    x, t = vec(), vec() + 1
    results = []
    for jacobian in (wengert.jacobian, F.jacobian):
        with forward_ad.dual_level():
            out = jacobian(lambda x: x.sin() * x.sum(), forward_ad.make_dual(x, t).requires_grad_(), create_graph=True)
            results.append(forward_ad.unpack_dual(out).tangent)
    assert (results[0] is None) == (results[1] is None)
    if results[0] is not None:
        assert_same(results[0].detach(), results[1].detach())


# ----------------------------------------------------------------------------------------------- one call of the function, always
def hooked(x):
    y = x.sin()
    y.register_hook(lambda g: g)
    return y * 2


ONCE = {
    "native": torch.sin,
    "refused": hooked,
    "independent": lambda x: torch.ones(4, 2, dtype=torch.float64),
    "independent, with a graph": lambda x: torch.ones(4, 2, dtype=torch.float64, requires_grad=True) * 2,
    "a tuple": lambda x: (x.sin(), x.cos()),
    "a list": lambda x: [x.sin()],
    "nothing": lambda x: None,
    "a number": lambda x: 3.0,
    "a Parameter": lambda x: torch.nn.Parameter(x.detach()),
    "no elements": lambda x: x[:, :0],
    "its own argument": lambda x: x,
    "an integer": lambda x: x.long(),
    "complex": lambda x: torch.complex(x, x),
    "an error": lambda x: x.reshape(5, 5),
}


@pytest.mark.parametrize("form", ["jacobian", "batch_jacobian"])
@pytest.mark.parametrize("name", ONCE)
def test_whatever_the_function_gives_it_runs_once(name, form):
    calls = []

    def f(x):
        calls.append(torch.is_grad_enabled())
        return ONCE[name](x)

    x = torch.linspace(0.5, 1.5, 8, dtype=torch.float64).reshape(4, 2)
    outcome = Outcome.of(lambda: getattr(wengert, form)(f, x))
    assert calls == [True] and torch.is_grad_enabled() and not x.requires_grad
    if form == "jacobian":
        expected = Outcome.of(lambda: F.jacobian(ONCE[name], x))
        if expected.error is None:
            assert_same(outcome.value, expected.value)
        else:
            assert same_error(outcome.error, expected.error)
    elif name in ("native", "refused"):
        scale = 2 if name == "refused" else 1
        assert_same(outcome.value, torch.func.vmap(torch.func.jacrev(lambda x: scale * x.sin()))(x))


def test_the_graph_ends_at_the_functions_argument():
    """Results hang on no graph, whatever the caller's mode and the history of the argument."""
    x = torch.linspace(0.5, 1.5, 3, dtype=torch.float64, requires_grad=True)
    y = x.exp()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            for form in (wengert.jacobian, wengert.batch_jacobian):
                assert not form(torch.sin, y).requires_grad
                assert not form(lambda v: v * x, y).requires_grad
            assert torch.is_grad_enabled() is (mode is torch.enable_grad)
    assert x.grad is None


@pytest.mark.parametrize(
    "calls", [lambda f, x: torch.func.grad(f)(x), lambda f, x: torch.func.vjp(f, x), lambda f, x: torch.func.jvp(f, (x,), (x,))]
)
def test_inputs_that_escaped_from_a_transform(calls):
    escaped = []

    def f(x):
        escaped.append(x)
        return x.sum()

    x = torch.rand(3, dtype=torch.float64)
    calls(f, x)
    cube = lambda x: x**3
    assert_same(wengert.jacobian(cube, escaped[0]), F.jacobian(cube, escaped[0]))
    assert_same(wengert.jacobian(cube, (escaped[0],)), F.jacobian(cube, (escaped[0],)))
    assert_same(wengert.hessian(lambda x: cube(x).sum(), escaped[0]), F.hessian(lambda x: cube(x).sum(), escaped[0]))
