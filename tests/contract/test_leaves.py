"""What transforms make of their arguments: functions that write to them, and what of the results requires grad."""

# ruff: noqa: B023 - the closures run inside their loop
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import wengert
from support.compare import assert_same, assert_same_call
from support.native import Calls
from wengert import _engine, func
from wengert._native import C


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
    begun = C.sequence_number()
    a, b = vec(3).requires_grad_(), vec(3).requires_grad_()
    x = a.sin()
    outputs = [x.exp(), x * b, a, b, (x * b).cos() + x, vec(3), x]
    assert _engine.have_other_leaves(outputs, [a], begun) == [False, True, False, True, True, False, False]
    assert _engine.have_other_leaves(outputs[::-1], [a], begun) == [False, False, True, True, False, True, False]
    assert _engine.have_other_leaves(outputs, [a, b], begun) == [False] * 7
    assert _engine.have_other_leaves(outputs, [a], C.sequence_number()) == [True, True, False, True, True, False, True]


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


X = torch.tensor([[0.5, 1.5], [1.0, -1.0]], dtype=torch.float64)


def adds(x, b):
    b.add_(1)
    return (b * x * x).sum()


def adds_without_a_history(x, b):
    with torch.no_grad():
        b.mul_(0.9).add_(x)
    return (b * x * x).sum()


def adds_what_is_differentiated(x, b):
    b.mul_(0.9).add_(x * x)
    return b.square().sum()


def writes_to_a_view(x, b):
    b.view(-1).mul_(x)
    return (b * x).sum()


def writes_an_item(x, b):
    b[0] = x[1] * 2
    return (b * x).sum()


def writes_by_out(x, b):
    y = (b * x).sum()
    torch.add(b.detach(), 1, out=b)
    return y


OTHERS = [adds, adds_without_a_history, adds_what_is_differentiated, writes_to_a_view, writes_an_item, writes_by_out]


@pytest.mark.parametrize("f", OTHERS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_functions_that_write_to_another_argument(f, requires_grad):
    """Once, whatever becomes of the call, and without leaving it a history that PyTorch would not."""
    forms = {name: lambda m, name=name: getattr(m, name)(f) for name in ("grad", "jacrev", "jacfwd", "hessian")}
    forms |= {f"vmap {name}": lambda m, name=name: m.vmap(getattr(m, name)(f)) for name in ("grad", "jacrev", "jacfwd")}
    for name, form in forms.items():
        x = X if name.startswith("vmap") else X[0]
        outcomes = []
        for m in (func, torch.func):
            transform, b = form(m), torch.ones_like(x)
            try:
                for _ in range(3):
                    given = x.clone().requires_grad_() if requires_grad else x
                    found = transform(given, b)
                outcomes.append((found.detach(), b.detach(), b.requires_grad, requires_grad or found.requires_grad))
            except RuntimeError as error:
                outcomes.append(type(error))
        if type(outcomes[1]) is tuple:
            assert_same(outcomes[0], outcomes[1], where=name)


def test_views_that_a_function_writes_to_have_no_history_afterwards():
    for m in (func, torch.func):
        whole = torch.ones(4, dtype=torch.float64)
        b = whole[:2]
        m.grad(adds_what_is_differentiated)(X[0], b)
        assert not (whole.requires_grad or b.requires_grad) and b.grad_fn is None
        b.cpu().numpy()


def with_a_hook(x):
    y = x * 2
    y.register_hook(lambda g: g * 3)
    return y.pow(3).sum()


def with_a_hook_on_the_argument(x):
    x.register_hook(lambda g: g * 2)
    return x.pow(3).sum()


@pytest.mark.parametrize("f", [with_a_hook, with_a_hook_on_the_argument])
def test_hooks_run_at_their_own_level(f):
    cases = {
        "gradient": lambda m: m.grad(f)(vec(2)),
        "of a gradient": lambda m: m.grad(lambda x: m.grad(f)(x).sum())(vec(2)),
        "Jacobian of a gradient": lambda m: m.jacrev(m.grad(f))(vec(2)),
        "Jacobian of a Jacobian": lambda m: m.jacrev(m.jacrev(f))(vec(2)),
        "hessian": lambda m: m.hessian(f)(vec(2)),
        "by sample": lambda m: m.vmap(m.grad(f))(vec(3, 2)),
    }
    for name, case in cases.items():
        assert_same_call(lambda: case(func), lambda: case(torch.func), name)
    gradients = []
    for m in (func, torch.func):
        p = vec(2).requires_grad_()
        gradients.append(torch.autograd.grad(m.grad(f)(p).sum(), p)[0])
    assert_same(*gradients)


def hooked_and_writing(x, b):
    y = x * 1
    y.register_hook(lambda g: g * 2)
    y.grad_fn.register_hook(lambda given, taken: None)
    b.add_(1)
    return (b * y * y * torch.rand(2, dtype=x.dtype)).sum()


@pytest.mark.parametrize("name", ["captured", "nested", "thrice", "argument", "batch of one"])
def test_functions_with_hooks_run_once(name):
    def call(m):
        w, b, x = vec(2).requires_grad_(), torch.zeros(2, dtype=torch.float64), vec(2)
        torch.manual_seed(0)
        if name == "captured":
            found = m.grad(lambda x, b: hooked_and_writing(x, b) * w.sum())(x, b)
        elif name == "nested":
            found = m.jacrev(lambda x, b: m.grad(hooked_and_writing)(x, b))(x, b)
        elif name == "thrice":
            found = m.jacrev(lambda x, b: m.jacrev(lambda x, b: m.grad(hooked_and_writing)(x, b) * x)(x, b))(x, b)
        elif name == "argument":
            found = m.grad_and_value(hooked_and_writing)(x.requires_grad_(), b)[0]
        else:
            f = lambda x: hooked_and_writing(x, torch.zeros(2, dtype=torch.float64)) * w.sum()
            found = m.vmap(m.grad(f), randomness="different")(x[None])
        again = torch.autograd.grad(found.sum(), [w, x], allow_unused=True) if found.requires_grad else None
        return found.detach(), again, b.detach(), b.requires_grad, torch.rand(2)

    assert_same_call(lambda: call(func), lambda: call(torch.func), name)


@pytest.mark.parametrize("name", ["tensor", "node"])
def test_what_a_hook_captures_is_differentiated(name):
    def by_w(m, w):
        def f(x):
            y = x * x
            if name == "tensor":
                y.register_hook(lambda g: g * w)
            else:
                y.grad_fn.register_hook(lambda given, taken: tuple(g * w for g in given))
            return (y * x).sum()

        return m.grad(f)(vec(3)).sum()

    for order in ("grad", "jacrev"):
        derive = lambda m: getattr(m, order)(lambda w: by_w(m, w))(vec(3, start=1))
        assert_same_call(lambda: derive(func), lambda: derive(torch.func), order)
    w = vec(3).requires_grad_()
    assert_same(*(torch.autograd.grad(by_w(m, w), w)[0] for m in (func, torch.func)))


@pytest.mark.parametrize("transform", ["grad", "jacrev", "grad_and_value"])
def test_hooks_of_auxiliary_outputs_stay_inside(transform):
    w = vec(3).requires_grad_()

    def f(x):
        a = x * w
        a.register_hook(lambda g: g * 10)
        a.grad_fn.register_hook(lambda given, taken: tuple(g * 10 for g in given))
        return (x * x).sum(), a

    def call(m):
        found = getattr(m, transform)(f, has_aux=True)(vec(3))
        aux = found[1][1] if transform == "grad_and_value" else found[1]
        return torch.autograd.grad(aux.sum(), w)

    assert_same_call(lambda: call(func), lambda: call(torch.func), transform)


def test_hooks_of_what_another_thread_made_stay():
    w, ran = vec(3).requires_grad_(), []
    captured = w * 2
    captured.register_hook(lambda g: ran.append(0))

    def f(x):
        y = x * x
        y.register_hook(lambda g: g * 2)
        return (y * captured).sum()

    thread = threading.Thread(target=lambda: func.grad(f)(vec(3)))
    thread.start()
    thread.join()
    ran.clear()
    torch.autograd.grad(captured.sum(), w)
    assert ran == [0]


def test_writing_by_an_overload_is_seen():
    f = lambda x, b: (torch.ops.aten.add_.Scalar(b, 1), (x * b).max())[1]

    def call(m):
        b = torch.zeros(3, dtype=torch.float64)
        return m.vmap(m.grad(f), (0, None))(torch.stack([vec(3)] * 2), b), b

    assert_same_call(lambda: call(func), lambda: call(torch.func), "overload")


def test_functions_that_catch_the_errors_of_operators():
    """Which the operator raises under vmap alone."""

    def f(x):
        try:
            return torch.zeros(3, dtype=x.dtype).add_(x).sum()
        except RuntimeError:
            return (x**3).sum()

    assert_same(*(m.vmap(m.grad(f))(vec(2, 3)) for m in (func, torch.func)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["own seed", "fork", "permutation"])
def test_generators_go_back_however_the_function_moves_them(name, threads):
    def f(x):
        a = torch.rand(3, dtype=x.dtype)
        if name == "own seed":
            torch.manual_seed(4)
        elif name == "fork":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                a = a * torch.rand(3, dtype=x.dtype)
        else:
            return (x[torch.randperm(3)] * x * a).sum()
        return (x * a * torch.rand(3, dtype=x.dtype) * x).max()

    def call(m, randomness):
        torch.manual_seed(5)
        return m.vmap(m.grad(f), randomness=randomness)(vec(4, 3)), torch.rand(2)

    go_on = threading.Event()
    other = threading.Thread(target=go_on.wait)  # which draws nothing
    if threads == 2:
        if name != "permutation":
            return  # with threads about, what moves a generator between draws may be theirs
        other.start()
    try:
        for randomness in ("same", "different", "same"):
            assert_same_call(lambda: call(func, randomness), lambda: call(torch.func, randomness), randomness)
    finally:
        go_on.set()


def test_histories_do_not_stay_in_arguments():
    """Passed by name, after an error, or without grad mode."""
    w = vec(2).requires_grad_()

    def raises(x, b):
        b.add_(x)
        raise ValueError("mine")

    for m in (func, torch.func):
        written = [torch.zeros(2, dtype=torch.float64) for _ in range(3)]
        m.grad(lambda x, b: (b.copy_(x * 2) * x).sum())(vec(2), b=written[0])
        with pytest.raises(ValueError, match="mine"):
            m.grad(raises)(vec(2), written[1])
        with torch.no_grad():
            m.grad(lambda x, b: (b.copy_(x * w) * x).sum())(vec(2), written[2])
        assert not any(b.requires_grad for b in written)
        assert all(b.ne(0).all() for b in written)


def test_writing_to_a_parameter_without_grad_mode():
    def call(m):
        p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            return m.grad(lambda x, p: (p.copy_(x) * x).sum())(vec(2), p), p

    assert_same_call(lambda: call(func), lambda: call(torch.func), "gradient")


def test_what_runs_sample_by_sample_writes_to_nothing():
    """Where PyTorch raises an error after writing, or raised one in another call, nothing is written twice."""
    f = lambda x, b: (b.add_(1), x * b)[1]
    x = torch.stack([vec(3)] * 3)

    def after_an_error(m):
        with pytest.raises(RuntimeError):
            m.vmap(m.jacrev(f, argnums=1), (0, None))(x, torch.zeros(3, dtype=torch.float64))
        b = torch.zeros(3, dtype=torch.float64)
        return m.vmap(m.jacrev(f), (0, None))(x, b), b

    assert_same_call(lambda: after_an_error(func), lambda: after_an_error(torch.func), "after an error")

    def branches(x, b):
        b.add_(1)
        return (x * b).sum() if x.sum().item() > 0 else x.sum()

    for m in (func, torch.func):
        with pytest.raises(RuntimeError):
            m.vmap(m.grad(branches))(x, torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["jacobian", "vjp", "jvp", "hessian", "vhp", "hvp"])
def test_arguments_of_function_forms_that_are_detached_in_place(name):
    w = vec(2).requires_grad_()
    scalar = name in ("hessian", "vhp", "hvp")
    f = lambda x: (x.detach_(), (x * w).sum() if scalar else x * w)[1]
    given = (vec(2),) if name in ("jacobian", "hessian") else (vec(2), vec(2))
    for m in (wengert, torch.autograd.functional):
        with pytest.raises(RuntimeError, match=r"does not require grad|detach views"):
            getattr(m, name)(f, *given)


def test_detaching_in_place():
    def cut(x):
        y = x * 2
        y.detach_()
        return (y * x).sum()

    def argument(x):
        x.detach_()
        return x.pow(3).sum()

    for name in ("hessian", "jacfwd"):
        assert_same_call(lambda: getattr(func, name)(cut)(vec(2)), lambda: getattr(torch.func, name)(cut)(vec(2)), name)
    for name in ("grad", "jacrev"):
        ours, theirs = (getattr(m, name)(argument)(vec(2).requires_grad_()) for m in (func, torch.func))
        assert_same(ours, theirs)


def test_derivatives_that_only_decompositions_have():
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    cases = [
        lambda x: loss(x, torch.full_like(x, 0.3), weight=x * x),
        lambda x: loss(x, x.sigmoid(), pos_weight=x * x),
    ]
    for f in cases:
        for name in ("grad", "jacrev", "jacfwd", "hessian"):
            assert_same_call(lambda: getattr(func, name)(f)(vec(2)), lambda: getattr(torch.func, name)(f)(vec(2)), name)


def test_auxiliary_tensors_of_the_caller_without_grad_mode():
    q = vec(3).requires_grad_() * 2
    f = lambda x, y: (x.square().sum(), (q, y, x * 2, q * x))
    with torch.no_grad():
        ours, theirs = (m.grad(f, has_aux=True)(vec(3), q)[1] for m in (func, torch.func))
    assert ours[0] is q and ours[1].requires_grad
    assert [t.requires_grad for t in ours] == [t.requires_grad for t in theirs]


def test_what_the_caller_has_computed_before_is_not_walked():
    """Or each step of a program would walk all steps before it.  The hook, which PyTorch's result does not run, tells."""
    c = vec(3).requires_grad_().sin()
    c.register_hook(lambda g: g * 2)
    c = c * 3
    p = vec(3).requires_grad_()  # with a short graph, beside a long one
    for x in (torch.ones(3, dtype=torch.float64), p):
        before = Calls.now()
        found = func.grad(lambda z: (z.sin() * c).sum())(x)
        assert (Calls.now() - before).native == 1
        assert found.requires_grad
        assert_same(found.detach(), (x.cos() * c).detach())
    assert_same(torch.autograd.grad(found.sum(), p)[0], -(p.sin() * c).detach())
    c = torch.fmax(vec(3).requires_grad_(), p)  # of which PyTorch's forward mode has another derivative
    for derive in (lambda: func.jacfwd(lambda z: z.sin() * c)(vec(3)), lambda: func.hessian(lambda z: z.sin().sum())(c)):
        before = Calls.now()
        derive()
        assert (Calls.now() - before).native == 1


def with_a_fork_of_the_generator(x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        m = torch.rand(2, dtype=x.dtype)
    return (x.sin() * m).max()


def drawing(x):
    return (x.sin() * torch.rand(2, dtype=x.dtype)).max()


RANDOM = {
    "jacfwd": lambda m, f: m.jacfwd(f)(X[0]),
    "jacfwd different": lambda m, f: m.jacfwd(f, randomness="different")(X[0]),
    "jacfwd same": lambda m, f: m.jacfwd(f, randomness="same")(X[0]),
    "by sample": lambda m, f: m.vmap(m.grad(f))(X),
    "by sample, different": lambda m, f: m.vmap(m.grad(f), randomness="different")(X),
    "one sample": lambda m, f: m.vmap(m.grad(f))(X[:1]),
    "gradient": lambda m, f: m.grad(f)(X[0]),
}


@pytest.mark.parametrize("f", [with_a_fork_of_the_generator, drawing])
@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_and_what_is_drawn_after_them(name, f):
    drawn = []

    def call(m):
        torch.manual_seed(1)
        try:
            return RANDOM[name](m, f)
        finally:
            drawn.append(torch.rand(3))

    assert_same_call(lambda: call(func), lambda: call(torch.func), name)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", ["jacfwd", "jacfwd different", "hessian", "one sample"])
def test_functions_that_come_to_draw(name):
    """Whether or not they drew nothing before."""
    dropout = torch.nn.Dropout(0.5)

    def f(x):
        return dropout(x.sin()).max()

    transforms = {
        "jacfwd": lambda m: m.jacfwd(f),
        "jacfwd different": lambda m: m.jacfwd(f, randomness="different"),
        "hessian": lambda m: m.hessian(f),
        "one sample": lambda m: m.vmap(m.grad(f)),
    }
    made = [transforms[name](m) for m in (func, torch.func)]
    x = X[:1] if name == "one sample" else X[0]
    for training in (False, False, True, True, False):
        dropout.train(training)
        before = Calls.now()
        state = torch.get_rng_state()
        if not training or name == "jacfwd different":
            torch.manual_seed(2)
            ours = made[0](x)
            torch.manual_seed(2)
            assert_same(ours, made[1](x))
            assert (Calls.now() - before).native == (0 if name == "jacfwd different" else 1)
        else:
            for transform in made:
                with pytest.raises(RuntimeError, match="random"):
                    transform(x)
            assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_of_the_functions_own_is_not_drawn_from_twice():
    for randomness in ("different", "same"):
        found = []
        for m in (func, torch.func):
            g = torch.Generator().manual_seed(3)
            f = lambda x: (x.sin() * torch.rand(2, generator=g, dtype=x.dtype)).max()
            found.append((m.vmap(m.grad(f), randomness=randomness)(X), torch.rand(2, generator=g)))
        assert_same(*found)


def test_running_statistics_are_updated_once():
    x = vec(5, 4)
    for name, norm in (("jacfwd", "batch_norm"), ("hessian", "batch_norm"), ("jacfwd", "instance_norm")):
        statistics = []
        for m in (func, torch.func):
            mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
            of = getattr(torch.nn.functional, norm)
            data = x if norm == "batch_norm" else x[..., None] * vec(2)
            scale = lambda w: w if norm == "batch_norm" else w[:, None]
            getattr(m, name)(lambda w: of(data * scale(w), mean, var, None, None, True).sum().float())(vec(4))
            statistics.append((mean, var))
        assert_same(*statistics, where=f"{name} {norm}")


def test_values_without_a_derivative_in_forward_mode():
    both_ways = lambda x: (x.sin() * x.data).sum()
    for name in ("hessian", "jacfwd"):
        assert_same(getattr(func, name)(both_ways)(vec(3)), getattr(torch.func, name)(both_ways)(vec(3)))


def test_auxiliary_output_made_by_a_thread_of_the_function():
    def f(x):
        made = []
        thread = threading.Thread(target=lambda: made.append(x.sin()))
        thread.start()
        thread.join()
        return x.cos().sum(), made[0]

    for name in ("grad", "jacrev"):
        assert not getattr(func, name)(f, has_aux=True)(vec(3))[1].requires_grad


def in_a_thread(function):
    """What `function` returns, run by another thread, as PyTorch's backward pass on a GPU is: its nodes are numbered apart."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.parametrize("own", [False, True], ids=["of the argument", "of the caller"])
def test_auxiliary_results_that_another_thread_computed(own):
    """Without grad mode only what was there before keeps its history."""
    w = in_a_thread(lambda: X[0].clone().requires_grad_() * 2)
    f = lambda x: ((x**2).sum(), w if own else in_a_thread(lambda: x.sin() * 2))
    with torch.no_grad():
        found, aux = func.grad(f, has_aux=True)(X[0])
    assert_same(found, 2 * X[0])
    assert aux.requires_grad == own


def test_hooks_on_what_another_thread_computed():
    """They run where the function is differentiated, and leave with it."""
    calls = []

    def f(x):
        y = in_a_thread(lambda: x.exp())  # its derivative goes through itself
        y.register_hook(lambda g: calls.append(len(g)))
        return y.sum()

    x = X[0].clone().requires_grad_()
    g = func.grad(f)(x)
    assert len(calls) == 1
    assert_same(torch.autograd.grad(g.sum(), x)[0], x.detach().exp())
    assert len(calls) == 1


def test_tensors_of_a_transform_that_another_thread_is_in():
    """There is no level there that they belong to: an error, as PyTorch's."""
    found = []

    def f(x):
        def derive():
            for m in (func, torch.func):
                with pytest.raises(RuntimeError):
                    m.grad(lambda z: (z**3).sum())(x)
                found.append(m)

        in_a_thread(derive)
        return (x**2).sum()

    assert_same(torch.func.grad(f)(X[0]), 2 * X[0])
    assert found == [func, torch.func]


@pytest.mark.parametrize("form", ["grad", "jacrev", "jacfwd", "hessian"])
def test_tensors_of_inference_mode(form):
    with torch.inference_mode():
        x = torch.rand(1, 3, dtype=torch.float64)
    f = lambda x: (x**3).sum()
    for call in (lambda m: getattr(m, form)(f)(x), lambda m: m.vmap(getattr(m, form)(f))(x)):
        assert_same(call(func), call(torch.func))


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("form", ["grad", "grad_and_value"])
def test_gradients_of_a_complex_number_are_an_error(form, aux):
    def f(x):
        value = torch.complex(x, x).sum()
        return (value, x) if aux else value

    for call in (
        lambda m: getattr(m, form)(f, has_aux=aux)(torch.rand(3)),
        lambda m: m.vmap(getattr(m, form)(f, has_aux=aux))(torch.rand(2, 3)),
        lambda m: m.jacrev(lambda x: getattr(m, form)(f, has_aux=aux)(x))(torch.rand(3)),
    ):
        assert_same_call(lambda: call(func), lambda: call(torch.func), form)
