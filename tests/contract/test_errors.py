"""Bad input: the same exception type and message as torch's own function, and the user's graph as usable as torch leaves it."""

# ruff: noqa: B023 - the closures run inside their loop
import pytest
import torch
import wengert
from support.check import BEFORE_2_13
from support.compare import Outcome, assert_same, assert_same_call, assert_same_error
from torch.autograd import functional as F
from torch.autograd.graph import get_gradient_edge
from wengert import func


def vec(n=3, dtype=torch.float64, **options):
    return torch.linspace(0.5, 1.5, n, dtype=torch.float64).to(dtype).requires_grad_(options.get("requires_grad", False))


def changed_in_place(x):
    y = x.exp()
    z = y * y
    y.add_(1)
    return z


NOT_TENSORS = [3, "x", [1.0, 2.0], None, (torch.ones(2), 3)]

FUNCTIONAL = {
    "jacobian": (wengert.jacobian, F.jacobian),
    "hessian": (wengert.hessian, F.hessian),
    "vjp": (wengert.vjp, F.vjp),
    "jvp": (wengert.jvp, F.jvp),
    "vhp": (wengert.vhp, F.vhp),
    "hvp": (wengert.hvp, F.hvp),
}


@pytest.fixture(params=FUNCTIONAL)
def pair(request):
    return FUNCTIONAL[request.param]


@pytest.mark.parametrize("bad", NOT_TENSORS)
def test_inputs_that_are_not_tensors(pair, bad):
    ours, theirs = pair
    assert_same_error(lambda: ours(torch.sum, bad), lambda: theirs(torch.sum, bad))


@pytest.mark.parametrize("bad", NOT_TENSORS)
def test_outputs_that_are_not_tensors(pair, bad):
    ours, theirs = pair
    assert_same_error(lambda: ours(lambda x: bad, vec(1)), lambda: theirs(lambda x: bad, vec(1)))


@pytest.mark.parametrize("bad", [None, 3, "text"])
def test_a_function_that_cannot_be_called(bad):
    assert_same_error(lambda: wengert.jacobian(bad, vec()), lambda: F.jacobian(bad, vec()))


def test_integer_inputs(pair):
    ours, theirs = pair
    x = torch.arange(3)
    assert_same_error(lambda: ours(lambda x: x.sum(), x), lambda: theirs(lambda x: x.sum(), x))


def test_errors_of_the_function_pass_through(pair):
    def broken(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pair[0](broken, vec(1))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["hessian", "vhp", "hvp"])
@pytest.mark.parametrize("f", [lambda x: x * 2, lambda x: (x.sum(), x.sum()), lambda x: (x.sum(),), lambda x: x[:0]])
def test_hessians_of_what_is_no_scalar(name, f):
    ours, theirs = FUNCTIONAL[name]
    v = None if name == "hessian" else vec()
    args = (f, vec()) if v is None else (f, vec(), v)
    assert_same_error(lambda: ours(*args), lambda: theirs(*args))


@pytest.mark.parametrize("name", ["vjp", "jvp", "vhp", "hvp"])
@pytest.mark.parametrize("v", [None, vec(2), (vec(), vec()), torch.ones(3, 1), "v"])
def test_vectors_that_do_not_fit(name, v):
    ours, theirs = FUNCTIONAL[name]
    f = (lambda x: x.sin()) if name in ("vjp", "jvp") else (lambda x: x.sin().sum())
    assert_same_error(lambda: ours(f, vec(), v), lambda: theirs(f, vec(), v))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    ("name", "f", "count"),
    [
        ("jacobian", lambda x: torch.ones(2), 1),
        ("jacobian", lambda x, y: x * 2, 2),
        ("hessian", lambda x, y: (x**2).sum(), 2),
        ("hessian", lambda x: torch.ones(()), 1),
        ("hessian", lambda x: x.sum(), 1),
        ("vjp", lambda x, y: x.sum(), 2),
        ("vhp", lambda x: x.sum(), 1),
        ("hvp", lambda x: torch.ones(()), 1),
        ("jvp", lambda x: torch.ones(2), 1),
    ],
)
def test_strict(name, f, count, create_graph):
    ours, theirs = FUNCTIONAL[name]
    xs = (vec(), vec(2))[:count]
    args = (f, xs) if name in ("jacobian", "hessian", "vjp") else (f, xs, tuple(map(torch.ones_like, xs)))
    options = {"strict": True, "create_graph": create_graph}
    assert_same_error(lambda: ours(*args, **options), lambda: theirs(*args, **options))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("second", [torch.ones(0), torch.ones(2, dtype=torch.complex64)], ids=["empty", "complex"])
@pytest.mark.parametrize("f", [lambda x, y: x.sin().sum(), lambda x, y: x.sin().sum() + (y * y).sum().real], ids=["one", "both"])
@pytest.mark.parametrize("name", ["jacobian", "hessian"])
def test_strict_complains_of_one_output_before_the_next_is_computed(name, f, second, create_graph):
    """A Jacobian of the second gradient would have another error: without elements, or complex."""
    ours, theirs = FUNCTIONAL[name]
    call = lambda form: form(f, (vec(), second), strict=True, create_graph=create_graph)
    assert_same_call(lambda: call(ours), lambda: call(theirs), "")




class GivesNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2, None


def test_nodes_that_give_no_gradient():
    """Zeros, unless it matters that PyTorch's engine says None there."""
    x, y = vec(), vec()
    assert_same(wengert.jacobian(GivesNone.apply, (x, y)), F.jacobian(GivesNone.apply, (x, y)))
    for options in ({"strict": True}, {"strict": True, "create_graph": True}):
        assert_same_error(
            lambda: wengert.jacobian(GivesNone.apply, (x, y), **options), lambda: F.jacobian(GivesNone.apply, (x, y), **options)
        )
    x, y = x.requires_grad_(), y.requires_grad_()
    out = GivesNone.apply(x, y)
    assert wengert.grad(out.sum(), (x, y), allow_unused=True, retain_graph=True)[1] is None
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        wengert.jacobian(out, (x, y), allow_unused=False)


def test_strict_complains_of_one_output_before_the_next_is_derived():
    class Fails(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())

        @staticmethod
        def backward(ctx, g):
            raise ValueError("of the user's")

    x, w = vec(), vec(requires_grad=True)
    cases = ((lambda x: (w * 2, Fails.apply(x)), {}), (lambda x: (x * 2, Fails.apply(x)), {"create_graph": True}))
    for f, options in cases:
        assert_same_error(
            lambda: wengert.jacobian(f, x, strict=True, **options), lambda: F.jacobian(f, x, strict=True, **options)
        )


def test_strict_with_create_graph_refuses_constant_jacobians():
    args = (lambda x: 3 * x, vec(requires_grad=True))
    options = {"strict": True, "create_graph": True}
    assert_same_error(lambda: wengert.jacobian(*args, **options), lambda: F.jacobian(*args, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "sideways"},
        {"strategy": "forward-mode"},
        {"strategy": "forward-mode", "create_graph": True, "vectorize": True},
        {"strategy": "forward-mode", "strict": True},
        {"strict": True, "vectorize": True},
    ],
)
def test_options_that_exclude_each_other(options):
    assert_same_error(lambda: wengert.jacobian(torch.sin, vec(), **options), lambda: F.jacobian(torch.sin, vec(), **options))


@pytest.mark.parametrize("options", [{"outer_jacobian_strategy": "sideways"}, {"outer_jacobian_strategy": "forward-mode"}])
def test_hessian_strategies(options):
    f = lambda x: x.sin().sum()
    assert_same_error(lambda: wengert.hessian(f, vec(), **options), lambda: F.hessian(f, vec(), **options))


def test_complex_where_torch_refuses_it():
    z = vec(dtype=torch.complex128)
    assert_same_error(lambda: wengert.jacobian(torch.sin, z), lambda: F.jacobian(torch.sin, z))
    assert_same_error(lambda: wengert.hessian(torch.sum, z), lambda: F.hessian(torch.sum, z))
    to_complex = lambda x: torch.complex(x, x)
    assert_same_error(lambda: wengert.jacobian(to_complex, vec()), lambda: F.jacobian(to_complex, vec()))
    for name in ("jacrev", "jacfwd", "hessian"):
        ours, theirs = getattr(func, name), getattr(torch.func, name)
        assert_same_error(lambda: ours(torch.sin)(z), lambda: theirs(torch.sin)(z))
        assert_same_error(lambda: ours(to_complex)(vec()), lambda: theirs(to_complex)(vec()))


def test_an_output_without_elements():
    assert_same_error(lambda: wengert.jacobian(lambda x: x[:0], vec()), lambda: F.jacobian(lambda x: x[:0], vec()))


@pytest.mark.parametrize("options", [{}, {"create_graph": True}, {"strict": True}, {"vectorize": True}], ids=str)
def test_outputs_that_are_an_empty_tuple(options):
    for inputs in (vec(), (vec(), vec())):
        assert_same_error(
            lambda: wengert.jacobian(lambda *x: (), inputs, **options), lambda: F.jacobian(lambda *x: (), inputs, **options)
        )


@pytest.mark.parametrize("value", [torch.tensor(1.0), vec(1, requires_grad=True).sum()])
def test_inputs_that_are_an_empty_tuple(pair, value):
    ours, theirs = pair
    assert_same_error(lambda: ours(lambda: value, ()), lambda: theirs(lambda: value, ()))


def graph(f=torch.exp, **options):
    x = vec(requires_grad=True)
    return x, f(x)


GRAD_ERRORS = {
    "output does not require grad": lambda g, x, y: g(x.detach(), x),
    "input does not require grad": lambda g, x, y: g(y.sum(), x.detach()),
    "unused input": lambda g, x, y: g(y.sum(), [x, vec(requires_grad=True)]),
    "no inputs": lambda g, x, y: g(y.sum(), []),
    "no outputs": lambda g, x, y: g([], x),
    "implicit cotangent of a vector": lambda g, x, y: g(y, x),
    "cotangent of another shape": lambda g, x, y: g(y, x, vec(2)),
    "cotangent of another dtype": lambda g, x, y: g(y, x, torch.ones(3, dtype=torch.complex128)),
    "too few cotangents": lambda g, x, y: g([y, y], x, [y.detach()]),
    "cotangent that is no tensor": lambda g, x, y: g(y, x, 3.0),
    "batched cotangent of another shape": lambda g, x, y: g(y, x, torch.ones(4, 2), is_grads_batched=True),
    "batched without cotangents": lambda g, x, y: g(y, x, is_grads_batched=True),
    "contradiction": lambda g, x, y: g(y.sum(), x, materialize_grads=True, allow_unused=False),
    "outputs of a wrong type": lambda g, x, y: g(3, x),
    "inputs of a wrong type": lambda g, x, y: g(y.sum(), 3),
    "inputs with a wrong element": lambda g, x, y: g(y.sum(), [x, 3]),
    "materialised edge": lambda g, x, y: g(
        y.sum(), [get_gradient_edge(vec(requires_grad=True).exp())], materialize_grads=True
    ),
}


@pytest.mark.parametrize("case", GRAD_ERRORS.values(), ids=GRAD_ERRORS)
def test_grad(case):
    if BEFORE_2_13 and case is GRAD_ERRORS["unused input"]:
        pytest.skip("another text before 2.13")
    assert_same_error(lambda: case(wengert.grad, *graph()), lambda: case(torch.autograd.grad, *graph()))


@pytest.mark.parametrize("case", list(GRAD_ERRORS.values())[:-1], ids=list(GRAD_ERRORS)[:-1])
def test_the_graph_survives_a_refused_call_as_it_does_in_torch(case):
    outcomes = []
    for g in (wengert.grad, torch.autograd.grad):
        x, y = graph()
        Outcome.of(lambda: case(g, x, y))
        outcomes.append(Outcome.of(lambda: torch.autograd.grad(y.sum(), x)))
    assert outcomes[0].describe() == outcomes[1].describe()


def test_freed_graphs():
    def freed(call):
        x, y = graph(lambda x: x.exp().sum())
        torch.autograd.grad(y, x)
        return call(y, x)

    assert_same_error(lambda: freed(wengert.grad), lambda: freed(torch.autograd.grad))
    for form in (wengert.jacobian, wengert.hessian):
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            freed(form)


def test_grad_frees_the_graph_exactly_when_torch_does():
    for options in ({}, {"retain_graph": True}, {"create_graph": True}, {"create_graph": True, "retain_graph": False}):
        outcomes = []
        for g in (wengert.grad, torch.autograd.grad):
            x, y = graph(lambda x: x.exp().sum())
            g(y, x, **options)
            outcomes.append(Outcome.of(lambda: torch.autograd.grad(y, x)).describe())
        assert outcomes[0] == outcomes[1], options


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("shapes", [((3, 3), (2, 3)), ((2, 3), (3, 3)), ((4, 3), (1, 3)), ((3,), (3, 3)), ((0, 3), (2, 3))])
def test_batched_cotangents_that_do_not_fit(shapes, create_graph):
    def called(grad):
        x = vec(requires_grad=True)
        cotangents = [torch.ones(shape, dtype=torch.float64) for shape in shapes]
        return grad((x.sin(), x.exp()), x, cotangents, is_grads_batched=True, create_graph=create_graph)

    assert_same_error(lambda: called(wengert.grad), lambda: called(torch.autograd.grad))


@pytest.mark.parametrize("cotangents", [None, [None], [None, None]], ids=str)
def test_batched_cotangents_that_are_missing(cotangents):
    def called(grad):
        x = vec(requires_grad=True)
        outputs = [x.sin().sum(), x.exp().sum()][: len(cotangents or [None])]
        return grad(outputs, x, cotangents, is_grads_batched=True)

    assert_same_error(lambda: called(wengert.grad), lambda: called(torch.autograd.grad))


def test_saved_tensors_changed_in_place():
    def changed(call):
        return call(changed_in_place(x).sum(), x)

    x = vec(requires_grad=True)
    assert_same_error(lambda: changed(wengert.grad), lambda: changed(torch.autograd.grad))
    assert_same_error(lambda: wengert.jacobian(changed_in_place, vec()), lambda: F.jacobian(changed_in_place, vec()))
    scalar = lambda x: changed_in_place(x).sum()
    assert_same_error(lambda: wengert.hessian(scalar, vec()), lambda: F.hessian(scalar, vec()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed(wengert.jacobian)


def test_graph_form_refuses_what_torch_grad_refuses():
    x, y = graph()
    with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad and does not have a grad_fn"):
        wengert.jacobian(y.detach(), x)
    with pytest.raises(RuntimeError, match="One of the differentiated Tensors does not require grad"):
        wengert.jacobian(y, x.detach())
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        wengert.jacobian(y, vec(requires_grad=True), allow_unused=False)
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        wengert.hessian(y.sum(), (x, vec(requires_grad=True)), allow_unused=False)
    with pytest.raises(RuntimeError, match="should contain a single element"):
        wengert.hessian(y, x)
    with pytest.raises(RuntimeError, match="should return a single Tensor"):
        wengert.hessian((y.sum(),), x)
    with pytest.raises(TypeError, match="strict, vectorize and strategy belong to the function form"):
        wengert.jacobian(y, x, strict=True)
    with pytest.raises(TypeError, match="value at index 1 has type"):
        wengert.jacobian((y, 3), x)
    assert_same(wengert.jacobian(y, x), torch.diag(x.exp()).detach())


TRANSFORM_ERRORS = {
    "value is no tensor": lambda m: m.grad(lambda x: 3.0)(vec()),
    "value is no scalar": lambda m: m.grad(torch.sin)(vec()),
    "value is a pair": lambda m: m.grad_and_value(lambda x: (x.sum(), x))(vec()),
    "aux is missing": lambda m: m.grad(lambda x: x.sum(), has_aux=True)(vec()),
    "jacrev aux is missing": lambda m: m.jacrev(torch.sin, has_aux=True)(vec()),
    "jacfwd aux is missing": lambda m: m.jacfwd(torch.sin, has_aux=True)(vec()),
    "jacrev of a number": lambda m: m.jacrev(lambda x: 3.0)(vec()),
    "jacfwd of a number": lambda m: m.jacfwd(lambda x: 3.0)(vec()),
    "jacrev of None": lambda m: m.jacrev(lambda x: None)(vec()),
    "jacrev of an integer output": lambda m: m.jacrev(lambda x: x.long())(vec()),
    "jacrev in an integer": lambda m: m.jacrev(torch.sin)(torch.arange(3)),
    "grad in an integer": lambda m: m.grad(lambda x: x.sum())(torch.arange(3)),
    "jacrev in a number": lambda m: m.jacrev(torch.sin)(3.0),
    "argnums out of range": lambda m: m.jacrev(torch.mul, 2)(vec(), vec()),
    "argnums twice": lambda m: m.jacrev(torch.mul, (0, 0))(vec(), vec()),
    "argnums empty": lambda m: m.jacrev(torch.mul, ())(vec(), vec()),
    "argnums of a wrong type": lambda m: m.grad(torch.dot, "x")(vec(), vec()),
    "jacrev without argnums": lambda m: m.jacrev(torch.sin, None)(vec()),
    "hessian without argnums": lambda m: m.hessian(lambda x: x.sum(), None)(vec()),
    "jacrev without arguments": lambda m: m.jacrev(lambda: torch.ones(2))(),
    "chunk size": lambda m: m.jacrev(torch.sin, chunk_size=0),
    "vmap chunk size": lambda m: m.vmap(m.jacrev(torch.sin), chunk_size=0),
    "vmap randomness": lambda m: m.vmap(m.jacrev(torch.sin), randomness="some"),
    "vmap without inputs": lambda m: m.vmap(m.jacrev(torch.sin))(),
    "vmap over nothing": lambda m: m.vmap(m.jacrev(torch.sin), in_dims=None)(vec()),
    "vmap over an axis too many": lambda m: m.vmap(m.jacrev(torch.sin), in_dims=1)(vec()),
    "vmap over a number": lambda m: m.vmap(m.jacrev(torch.mul))(vec(), 3.0),
    "vmap over different sizes": lambda m: m.vmap(m.jacrev(torch.mul))(vec(2), vec(3)),
    "vmap with in_dims of another structure": lambda m: m.vmap(m.jacrev(torch.mul), in_dims=(0,))(vec(), vec()),
    "vmap of a vector loss": lambda m: m.vmap(m.grad(torch.sin))(torch.ones(2, 3)),
    "vmap of randomness": lambda m: m.vmap(m.jacrev(lambda x: x * torch.rand(3)))(torch.ones(2, 3)),
}


@pytest.mark.parametrize("case", TRANSFORM_ERRORS.values(), ids=TRANSFORM_ERRORS)
def test_transforms(case):
    assert_same_error(lambda: case(func), lambda: case(torch.func))
    assert torch.is_grad_enabled()


def test_forward_mode_in_all_arguments():
    """`jacfwd` alone takes None for all of them, and gives a tuple."""
    assert_same(func.jacfwd(torch.mul, None)(vec(), vec(3)), torch.func.jacfwd(torch.mul, None)(vec(), vec(3)))


@pytest.mark.parametrize("f", [lambda x: x * x.sum().item(), lambda x: x if x.sum() > 0 else -x])
def test_what_vmap_cannot_map_stays_refused(f):
    """Only the level at which PyTorch notices differs, and with it the wording after the first words."""
    for m in (func, torch.func):
        with pytest.raises(RuntimeError, match="vmap: It looks like you're"):
            m.vmap(m.jacrev(f))(torch.ones(2, 3))
