"""What a result is, beside its numbers: memory of its own, contiguous, resizable."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
import wengert
from support.compare import assert_same, leaves
from torch import Tensor
from torch.autograd import functional as torch_functional
from wengert import _C as C

D = torch.float64
BUFFER = torch.arange(1.0, 4.0, dtype=D)


class Gives(torch.autograd.Function):
    """x + y, whose backward gives what `backward` makes of the cotangent and of what was saved."""

    gives = staticmethod(lambda g, x, y: (g, g))

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x + y

    @staticmethod
    def backward(ctx, g):
        return Gives.gives(g, *ctx.saved_tensors)


GIVES = {
    "the cotangent twice": lambda g, x, y: (g, g),
    "what it saved": lambda g, x, y: (x, y),
    "one saved tensor twice": lambda g, x, y: (x, x),
    "a buffer": lambda g, x, y: (BUFFER, BUFFER),
    "views of one tensor": lambda g, x, y: (lambda z: (z[:3], z[3:]))(torch.cat([g, 2 * g])),
    "an expanded number": lambda g, x, y: (g.sum().expand(3), g.sum().expand(3)),
    "memory of numpy": lambda g, x, y: (torch.from_numpy(g.detach().cpu().numpy().copy()).to(g), g),
}


def span(t: Tensor) -> tuple[int, int]:
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def assert_own_memory(results: list[Tensor], others: list[Tensor]) -> None:
    for k, result in enumerate(results):
        begin, end = span(result)
        for other in (*results[:k], *others):
            first, last = span(other)
            assert end <= first or last <= begin, f"result {k} lies in the memory of another tensor"


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("gives", GIVES)
def test_results_lie_in_memory_of_their_own(gives, create_graph, monkeypatch):
    monkeypatch.setattr(Gives, "gives", GIVES[gives])
    x, y = (torch.rand(3, dtype=D, requires_grad=True) for _ in range(2))
    ct = torch.rand(3, dtype=D)
    fn = Gives.apply
    calls = {
        "jacobian": lambda: wengert.jacobian(fn, (x, y), create_graph=create_graph),
        "graph jacobian": lambda: wengert.jacobian(fn(x, y), (x, y), create_graph=create_graph),
        "grad": lambda: wengert.grad(fn(x, y), (x, y), ct, create_graph=create_graph),
        "grad of a sum": lambda: wengert.grad(fn(x, y).sum(), (x, y), create_graph=create_graph),
        "batched grad": lambda: wengert.grad(fn(x, y), (x, y), torch.eye(3, dtype=D), is_grads_batched=True),
        "vjp": lambda: wengert.vjp(fn, (x, y), ct, create_graph=create_graph)[1],
        "func.jacrev": lambda: wengert.func.jacrev(fn, (0, 1))(x.detach(), y.detach()),
    }
    before = [t.detach().clone() for t in (x, y, ct, BUFFER)]
    for name, call in calls.items():
        found = leaves(call())
        assert_own_memory(found, [x, y, ct, BUFFER])
        with torch.no_grad():
            for t in found:
                t.fill_(7)
        assert_same([t.detach() for t in (x, y, ct, BUFFER)], before, f"{name} written to")


@pytest.mark.parametrize("fn", [torch.sin, lambda x: x + 1, lambda x: x.view(2, -1).t()])
def test_a_gradient_is_no_view_of_its_cotangent(fn):
    x = torch.rand(4, dtype=D, requires_grad=True)
    y = fn(x)
    ct = torch.rand_like(y)
    for create_graph in (False, True):
        assert_own_memory(list(wengert.grad(y, x, ct, True, create_graph)), [x, y, ct])


SQUARE = torch.rand(4, 4, dtype=D) + 4 * torch.eye(4, dtype=D)
IMAGES = torch.rand(2, 3, 6, 6, dtype=D)
CONTIGUOUS = {
    "solve": (lambda x: torch.linalg.solve(x, x.t()), SQUARE),
    "cholesky": (lambda x: torch.linalg.cholesky(x @ x.t()), SQUARE),
    "logdet": (torch.logdet, SQUARE),
    "transpose": (lambda x: x.t().sin(), SQUARE),
    "product": (lambda x: x.t() @ x, SQUARE),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q, q), torch.rand(1, 2, 3, 4, dtype=D)),
    "convolution": (lambda w: torch.conv2d(IMAGES, w), torch.rand(2, 3, 3, 3, dtype=D)),
    "channels last": (lambda x: torch.conv2d(x, IMAGES[:1, :, :3, :3]), IMAGES.contiguous(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", CONTIGUOUS)
def test_jacobians_and_hessians_are_contiguous(name, create_graph):
    fn, x = CONTIGUOUS[name]
    J = wengert.jacobian(fn, x, create_graph=create_graph)
    assert J.is_contiguous()
    if name != "attention":  # which has no second derivative
        assert wengert.hessian(lambda x: (fn(x) ** 2).sum(), x, create_graph=create_graph).is_contiguous()


@pytest.mark.parametrize("n", [3, 300])
def test_results_can_be_resized(n):
    x = torch.randn(n, dtype=D)
    J = wengert.jacobian(torch.sin, x)
    want = J.clone()
    J.resize_(n + 1, n)
    assert_same(J[:n], want, "after resizing")
    H = wengert.hessian(lambda x: x.sin().sum(), x)
    H.untyped_storage().resize_(2 * H.untyped_storage().nbytes())
    (g,) = wengert.grad(torch.sin(x.requires_grad_()).sum(), x)
    g.resize_(n + 1)


@pytest.mark.parametrize("hooked", [False, True])
def test_vectorised_with_an_empty_output_among_others(hooked):
    def fn(x, s):
        y = x * s
        if hooked:  # which is PyTorch's work
            y.register_hook(lambda g: g)
        return y, s * s, x.new_zeros(0) * s, x.new_ones(2)

    inputs = torch.rand(4, dtype=D), torch.rand((), dtype=D)
    got = wengert.jacobian(fn, inputs, vectorize=True)
    assert_same(got, torch_functional.jacobian(fn, inputs, vectorize=True), "vectorised")


class Refuses(torch.autograd.Function):
    """Its backward is nobody's business but that of who differentiates in what it was made from."""

    @staticmethod
    def forward(ctx, w):
        return w * 2

    @staticmethod
    def backward(ctx, g):
        raise AssertionError("a backward that PyTorch does not run")


@pytest.mark.parametrize("made", ["custom function", "hooks"])
def test_create_graph_runs_nothing_above_captured_tensors(made):
    """What is differentiated bends (relu), so that PyTorch is asked for its history."""
    seen = []
    w, x = torch.rand(3, dtype=D, requires_grad=True), torch.rand(3, dtype=D, requires_grad=True)
    if made == "custom function":
        h = Refuses.apply(w)
    else:
        h = w * 2
        h.register_hook(lambda g: seen.append("h"))
        w.register_hook(lambda g: seen.append("w"))
    wengert.clear_caches()
    jacobian = wengert.jacobian(lambda x: torch.relu(x + h), x, create_graph=True)
    assert_same(torch.autograd.grad(jacobian.sum(), x)[0], torch.zeros_like(x), "derivative of the Jacobian")
    wengert.grad(torch.relu(x + h).sum(), x, create_graph=True)
    wengert.hessian(lambda x: torch.relu(x + h).square().sum(), x, create_graph=True)
    assert not seen


def test_history_does_not_depend_on_what_ran_before():
    a, b, x = (torch.rand(3, dtype=D, requires_grad=True) for _ in range(3))
    wengert.clear_caches()
    for h in (a.sin(), b * a, a * b):
        jacobian = wengert.jacobian(lambda x, h=h: torch.relu(x + h), x, create_graph=True)
        assert jacobian.requires_grad
        assert_same(torch.autograd.grad(jacobian.sum(), x)[0], torch.zeros_like(x), "derivative of the Jacobian")


@pytest.mark.parametrize("fn", [lambda x: torch.norm(x, 0), lambda x: torch.linalg.vector_norm(x, 0)])
def test_what_counts_elements_has_no_gradient(fn):
    x = torch.rand(3, dtype=D, requires_grad=True)
    for create_graph in (False, True):
        assert wengert.grad(fn(x), x, allow_unused=True, create_graph=create_graph) == (None,)
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        wengert.grad(fn(x), x)
    assert_same(wengert.jacobian(fn, x), torch.zeros(3, dtype=D))
    assert_same(wengert.jacobian(lambda x: fn(x) + x, x), torch.eye(3, dtype=D))


def packed_by(call):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        call()
    return len(packed)


def test_asking_for_a_history_saves_nothing_through_the_users_hooks():
    x = torch.rand(3, dtype=D, requires_grad=True)
    y = torch.relu(x)
    wengert.clear_caches()
    first, second = (packed_by(lambda: wengert.jacobian(y, x, create_graph=True)) for _ in range(2))
    assert first == second  # PyTorch is asked the first time


def test_histories_of_derivatives_taken_one_after_the_other():
    """Ours are of one structure, PyTorch's are not: its derivative of relu leads to x, that of a product with a mask does not."""
    mask = torch.tensor([1.0, 0.0, 1.0], dtype=D)
    for f, leads in ((torch.relu, True), (lambda x: x * mask, False), (torch.relu, True)):
        x, v = torch.rand(3, dtype=D, requires_grad=True), torch.rand(3, dtype=D, requires_grad=True)
        for grad in (wengert.grad, torch.autograd.grad):
            (first,) = grad(f(x), x, v, create_graph=True)
            (second,) = grad(first, v, torch.ones(3, dtype=D), create_graph=True)
            (third,) = grad(2 * first, v, torch.ones(3, dtype=D), create_graph=True)
            assert second.requires_grad == third.requires_grad == leads
            if leads:
                assert_same(torch.autograd.grad(second.sum() + third.sum(), x)[0], torch.zeros(3, dtype=D))


class Mark:
    pass


def test_histories_of_long_chains_of_steps():
    """An unrolled optimiser: what a step's gradient leads to is found once a step, not once a way through the earlier ones."""

    def tuned(module, steps):
        x = start = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            x = x - 0.01 * module.grad((x.sin() * x).sum(), x, create_graph=True)[0]
        (g,) = module.grad(x.square().sum(), start, create_graph=True)
        return g, torch.autograd.grad(g.sum(), start)[0]

    for steps in (1, 3, 40):
        assert_same(tuned(wengert, steps), tuned(torch.autograd, steps))


@pytest.mark.parametrize("fn", [torch.relu, lambda x: x.sin().cumsum(0)], ids=["relu", "cumsum"])
def test_a_cotangent_that_is_written_to_does_not_keep_the_graph(fn):
    def once():
        x = torch.rand(5, requires_grad=True)
        y = fn(x)
        v = torch.ones_like(y)
        v.add_(wengert.grad(y, x, v, create_graph=True)[0])
        return weakref.ref(x)

    mark = once()
    gc.collect()
    assert mark() is None


def test_what_a_result_remembers_leaves_with_it():
    x = torch.rand(3, dtype=D, requires_grad=True)
    y = torch.relu(x)
    y.grad_fn.metadata["mark"] = mark = Mark()
    mark = weakref.ref(mark)
    (first,) = wengert.grad(y.sum(), x, create_graph=True)
    (second,) = wengert.grad(first.sum(), x, create_graph=True)
    del y, first, second
    gc.collect()
    assert mark() is None


def kept_by_its_input(size):
    """A gradient that is linear in `x`: PyTorch's does not lead to it, and may be its `.grad`."""
    x, w = torch.rand(size, requires_grad=True), torch.rand(size, requires_grad=True)
    x.grad = wengert.grad((w.sin() * w.exp() * x).sum(), x, create_graph=True)[0]
    return weakref.ref(x)


def test_a_large_graph_is_not_kept_by_results_that_do_not_lead_to_it():
    marks = [kept_by_its_input(300_000) for _ in range(3)]
    gc.collect()
    assert not any(mark() is not None for mark in marks)


def test_of_small_graphs_the_latest_are_kept():
    marks = [kept_by_its_input(50) for _ in range(40)]
    gc.collect()
    assert sum(mark() is not None for mark in marks) <= 32
    wengert.clear_caches()
    gc.collect()
    assert not any(mark() is not None for mark in marks)


def test_a_question_that_is_forgotten_says_nothing_about_others():
    """What lies two results back decides too; asking after it was forgotten is not what is known from then on."""

    def patterns(grad, others):
        x, p = torch.ones(4, dtype=D, requires_grad=True), torch.ones(4, dtype=D, requires_grad=True)
        options = {"create_graph": True, "allow_unused": True}
        (first,) = grad(((x * p).relu() * p).sum(), x, **options)
        second = grad(first.sum(), (x, p), **options)
        kept = []
        for _ in range(others):
            z = torch.ones(2, dtype=D, requires_grad=True)
            kept += grad((z**3).sum(), z, **options)
        third = grad(sum(g.sum() for g in second if g is not None and g.requires_grad), (x, p), **options)
        return [[g is not None and g.requires_grad for g in found] for found in (second, third)]

    wengert.clear_caches()
    expected = patterns(torch.autograd.grad, 0)
    for others in (30, 31, 0, 31, 0):
        found = patterns(wengert.grad, others)
        assert found[0] == expected[0]
        assert others or found == expected


def test_cotangents_that_are_lazily_zero():
    """As PyTorch gives them for the second derivative of abs, without memory of their own."""
    x = torch.rand(3, dtype=D, requires_grad=True)
    (slope,) = torch.autograd.grad(x.abs().sum(), x, create_graph=True)
    (zeros,) = torch.autograd.grad(slope.sum(), x)
    assert zeros._is_zerotensor()
    assert_same(wengert.grad(x.sin(), x, zeros), torch.autograd.grad(x.sin(), x, zeros))
    both = torch._efficientzerotensor(2, 3, dtype=D)
    options = {"is_grads_batched": True}
    assert_same(wengert.grad(x.sin(), x, both, **options), torch.autograd.grad(x.sin(), x, torch.zeros(2, 3, dtype=D), **options))
    for name in ("vjp", "jvp", "hvp", "vhp"):
        f = torch.sin if name in ("vjp", "jvp") else lambda x: x.sin().sum()
        ours, theirs = (getattr(module, name)(f, x.detach(), zeros) for module in (wengert, torch_functional))
        assert_same(ours, theirs)


def test_products_with_a_second_derivative_that_is_lazily_zero():
    x, v = torch.tensor([1 + 2j, 3 - 1j]).conj().imag, torch.ones(2)
    assert x.is_neg()
    f = lambda x: x.abs().sum()
    assert_same(wengert.hvp(f, x, v), torch_functional.hvp(f, x, v))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_whether_numbers_are_finite(bad):
    """One by one where they lie in a row, together where not."""
    for dtype in (torch.float64, torch.float32, torch.float16):
        for kind in (lambda t: t, lambda t: t[::2], torch.Tensor._neg_view):
            given = [torch.ones(40, dtype=dtype), None, torch.ones(0, dtype=dtype), kind(torch.ones(40, dtype=dtype))]
            assert C.are_finite(given)
            broken = torch.ones(40, dtype=dtype)
            broken[38] = bad
            assert not C.are_finite([*given, kind(broken)])


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("fn", [torch.relu, torch.exp, lambda z: torch.fmod(z, 0.7), lambda z: (z - 1).abs()])
def test_results_lead_to_captured_leaves_where_pytorchs_do(fn, vectorize):
    x, w = torch.rand(3, dtype=D), torch.rand(3, dtype=D, requires_grad=True)
    f = lambda x: fn(x * w)
    g = lambda x: fn(x * w).sum()
    for name, function in (("jacobian", f), ("hessian", g)):
        ours, theirs = (
            getattr(module, name)(function, x, create_graph=True, vectorize=vectorize) for module in (wengert, torch_functional)
        )
        assert ours.requires_grad == theirs.requires_grad
        if theirs.requires_grad:
            found, expected = (torch.autograd.grad(t.sum(), w, allow_unused=True)[0] for t in (ours, theirs))
            assert_same(found, expected, f"derivative of the {name} in what was captured")


WEIGHT = torch.linspace(-1, 1, 3, dtype=D).reshape(1, 1, 3)
PIECEWISE_LINEAR = {  # with nodes that have an edge to x in their second derivative, but give nothing along it
    "convolution": lambda x, z: torch.relu(F.conv1d(x[None, None], WEIGHT)) + z[:2].sum(),
    "summed convolution": lambda x, z: torch.relu(F.conv1d(x[None, None], WEIGHT)).sum(-1) * z[0],
    "pooled convolution": lambda x, z: F.max_pool1d(torch.relu(F.conv1d(x[None, None], WEIGHT, padding=1)), 2) * z[0],
    "minimum": lambda x, z: torch.minimum(x.log_softmax(0).square(), z),
}


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_zeros_and_none_of_derivatives_of_derivatives(name):
    """Where PyTorch's gradient of a result is None ours is, whoever computes it, and zeros where it gives zeros."""
    x, z = (torch.randn(4, dtype=D).requires_grad_() for _ in range(2))
    f = PIECEWISE_LINEAR[name]

    def pattern(result, grad):
        if not result.requires_grad:
            return None
        return [g is not None for g in grad(result.sum(), (x, z), retain_graph=True, allow_unused=True)]

    def results(jacobian, hessian, grad):
        jacobians = jacobian(f, (x, z), create_graph=True)
        hessians = hessian(lambda x, z: f(x, z).square().sum(), (x, z), create_graph=True)
        return [*jacobians, *(block for row in hessians for block in row), *grad(f(x, z).sum(), (x, z), create_graph=True)]

    theirs = results(torch_functional.jacobian, torch_functional.hessian, torch.autograd.grad)
    ours = results(wengert.jacobian, wengert.hessian, wengert.grad)
    for k, (a, b) in enumerate(zip(ours, theirs)):
        expected = pattern(b, torch.autograd.grad)
        assert [pattern(a, torch.autograd.grad), pattern(a, wengert.grad), pattern(b, wengert.grad)] == [expected] * 3, k


@pytest.mark.parametrize("fn", [torch.relu, torch.sin])
def test_captured_leaves_of_a_node_that_is_called(fn):
    """The gradient of a norm's derivative has an edge to its bias, along which it gives nothing; what follows may."""
    x, w, b = torch.randn(2, 3, dtype=D), *(torch.rand(3, dtype=D, requires_grad=True) for _ in range(2))
    f = lambda x: fn(F.layer_norm(x, (3,), w, b)).square()
    for name, function in (("jacobian", f), ("hessian", lambda x: f(x).sum())):
        derivatives = []
        for module in (wengert, torch_functional):
            result = getattr(module, name)(function, x, create_graph=True)
            derivatives.append(torch.autograd.grad(result.sin().sum(), (w, b), allow_unused=True))
        assert_same(*derivatives, f"derivative of the {name} in what was captured")


@pytest.mark.parametrize("fn", [torch.relu, torch.nn.functional.leaky_relu, torch.sin])
def test_a_node_that_is_reached_through_some_of_its_outputs(fn):
    """A group norm's mean and deviation alone give nothing to its weight and bias."""

    def derivatives(grad):
        torch.manual_seed(0)
        leaves = [torch.randn(2, 4, 2, dtype=D), torch.rand(4, dtype=D), torch.rand(4, dtype=D)]
        x, w, b = (leaf.requires_grad_() for leaf in leaves)
        (first,) = grad(fn(F.group_norm(x, 2, w, b)).sum(), w, create_graph=True)
        second = grad(first.sum(), (x, w, b), create_graph=True, allow_unused=True)
        return second, grad(second[0].sin().sum(), (x, w, b), allow_unused=True)

    (ours, next_ours), (theirs, next_theirs) = derivatives(wengert.grad), derivatives(torch.autograd.grad)
    assert_same([ours, next_ours], [theirs, next_theirs], "derivatives")
    assert [t.requires_grad for t in ours] == [t.requires_grad for t in theirs]


def test_a_node_that_fails_at_a_gradient_that_nobody_wants():
    """PyTorch's differentiable gradient of a group norm with a bias alone fails where the bias' gradient is wanted."""
    x, b = torch.randn(2, 2, 3, dtype=D), torch.rand(2, dtype=D, requires_grad=True)
    f = lambda x: F.group_norm(x, 1, None, b).sin()
    for create_graph in (False, True):
        ours, theirs = (module.jacobian(f, x, create_graph=create_graph) for module in (wengert, torch_functional))
        assert_same(ours, theirs)
    loss = lambda x: f(x).sum()
    assert_same(wengert.hessian(loss, x), torch_functional.hessian(loss, x))


def test_attention_leads_where_its_node_does():
    """Read as what it is composed of, from tensors that may have been changed since."""
    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=D) for _ in range(3))
    q.requires_grad_()
    out = attention(q, k, v)
    k.requires_grad_()  # which the node has not seen
    y = out + 2 * k
    ours = wengert.jacobian(y, (q, k))
    for mine, x in zip(ours, (q, k)):
        rows = [torch.autograd.grad(e, x, retain_graph=True)[0] for e in y.flatten()]
        assert_same(mine, torch.stack(rows).reshape(y.shape + x.shape))
    changed = attention(q, q, q)
    changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        wengert.jacobian(changed, q)


def test_causal_attention_does_not_reach_behind_its_mask_through_nan():
    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=D) for _ in range(3))
    q[0, 0, 1] = torch.nan
    jacobian = wengert.jacobian(lambda v: attention(q, k, v, is_causal=True)[0, 0, :, 0], v)
    assert torch.equal(jacobian[1, 0, 0, 2], torch.zeros(2, dtype=D))


def test_gradients_of_results_lie_as_the_tensors_do():
    """PyTorch's backward of the batch norm of one sample takes some strides for contiguous ones."""
    x = torch.randn(2, 3, 2, 2, dtype=D).requires_grad_()
    weights = torch.randn(2, 3, 2, 2, 2, 3, 2, 2, dtype=D)
    f = lambda x: torch.nn.functional.instance_norm(x).sin()
    ours, theirs = (m.jacobian(f, x, create_graph=True) for m in (wengert, torch_functional))
    assert_same(*(torch.autograd.grad((j * weights).sum(), x)[0] for j in (ours, theirs)))
    operands = [torch.randn(3, 4, dtype=D).requires_grad_(), torch.randn(4, 3, dtype=D).t().requires_grad_()]
    (y,) = torch.ops.wengert.fused(operands, "fused v1 rank=2 operands=2 compute=f64\nt0 = mul a0 a1\nout t0 f64\n")
    found = torch.autograd.grad(y.sum(), operands)
    assert [g.stride() for g in found] == [(4, 1), (1, 3)]


def test_results_of_one_call_lead_where_pytorchs_do():
    """Each on its own: a convolution's gradient in the data does not lead to the data, though the one in the weight does."""
    x, w = torch.randn(1, 1, 4, dtype=D).requires_grad_(), torch.randn(1, 1, 3, dtype=D).requires_grad_()
    normed = torch.nn.functional.layer_norm(x.relu(), (4,), w[0, 0, :1].expand(4))
    for y in (torch.nn.functional.conv1d(x.relu(), w), normed):
        patterns = []
        for grad in (wengert.grad, torch.autograd.grad):
            results = grad(y.square().sum(), (x, w), create_graph=True)
            found = [torch.autograd.grad(g.sum(), (x, w), retain_graph=True, allow_unused=True) for g in results]
            patterns.append([[None if t is None else bool(t.any()) for t in row] for row in found])
        assert patterns[0] == patterns[1]


def test_results_of_a_call_with_many_inputs_lead_where_pytorchs_do():
    shapes = [(2, 4, 2), (4,), (4,), (4,), (4,)]
    inputs = tuple(torch.randn(shape, dtype=D).requires_grad_() for shape in shapes)

    def f(x, w, b, *rest):
        s = sum(t.sin().sum() for t in rest)
        return torch.nn.functional.group_norm(x + s, 2, w, b).abs().square().sum() + s * s

    patterns = []
    for functional in (wengert, torch_functional):
        blocks = [block for row in functional.hessian(f, inputs, create_graph=True) for block in row]
        found = [torch.autograd.grad(b.sum(), inputs, allow_unused=True, retain_graph=True) for b in blocks if b.requires_grad]
        patterns.append([[t is None for t in row] for row in found])
    assert patterns[0] == patterns[1]


def test_sums_at_indices_in_a_corner_of_the_other_axes():
    """PyTorch's scatter_add of an expanded index takes the source for as large as the array along the other axes."""
    index = torch.arange(3).repeat_interleave(4)
    x = torch.randn(3, 3, 3, 3, dtype=D).requires_grad_()
    y = x[index][..., :2].sin()
    g = torch.randn_like(y)
    ours, theirs = (grad(y, x, g, create_graph=True)[0] for grad in (wengert.grad, torch.autograd.grad))
    assert_same(ours, theirs)


def test_hvp_under_tracers():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    f = lambda x: (x**3).prod()
    with FakeTensorMode():
        assert wengert.hvp(f, torch.randn(3), torch.ones(3))[1].shape == (3,)
    fake = FakeTensorMode().from_tensor(torch.ones(3))  # outside of its mode
    assert wengert.hvp(lambda x: (x**3).sum(), fake, fake)[1].shape == (3,)
    x, v = torch.randn(3, dtype=D), torch.randn(3, dtype=D)
    traced = make_fx(lambda x, v: wengert.hvp(f, x, v)[1])(x, v)
    assert_same(traced(x, v), torch_functional.hvp(f, x, v)[1])
