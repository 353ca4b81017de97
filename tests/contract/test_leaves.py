"""What transforms make of their arguments: functions that write to them, and what of the results requires grad."""

# ruff: noqa: B023 - the closures run inside their loop
import pytest
import torch
import wengert
from support.compare import assert_same, assert_same_call
from wengert import _engine, func


def vec(*shape, start=0.5):
    n = torch.Size(shape).numel()
    return torch.linspace(start, start + 1, n, dtype=torch.float64).reshape(shape)


def write(w):
    with torch.no_grad():
        w.mul_(0.9)


def after_use(w):
    y = (w * vec(4, start=2)).sum()
    write(w)
    return y


def before_use(w):
    write(w)
    return w.pow(3).sum()


def between(w):
    return after_use(w) + w.pow(3).sum()


def a_part(w):
    y = (w * vec(4, start=2)).sum()
    write(w[:2])
    return y + w.square().sum()


def saved_before(w):
    y = w.pow(3).sum()
    write(w)
    return y


def with_a_history(w):
    w.mul_(0.9)
    return w.pow(3).sum()


def a_part_with_a_history(w):
    w[:2].mul_(0.9)
    return w.pow(3).sum()


GIVEN = {
    "plain": lambda: vec(4),
    "leaf": lambda: vec(4).requires_grad_(),
    "with a history": lambda: vec(4).requires_grad_() * 1.0,
    "view": lambda: (vec(8).requires_grad_() * 1.0)[:4],
    "view of a leaf": lambda: vec(8).requires_grad_()[:4],
}
FUNCTIONS = [after_use, before_use, between, a_part, saved_before, with_a_history, a_part_with_a_history]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("f", FUNCTIONS)
def test_functions_that_write_to_their_argument(f, given):
    """A result, or an error, the argument afterwards, and whether the result has a history: as PyTorch's."""

    def outcome(m, name):
        x = GIVEN[given]()
        try:
            found = getattr(m, name)(f)(x)
        except RuntimeError as error:
            return "in-place" in str(error) or "inplace" in str(error), None, None
        y = found[0] if type(found) is tuple else found
        return y.detach(), x.detach(), y.requires_grad

    for name in ("grad", "grad_and_value", "jacrev", "jacfwd", "hessian"):
        ours, theirs = outcome(func, name), outcome(torch.func, name)
        assert ours[2] == theirs[2], name
        if theirs[1] is None:
            assert ours[0] is theirs[0] is True, name
        else:
            assert_same(ours[0], theirs[0], where=name)
            assert_same(ours[1], theirs[1], where=name)


@pytest.mark.parametrize("f", [after_use, before_use, between])
def test_functions_that_write_to_their_argument_run_once_below_vmap(f):
    mapped = func.vmap(func.grad(f))
    for given in ("plain", "with a history", "leaf"):  # each leaves another graph
        ours, theirs = (vec(2, 4).requires_grad_(given != "plain") * 1.0 for _ in range(2))
        for _ in range(3):
            assert_same(mapped(ours), torch.func.vmap(torch.func.grad(f))(theirs))
            assert_same(ours.detach(), theirs.detach())


def test_forward_mode_that_is_refused_leaves_what_it_was_given():
    runs = []

    def f(w):
        runs.append(w)
        write(w)
        return w.square()

    x = vec(4)
    assert_same(func.jacfwd(f)(x), torch.func.jacfwd(f)(vec(4)))
    assert_same(x, vec(4) * 0.9)


@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
@pytest.mark.parametrize("requires_grad", [(False, False), (True, False), (False, True), (True, True)])
def test_which_gradients_of_a_convolution_require_grad(requires_grad, argnums):
    def loss(w, x):
        return torch.nn.functional.conv1d(x, w).square().sum()

    w, x = (vec(1, 1, n).requires_grad_(r) for n, r in zip((3, 6), requires_grad))
    assert_same_call(lambda: func.grad(loss, argnums)(w, x), lambda: torch.func.grad(loss, argnums)(w, x), "conv1d")


def test_one_walk_answers_for_all_results(monkeypatch):
    asked = []
    walk = _engine.have_other_leaves
    monkeypatch.setattr(_engine, "have_other_leaves", lambda *args: asked.append(0) or walk(*args))
    p = vec(3).requires_grad_()

    def states(x):
        found = [x * p]
        for _ in range(count):
            found.append(found[-1].sin())
        return found[-1].sum(), found

    walks = {}
    for count in (3, 100):
        asked.clear()
        gradient, found = func.grad(states, has_aux=True)(vec(3))
        walks[count] = len(asked)
        assert gradient.requires_grad and all(t.requires_grad for t in found)
    assert walks[3] == walks[100]
    parameters = {str(k): vec(2).requires_grad_() for k in range(100)}
    asked.clear()
    func.grad(lambda tree: sum(w.square().sum() for w in tree.values()))(parameters)
    assert len(asked) <= 2


def test_which_of_several_results_reach_a_leaf():
    a, b = vec(3).requires_grad_(), vec(3).requires_grad_()
    x = a.sin()
    outputs = [x.exp(), x * b, a, b, (x * b).cos() + x, vec(3), x]
    assert _engine.have_other_leaves(outputs, [a]) == [False, True, False, True, True, False, False]
    assert _engine.have_other_leaves(outputs[::-1], [a]) == [False, False, True, True, False, True, False]
    assert _engine.have_other_leaves(outputs, [a, b]) == [False] * 7


def test_auxiliary_arguments_of_forward_mode_are_others():
    for x in (vec(3), vec(3).requires_grad_()):
        f = lambda z: (z.sin(), z)
        ours, theirs = (m.jacfwd(f, has_aux=True)(x)[1] for m in (func, torch.func))
        assert ours is not x and theirs is not x
        assert_same(ours.detach(), theirs.detach())


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["vjp", "jvp", "vhp", "hvp"])
def test_strict_products_through_user_code(name, create_graph):
    """Strict mode asks whether results have a history, and PyTorch's have one through whatever user code did."""
    functions = [lambda x: Twice.apply(x).sum(), lambda x: Twice.apply(x.sin()).sum(), lambda x: Twice.apply(x).sin().sum()]
    v = None if name == "vjp" else vec(3)
    for k, f in enumerate(functions):
        assert_same_call(
            lambda: getattr(wengert.functional, name)(f, vec(3), v, create_graph=create_graph, strict=True),
            lambda: getattr(torch.autograd.functional, name)(f, vec(3), v, create_graph=create_graph, strict=True),
            f"function {k}",
        )
