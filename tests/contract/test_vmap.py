"""Functions whose operators vmap rewrites, repeats or cannot run: derivatives are those of PyTorch's own order of things."""

import gc
import math
import types
import weakref

import numpy as np
import pytest
import torch
import wengert
from support.compare import Tolerance, assert_same, assert_same_call
from support.native import Calls
from wengert import func
from wengert.func import _watch

F = torch.nn.functional
TIES = torch.tensor([[1.0, 2.0, 2.0, 0.0], [3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
FORMS = ["jacrev", "jacfwd", "grad", "hessian"]


def both(call):
    return assert_same_call(lambda: call(func), lambda: call(torch.func), "")


def scalar(f):
    return lambda *xs: (f(*xs) ** 2).sum()


AT_TIES = {
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "median": lambda x: x.median(),
    "nanmedian": lambda x: x.nanmedian(),
    "max of a function": lambda x: torch.relu(x - 2.5).max() * x,
    "max along an axis": lambda x: x.max(0).values,
    "max of two axes": lambda x: x.reshape(2, 2).max(),
    "amax": lambda x: x.amax(),
    "aminmax": lambda x: torch.stack(x.aminmax()),
    "sort": lambda x: x.sort().values,
    "topk": lambda x: x.topk(2).values,
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "norm": lambda x: (x + 1).norm(),
    "infinity norm": lambda x: x.norm(float("inf")),
    "prod": lambda x: x.prod(),
    "cumprod": lambda x: x.cumprod(0),
    "cummax": lambda x: x.cummax(0).values,
    "logsumexp": lambda x: x.logsumexp(0),
    "max_pool1d": lambda x: F.max_pool1d(x[None], 2),
    "clamp": lambda x: x.clamp(0, 2),
    "select_scatter": lambda x: torch.zeros(4, 2, dtype=x.dtype).select_scatter(x, 1, 1),
    "slice_scatter": lambda x: torch.zeros(6, dtype=x.dtype).slice_scatter(x.sin(), 0, 1, 5),
    "diagonal_scatter": lambda x: torch.zeros(4, 4, dtype=x.dtype).diagonal_scatter(x),
    "index_copy": lambda x: torch.ones(5, dtype=x.dtype).index_copy(0, torch.tensor([3, 1, 0, 4]), x),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.5) * x,
    "std": lambda x: (x + torch.arange(4)).std(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", AT_TIES)
def test_ties(name, form):
    f = AT_TIES[name] if form in ("jacrev", "jacfwd") else scalar(AT_TIES[name])
    both(lambda m: m.vmap(getattr(m, form)(f))(TIES))
    both(lambda m: m.vmap(getattr(m, form)(f), in_dims=1, out_dims=-1)(TIES.T))


def _scaled_in_place(x):
    y = x.exp()
    z = y * y
    y.mul_(3)
    return z


SYMMETRIC = torch.tensor([[4.0, 1.0, 0.5], [0.7, 3.0, 0.2], [0.1, 0.3, 5.0]], dtype=torch.float64)
FORWARD = {
    "fmax": (lambda x: torch.fmax(x, x.flip(0)), TIES),
    "fmin": (lambda x: torch.fmin(x, x.flip(0)), TIES),
    "prelu": (lambda x: F.prelu(x - 2, x[:1]), TIES),
    "polar": (lambda x: torch.view_as_real(torch.polar(x, x.cos())), TIES),
    "scatter_reduce": (lambda x: x.scatter_reduce(0, torch.tensor([1, 1, 0, 0]), x, "amax"), TIES),
    "cholesky": (torch.linalg.cholesky, torch.stack([SYMMETRIC, 2 * SYMMETRIC])),
    "eigvalsh": (lambda x: torch.linalg.eigh(x)[0], torch.stack([SYMMETRIC, 2 * SYMMETRIC])),
    "scatter": (lambda x: torch.zeros(3, dtype=x.dtype).scatter(0, torch.tensor([0, 0, 1, 2]), x), TIES),
    "index_put": (lambda x: torch.zeros(3, dtype=x.dtype).index_put((torch.tensor([0, 0, 1, 2]),), x), TIES),
    "where": (lambda x: torch.where(x > 0.5, x.sqrt(), x), TIES),
    "masked_fill": (lambda x: x.sqrt().masked_fill(x == 0, 1.0), TIES),
    "in-place on the input": (lambda x: x.mul_(2).sin(), TIES + 0),
    "in-place on what is saved": (lambda x: _scaled_in_place(x), TIES),
    "triangular_solve": (lambda x: torch.triangular_solve(x[:1].mT, x)[0], torch.stack([SYMMETRIC, 2 * SYMMETRIC])),
}


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("form", ["jacfwd", "hessian"])
@pytest.mark.parametrize("name", FORWARD)
def test_where_forward_mode_is_not_the_transpose_of_reverse_mode(name, form):
    f, x = FORWARD[name]
    f = f if form == "jacfwd" else scalar(f)
    both(lambda m: getattr(m, form)(f)(x[0].clone()))
    both(lambda m: m.vmap(getattr(m, form)(f))(x.clone()))


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("form", FORMS)
def test_random_numbers_are_drawn_once_however_often_the_function_runs(form, randomness):
    """Also where PyTorch evaluates the function again; its forward mode is a vmap and refuses them."""

    def call(m, f):
        torch.manual_seed(5)
        f = f if form in ("jacrev", "jacfwd") else scalar(f)
        return [m.vmap(getattr(m, form)(f), randomness=randomness)(TIES) for _ in range(2)], torch.rand(2)

    both(lambda m: call(m, lambda x: x.sin() * torch.rand(4, dtype=x.dtype)))
    both(lambda m: call(m, lambda x: x.max() * torch.rand(4, dtype=x.dtype)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_random_numbers_that_only_some_calls_may_draw():
    f = lambda x: x.take(torch.tensor([0, 1])) * torch.rand(2, dtype=x.dtype)
    mapped = {m: {r: m.vmap(m.jacrev(f), randomness=r) for r in ("different", "error")} for m in (func, torch.func)}

    def call(m, randomness, x):
        torch.manual_seed(5)
        return mapped[m][randomness](x), torch.rand(2)

    for randomness, x in (("different", TIES), ("error", TIES), ("error", TIES[:1])):
        both(lambda m, x=x, r=randomness: call(m, r, x))


@pytest.mark.parametrize("form", FORMS)
def test_random_numbers_at_a_point(form):
    def call(m):
        torch.manual_seed(5)
        return getattr(m, form)(f if form in ("jacrev", "jacfwd") else scalar(f))(TIES[0]), torch.rand(2)

    f = lambda x: x.sin() * torch.rand(4, dtype=x.dtype)
    both(call)
    torch.manual_seed(5)
    ours = func.jacfwd(f, randomness="same")(TIES[0])
    torch.manual_seed(5)
    assert_same(ours, torch.func.jacfwd(f, randomness="same")(TIES[0]))


START = torch.tensor(1)
NOT_UNDER_VMAP_ALONE = {
    "a tensor as start": lambda x: torch.narrow(x, 0, START, 2) ** 2,
    "column_stack": lambda x: torch.column_stack([x, x.sin()]),
    "a value read": lambda x: x * x[0].item(),
    "a branch on a value": lambda x: x * 2 if x.sum() > 0 else x.sin(),
    "in-place on what is shared": lambda x: torch.zeros(4, dtype=x.dtype).add_(x),
    "random numbers": lambda x: x * torch.rand(4, dtype=x.dtype),
    "the user's own error": lambda x: x[9],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NOT_UNDER_VMAP_ALONE)
def test_what_does_not_run_under_vmap_alone(name, form):
    f = NOT_UNDER_VMAP_ALONE[name]
    f = f if form in ("jacrev", "jacfwd") else scalar(f)
    both(lambda m: m.vmap(getattr(m, form)(f))(TIES))


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this PyTorch has no chunked loss")
def test_a_chunked_loss_keeps_its_history():
    """An operator in Python that asks its arguments whether they require grad; torch refuses it in this order."""
    w, t = torch.rand(3, 4, dtype=torch.float64), torch.tensor([0, 2])
    options = torch.nn.LinearCrossEntropyOptions()
    f = lambda x: F.linear_cross_entropy(x, w, t, options=options)
    x = torch.rand(2, 2, 4, dtype=torch.float64)
    ours = func.vmap(func.jacrev(f))(x)
    assert_same(ours, torch.stack([torch.autograd.functional.jacobian(f, s) for s in x]))


@pytest.mark.parametrize("form", ["jacrev", "jacfwd", "grad", "grad_and_value"])
def test_auxiliary_output_that_is_not_a_tensor(form):
    both(lambda m: m.vmap(getattr(m, form)(lambda x: (x.max(), "words"), has_aux=True))(TIES))


@pytest.mark.parametrize("form", FORMS)
def test_functions_that_ask_whether_a_tensor_requires_grad(form):
    f = lambda x: x.sin() if (x * 2).requires_grad else x.detach() * 3
    f = f if form in ("jacrev", "jacfwd") else scalar(f)
    both(lambda m: m.vmap(getattr(m, form)(f))(TIES))


class Rounding(torch.autograd.Function):
    """Straight through, with a vmap rule that computes the value alone."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g * 2

    @staticmethod
    def vmap(info, in_dims, x):
        return x.round(), in_dims[0]


class Sorting(torch.autograd.Function):
    """Through numpy, with a vmap rule that applies the Function to the whole batch."""

    @staticmethod
    def forward(x, axis):
        order = torch.from_numpy(np.argsort(x.detach().cpu().numpy(), axis=axis)).to(x.device)
        return torch.from_numpy(np.sort(x.detach().cpu().numpy(), axis=axis)).to(x), order

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1].argsort(inputs[1]))
        ctx.axis = inputs[1]

    @staticmethod
    def backward(ctx, g, _):
        return g.gather(ctx.axis, ctx.saved_tensors[0]), None

    @staticmethod
    def vmap(info, in_dims, x, axis):
        return Sorting.apply(x.movedim(in_dims[0], 0), axis % (x.dim() - 1) + 1), (0, 0)


class Generated(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


@pytest.mark.parametrize("form", ["jacrev", "grad"])
@pytest.mark.parametrize("f", [lambda x: Rounding.apply(x * 1.3), lambda x: Sorting.apply(x * 2, 0)[0], Generated.apply])
def test_autograd_functions_with_vmap_rules(f, form):
    f = f if form == "jacrev" else scalar(f)
    both(lambda m: m.vmap(getattr(m, form)(f))(TIES))


def test_custom_operators_with_vmap_rules():
    @torch.library.custom_op("wengert_tests::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    doubled.register_autograd(lambda ctx, g: g * 3)  # on purpose not what it computes
    for rule in (None, lambda info, in_dims, x: (x * 2, in_dims[0]), lambda info, in_dims, x: (doubled(x), in_dims[0])):
        if rule is not None:
            doubled.register_vmap(rule)
        f = lambda x: doubled(x.sin())
        ours = func.vmap(func.jacrev(f))(TIES)
        assert_same(ours, torch.stack([torch.autograd.functional.jacobian(f, s) for s in TIES]))


REPEATED = torch.tensor([0, 2, 0])
# What vmap writes as other operators that have the same derivative everywhere.
KEPT = {
    **{f"norm {p}": lambda x, p=p: torch.norm(x, p) for p in (0, 0.5, 1, 1.5, 2, 3, math.inf, -math.inf)},
    **{f"dist {p}": lambda x, p=p: torch.dist(x, x.flip(0), p) for p in (0.5, 1, 2, 3, math.inf)},
    "index_copy, copied": lambda x: torch.ones_like(x).index_copy(0, REPEATED, x[:3].sin()),
    "index_copy, kept": lambda x: x.sin().index_copy(0, REPEATED, torch.ones(3, dtype=x.dtype)),
    "index_copy, rows": lambda x: x.reshape(2, 2).index_copy(1, REPEATED[:2] // 2, x.reshape(2, 2) ** 2),
    "max_pool2d": lambda x: F.max_pool2d(x.reshape(1, 1, 2, 2), 2, stride=1, padding=1),
    "max_pool2d, of no batch": lambda x: F.max_pool2d(x.reshape(1, 4, 1).sin(), (3, 1), stride=1, ceil_mode=True),
    "max_pool2d, dilated": lambda x: F.max_pool2d(x.tile(4).reshape(2, 1, 2, 4), 2, dilation=(1, 2)),
}


@pytest.mark.parametrize("form", ["jacrev", "grad", "hessian"])
@pytest.mark.parametrize("name", KEPT)
def test_operators_that_vmap_writes_as_others_of_the_same_derivative(name, form):
    f = KEPT[name] if form == "jacrev" else scalar(KEPT[name])
    loop = getattr(torch.autograd.functional, "hessian" if form == "hessian" else "jacobian")
    ours = func.vmap(getattr(func, form)(f))
    for x in (TIES, TIES.flip(1) - 1, torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4)):
        expected = torch.stack([loop(f, s) for s in x])
        before = Calls.now()
        got = ours(x)
        calls = Calls.now() - before
        assert form == "hessian" or calls.native == 1
        if calls.native:  # forward mode may be PyTorch's
            assert_same(got, expected, f"{name}, {form}")


LOOPED = {
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, torch.tensor(1)),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, torch.ones(4, dtype=x.dtype)),
    "masked_fill by a tensor": lambda x: x.masked_fill(x > 1, x[0]),
    "take": lambda x: x.take(torch.tensor([0, 0, 2])),
    "quantile": lambda x: x.quantile(0.3),
    "renorm": lambda x: x.reshape(2, 2).renorm(2, 0, 1.0),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("form", ["jacrev", "grad"])
@pytest.mark.parametrize("name", LOOPED)
def test_operators_without_a_batching_rule(name, form):
    f = LOOPED[name] if form == "jacrev" else scalar(LOOPED[name])
    x = torch.linspace(-1, 2, 24, dtype=torch.float64).reshape(6, 4)
    before = Calls.now()
    both(lambda m: m.vmap(getattr(m, form)(f))(x))
    assert (Calls.now() - before).fallback.total() == 1  # B subgraphs are not differentiated


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_torch_cannot_map_in_its_own_order_is_answered_sample_by_sample():
    cell = torch.nn.GRUCell(4, 3).double()
    f = lambda x: cell(x[None])[0]
    x = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4)
    each = lambda form: torch.stack([getattr(torch.func, form)(f)(s) for s in x])
    with pytest.raises(RuntimeError):
        torch.func.vmap(torch.func.jacrev(f))(x)
    mapped = func.vmap(func.jacrev(f))
    assert_same(mapped(x).detach(), each("jacrev").detach())
    assert_same(mapped(x).detach(), each("jacrev").detach())
    assert_same(func.vmap(func.jacrev(f), in_dims=1, out_dims=1)(x.T).detach(), each("jacrev").detach().movedim(0, 1))
    jacobian, aux = func.vmap(func.jacrev(lambda x: (f(x), {"twice": x * 2}), has_aux=True))(x)
    assert_same((jacobian.detach(), aux), (each("jacrev").detach(), {"twice": x * 2}))
    total = lambda x: f(x).sum()
    assert_same(func.vmap(func.grad(total))(x).detach(), each("jacrev").detach().sum(1))


def test_a_function_that_changes_is_not_taken_for_what_it_was():
    """The graph has another structure, so that what was seen of the function no longer counts."""
    now = {}
    f = lambda x: x.sin().max() if now["whole"] else x.sin()
    mapped = [m.vmap(m.jacrev(f)) for m in (func, torch.func)]
    for now["whole"] in (False, False, True, True, False):
        assert_same(*(g(TIES) for g in mapped))
        assert_same(*(g(TIES[:2]) for g in mapped))


def square(x):
    m = x.reshape(2, 2)
    return m @ m.mT + 2 * torch.eye(2, dtype=x.dtype)


# torch.func disagrees with its own row loop about all of them.
MISTAKEN = {
    "slogdet": lambda x: torch.linalg.slogdet(square(x))[1],
    "det": lambda x: torch.linalg.det(square(x)),
    "solve": lambda x: torch.linalg.solve(square(x), x[:2]).square().sum(),
    "huber at the kink": lambda x: F.huber_loss(x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("form", ["hessian", "jacfwd"])
@pytest.mark.parametrize("name", MISTAKEN)
def test_a_call_does_not_depend_on_the_calls_before_it(name, form):
    """Strides are part of a graph's structure: every other call has a graph that has not been watched before."""
    f = MISTAKEN[name]
    mapped, loop = func.vmap(getattr(func, form)(f)), torch.autograd.functional
    loop = loop.hessian if form == "hessian" else loop.jacobian
    before = Calls.now()
    for k in range(5):
        x = torch.linspace(-2, 2.5 + k // 2, 12, dtype=torch.float64).reshape(4, 3).t()
        x = x.round() if "kink" in name else x
        x = x.contiguous() if k % 2 else x
        expected = torch.stack([loop(f, sample) for sample in x])
        for _ in range(2):
            assert_same(mapped(x), expected, f"call {k}")
    calls = Calls.now() - before
    assert calls.native == 10 and not calls.fallback


def test_a_function_whose_graph_never_stays_the_same_is_watched_every_time():
    runs = []

    def f(x):
        runs.append(1)
        for _ in runs:
            x = x.sin()
        return x

    mapped = func.vmap(func.jacrev(f))
    for _ in range(20):
        mapped(TIES)
    assert len(runs) < 30  # nine of them were found to be unknown and ran again


def test_random_numbers_are_drawn_once_where_the_function_runs_again():
    now = {}
    f = lambda x: x * torch.rand(4, dtype=x.dtype) * (2 if now["twice"] else x)
    mapped = [m.vmap(m.jacrev(f), randomness="different") for m in (func, torch.func)]
    for now["twice"] in (False, True, False):
        results = []
        for g in mapped:
            torch.manual_seed(3)
            results.append(g(TIES))
        assert_same(*results)


@pytest.mark.parametrize("name", ["jacfwd", "hessian", "vmap(jacrev)"])
def test_random_numbers_of_a_function_that_seeds_itself(name):
    """It leaves the generator as it found it from the second call on."""

    def f(x):
        torch.manual_seed(7)
        return (torch.svd_lowrank(x, q=2)[1] * torch.rand(2, dtype=x.dtype)).sum()

    x = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3).sin()
    for _ in range(3):
        for m in (func, torch.func):
            mapped = m.vmap(m.jacrev(f)) if name.startswith("vmap") else getattr(m, name)(f)
            with pytest.raises(RuntimeError, match="called random operation"):
                mapped(x[None] if name.startswith("vmap") else x)
    torch.manual_seed(11)
    func.jacfwd(torch.sin)(x[0])
    assert torch.initial_seed() == 11
    expected = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), expected)


def test_what_has_been_watched_runs_natively_for_any_batch_size():
    f = lambda x: x.sin() * x.prod()
    before = Calls.now()
    for size in (5, 5, 7, 2, 5):
        x = torch.linspace(0.5, 1.5, size * 3, dtype=torch.float64).reshape(size, 3)
        assert_same(func.vmap(func.jacrev(f))(x), torch.func.vmap(torch.func.jacrev(f))(x))
    calls = Calls.now() - before
    assert calls.native == 5 and not calls.fallback


def test_verdicts_are_kept_for_methods_and_go_with_their_owner():
    from wengert.func._watch import _verdicts, verdict_of

    class Model:
        def step(self, x):
            return x.sin()

    model, other = Model(), Model()
    assert verdict_of(model.step) is verdict_of(model.step) is not verdict_of(other.step)
    count = len(_verdicts)
    del model, other
    assert len(_verdicts) == count - 2


def test_functions_run_once_where_the_engine_answers():
    runs = []

    def f(x):
        runs.append(1)
        return x.sin()

    mapped = func.vmap(func.jacrev(f))
    mapped(TIES), mapped(TIES)
    assert len(runs) == 2


def test_the_watch_ends_with_an_interrupt():
    def f(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        func.vmap(func.jacrev(f))(TIES)
    assert_same(func.vmap(func.jacrev(torch.sin))(TIES), torch.diag_embed(TIES.cos()), tol=Tolerance())
    assert wengert._native.C.end_vmap_watch() == ""


def test_what_is_known_of_methods_leaves_with_their_objects():
    class Scale:
        pass

    def once():
        owner = Scale()
        owner.weight = 2.0
        owner.f = types.MethodType(lambda self, x: (x * owner.weight).sin(), owner)
        func.vmap(func.jacrev(owner.f))(torch.rand(4, 3))
        return weakref.ref(owner)

    owners = [once() for _ in range(3)]
    gc.collect()
    assert not any(owner() for owner in owners)


def solved(b, s):
    """Of b, which all samples share, and a triangular matrix for each."""
    return torch.linalg.solve_triangular(s.tril() + 3 * torch.eye(3, dtype=s.dtype), b, upper=False).square().sum()


def test_samples_that_would_all_go_through_a_node_for_each():
    """PyTorch's way takes one pass for all; it is known from the third call on, when the function runs once only."""
    calls = []

    def loss(b, s):
        calls.append(0)
        return solved(b, s)

    b, s = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 3, 3, dtype=torch.float64)
    expected = torch.func.vmap(torch.func.grad(solved), (None, 0))(b, s)
    runs = []
    for _ in range(4):
        calls.clear()
        wengert.reset_stats()
        torch.testing.assert_close(wengert.func.vmap(wengert.func.grad(loss), (None, 0))(b, s), expected)
        (reason,) = wengert.stats().fallback["func.vmap(grad)"]
        assert "samples that would all be given to LinalgSolveTriangularBackward0" in reason
        runs.append(len(calls))
    assert runs == [2, 2, 1, 1]
    torch.testing.assert_close(wengert.func.vmap(wengert.func.grad(loss, 1), (None, 0))(b, s),
                               torch.func.vmap(torch.func.grad(solved, 1), (None, 0))(b, s))  # fmt: skip
    assert wengert.stats().native == {"func.vmap(grad)": 1}


def test_what_one_request_is_refused_for_says_nothing_of_another():
    """Refusals are remembered: not for other numbers, keywords or texts, nor where PyTorch has an error instead."""
    grid = torch.rand(1, 3, 3, 2) * 2 - 1

    def f(x, k):
        if k == "bad":
            raise RuntimeError("bad k")
        return F.grid_sample(x[None], grid, align_corners=False).sum()

    x = torch.randn(5, 1, 4, 4)
    call = lambda k: func.vmap(func.jacfwd(f), (0, None))(x, k)  # which PyTorch's forward mode does not know
    before = call("good")
    for _ in range(3):
        with pytest.raises(RuntimeError, match="bad k"):
            call("bad")
    torch.testing.assert_close(call("good"), before, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="argnums must be int or Tuple"):
        func.vmap(func.jacrev(f, argnums=[0]), (0, None))(x, "good")


def test_a_request_that_was_refused_is_asked_again_where_pytorch_cannot_answer_it():
    broken = [True]
    grid = torch.rand(1, 3, 3, 2) * 2 - 1

    def f(x):
        if broken[0]:
            raise RuntimeError("broken")
        return F.grid_sample(x[None], grid, align_corners=False).sum()

    x = torch.randn(5, 1, 4, 4)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="broken"):
            func.vmap(func.jacfwd(f))(x)
    broken[0] = False
    torch.testing.assert_close(func.vmap(func.jacfwd(f))(x), torch.func.vmap(torch.func.jacrev(f))(x))


REFUSED = {  # as the operator is rewritten, and as all samples would go through a node for each
    "rewritten": (lambda b, s: s.max() * b.sum(), 1),
    "refused": (lambda b, s: solved(b, s), 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_functions_written_anew_on_every_call_are_known_by_their_code(name):
    f, argnum = REFUSED[name]
    calls, runs = [], []
    b, s = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 3, 3, dtype=torch.float64)
    expected = torch.func.vmap(torch.func.grad(f, argnum), (None, 0))(b, s)

    def derive(scale):
        loss = lambda b, s: (calls.append(0), scale * f(b, s))[1]
        return func.vmap(func.grad(loss, argnum), (None, 0))(b, s)

    for step in range(5):
        calls.clear()
        torch.testing.assert_close(derive(1.0 + step), (1 + step) * expected)
        runs.append(len(calls))
    assert runs == [2, 2, 1, 1, 1]


def test_what_a_closure_holds_is_part_of_what_is_known():
    make = lambda f, k=0: lambda x: f(x).sum() + k
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    largest = lambda x: x.max()
    wengert.reset_stats()
    for _ in range(3):
        both(lambda m: m.vmap(m.grad(make(largest)))(x))
    assert not wengert.stats().native
    wengert.reset_stats()
    for f in (torch.sin, lambda x: x.cos(), lambda x: F.avg_pool2d(x, 2)):
        both(lambda m: m.vmap(m.grad(make(f)))(x))  # noqa: B023
    assert wengert.stats().native == {"func.vmap(grad)": 3}


def test_functions_that_are_taken_for_alike_need_not_be():
    """Where to go first is remembered, not what comes of it."""
    held = []
    grid = torch.rand(1, 3, 3, 2) * 2 - 1

    def raises(x):
        raise RuntimeError("mine")

    def derive(m, f, form="grad"):
        held[:] = [f]  # a list looks like any other
        return m.vmap(getattr(m, form)(lambda x: held[0](x).sum()))(x)

    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    largest = lambda x: x.max()
    others = [torch.sin, raises, torch.cos, largest, lambda x: x.max() * x, lambda x: x * x.sum().item(), largest]
    for f in [largest] * 3 + others:
        both(lambda m: derive(m, f))  # noqa: B023
    x = torch.randn(5, 1, 4, 4)
    sample = lambda x: F.grid_sample(x[None], grid, align_corners=False)  # which PyTorch's forward mode does not know
    for f in (torch.nn.functional.relu, largest, largest, largest, sample):
        held[:] = [f]
        ours = func.vmap(func.jacfwd(lambda x: held[0](x).sum()))(x)
        torch.testing.assert_close(ours, torch.func.vmap(torch.func.jacrev(lambda x: held[0](x).sum()))(x))


def test_what_is_known_of_code_goes_with_it():

    x = torch.randn(4, 1, 6, 6)
    before = len(_watch._refusals)
    names = {}
    exec("def f(x): return x.max()", names)
    func.vmap(func.grad(names["f"]))(x)
    assert len(_watch._refusals) == before + 1
    names.clear()
    gc.collect()
    assert len(_watch._refusals) <= before


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_random_numbers_after_an_error_of_a_function_that_was_refused(randomness):
    """PyTorch answers first, the engine then, PyTorch again: as if the function had run once."""
    broken, state = [False], []

    def loss(b, s):
        draw = torch.rand(2)
        if broken[0]:
            raise RuntimeError("mine")
        return solved(b, s) * draw.sum()

    b, s = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 3, 3, dtype=torch.float64)
    for broken[0] in (False, False, False, True):
        for m in (func, torch.func):
            torch.manual_seed(1)
            try:
                m.vmap(m.grad(loss), (None, 0), randomness=randomness)(b, s)
            except RuntimeError as error:
                assert str(error) == "mine"
            state.append(torch.get_rng_state())
        assert torch.equal(*state[-2:])


def test_grad_mode_where_the_generators_cannot_be_read(monkeypatch):
    def fails(flat):
        raise MemoryError

    monkeypatch.setattr("wengert.func._vmap._random_state", fails)
    with torch.no_grad():
        with pytest.raises(MemoryError):
            func.vmap(func.grad(lambda x: x.sin().sum()), randomness="same")(torch.ones(2, 3))
        assert not torch.is_grad_enabled()


def test_an_error_of_the_functions_own_kind_is_not_tried_again():
    """A handler of signals, say, raises it once."""

    class Timeout(Exception):
        pass

    runs = []

    def f(x):
        runs.append(0)
        if len(runs) == 1:
            raise Timeout
        return x.sin().sum()

    for derive in (func.grad, func.jacfwd):
        runs.clear()
        with pytest.raises(Timeout):
            func.vmap(derive(f))(torch.ones(3, 2))
        assert len(runs) == 1


def test_an_error_of_one_call_says_nothing_of_the_next():
    """PyTorch's vmap is tried again, although it raised an error where the samples one by one did too."""
    w = torch.rand(2, 3)
    f = lambda x: ((x @ w) * (x @ w).max()).sum()
    derive, x = func.vmap(func.grad(f)), torch.rand(5, 2)
    derive(x)
    with pytest.raises(RuntimeError):
        derive(torch.rand(5, 4))
    assert not _watch.verdict_of(f).one_by_one
    assert_same(derive(x), torch.func.vmap(torch.func.grad(f))(x))


NOT_SCALAR = {
    "grad of grad": lambda m: m.grad(m.grad(lambda x: (x**3).sum())),
    "grad of jacrev": lambda m: m.grad(m.jacrev(torch.sin)),
    "grad of hessian": lambda m: m.grad(m.hessian(lambda x: x.prod())),
    "grad of a pair": lambda m: m.grad(m.grad_and_value(lambda x: (x**3).sum())),
    "grad beside a value": lambda m: m.grad(m.grad_and_value(lambda x: (x**3).sum()), has_aux=True),
    "grad of a dict": lambda m: m.grad(m.jacrev(lambda x: {"a": x.sum()})),
    "no auxiliary value": lambda m: m.jacrev(m.jacrev(torch.sin), has_aux=True),
    "jacrev of a pair": lambda m: m.jacrev(m.grad_and_value(lambda x: (x**3).sum())),
    "jacfwd of a dict": lambda m: m.jacfwd(m.jacrev(lambda x: {"a": x.sin()})),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", NOT_SCALAR)
def test_what_a_transform_inside_returns_is_checked(name, size):
    x = torch.rand(size, 2, dtype=torch.float64)
    both(lambda m: m.vmap(NOT_SCALAR[name](m))(x))


def test_constants_of_inference_mode():
    with torch.inference_mode():
        a = torch.randn(3)
    for form in ("grad", "jacrev"):
        both(lambda m: getattr(m, form)(lambda x: (x * a).sum())(torch.ones(3)))  # noqa: B023


def test_lists_of_functions_tell_functions_of_the_same_code_apart():
    """torch.func has no right answer for the second: it must not be asked since it was for the first."""
    x = torch.randn(3, 6, dtype=torch.float64)
    volume = lambda x: torch.linalg.slogdet(3 * torch.eye(3, dtype=x.dtype) + torch.outer(x[:3], x[3:]))[1] * x

    def make(layers):
        def f(x):
            for layer in layers:
                x = layer(x)
            return x

        return f

    rows = torch.stack([torch.autograd.functional.jacobian(volume, sample) for sample in x])
    for layers in ([lambda x: x.take(torch.tensor([0, 0, 1]))], {0: lambda x: x.median()}.values()):
        for _ in range(2):
            func.vmap(func.jacfwd(make(list(layers))))(x)
        torch.testing.assert_close(func.vmap(func.jacfwd(make([volume])))(x), rows)
