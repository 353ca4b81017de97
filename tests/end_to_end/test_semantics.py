"""How PyTorch programs really look: in-place writes, views, checkpoints, custom functions, hooks, control flow, odd inputs."""

# ruff: noqa: B023 - every function made in a loop is called within the same iteration

import math

import numpy as np
import pytest
import torch
import wengert
from support.check import DEVICE, check_against_torch, fresh
from support.compare import Tolerance, assert_same, assert_same_call
from support.zoo import Zoo
from torch.autograd import Function
from torch.autograd import functional as torch_functional
from torch.utils.checkpoint import checkpoint

zoo = Zoo()
NO_FUNC = ("func", "forward", "value")  # functions torch.func itself refuses


@zoo.case("in-place arithmetic")
def _(r):
    def f(x):
        y = x.sin()
        y.mul_(x).add_(1.0)
        y[1:] += y[:-1].clone()
        return y.exp_()

    return f, r(6)


@zoo.case("in-place write into a view of a clone")
def _(r):
    def f(x):
        y = x.clone()
        y[0] = x[1] * 2
        y.t()[1].mul_(x[:, 0][: y.shape[0]])
        y.view(-1)[2:4].copy_(x.view(-1)[:2].exp())
        return y * y

    return f, r(3, 3)


@zoo.case("filling a buffer row by row", skip=("func", "forward"))
def _(r):
    def f(x):
        out = torch.zeros(4, 3, dtype=x.dtype, device=x.device)
        for i in range(4):
            out[i] = x[i % 3] * (i + 1) + (out[i - 1] if i else 0)
        return out

    return f, r(3, 3)


@zoo.case("stale view after a write to its base")
def _(r):
    def f(x):
        y = x * 2
        v = y[1]
        y.add_(x.square())
        return v * y.sum(0)

    return f, r(3, 2)


@zoo.case("expanded and overlapping views", skip=("strided",))  # as_strided reads the storage between the elements
def _(r):
    def f(x):
        w = x.as_strided((4, 3), (1, 1))
        return (w * x[:3].expand(4, 3)).sum(1) + x.unfold(0, 3, 1).prod(1)

    return f, r(6)


@zoo.case("views of views")
def _(r):
    def f(x):
        y = x.transpose(0, 1)[..., ::2].flip(0).squeeze().unsqueeze(1).movedim(0, -1)
        return y.flatten(0, 1).swapaxes(0, 1).contiguous().view(-1).unflatten(0, (3, -1)).exp()

    return f, r(4, 3, 2)


@zoo.case("detached parts")
def _(r):
    return lambda x: x * (x * x).detach() + (x.exp() - x.exp().detach()), r(5)


@zoo.case("a no_grad part")
def _(r):
    def f(x):
        with torch.no_grad():
            scale = x.abs().max()
        return (x / scale).sin()

    return f, r(5)


@zoo.case(
    "reentrant checkpoint", skip=(*NO_FUNC, "hessian", "create_graph", "products", "gradient", "graph", "float32", "strided")
)
def _(r):
    w = r(3, 3)
    return lambda x: checkpoint(lambda z: (z @ w).tanh() @ w, x, use_reentrant=True), r(2, 3)


@zoo.case("checkpoint", skip=NO_FUNC)
def _(r):
    w = r(3, 3)

    def f(x):
        for _ in range(2):
            x = checkpoint(lambda z: (z @ w).tanh() + z, x, use_reentrant=False)
        return x

    return f, r(2, 3)


class Cube(Function):
    """Old-style: forward and context in one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return 3 * x * x * ct


class SinCos(Function):
    """New-style, two outputs, one non-differentiable side input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale):
        return (scale * x).sin(), (scale * x).cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.scale = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, ct_sin, ct_cos):
        (x,) = ctx.saved_tensors
        s = ctx.scale
        return s * (ct_sin * (s * x).cos() - ct_cos * (s * x).sin()), None


class NumpyTanh(Function):
    """Backward leaves torch: no batching, no second derivative."""

    @staticmethod
    def forward(ctx, x):
        y = np.tanh(x.detach().cpu().numpy())
        ctx.y = y
        return torch.as_tensor(y, device=x.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, ct):
        return torch.as_tensor(ct.cpu().numpy() * (1 - ctx.y**2), device=ct.device)


class StraightThrough(Function):
    """A gradient that is not the derivative: it must be taken as the author wrote it."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, ct):
        return ct * 1


class NoneGradient(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(y)
        return x * y

    @staticmethod
    def backward(ctx, ct):
        (y,) = ctx.saved_tensors
        return ct * y, None


@zoo.case("old-style custom function", skip=NO_FUNC)
def _(r):
    return lambda x: Cube.apply(x.sin()) * x, r(4)


@zoo.case("new-style custom function", skip=("forward",))
def _(r):
    def f(x):
        s, c = SinCos.apply(x * x, 1.5)
        return s * c + x

    return f, r(4)


@zoo.case("numpy backward", skip=(*NO_FUNC, "hessian", "create_graph", "products", "gradient", "strided", "float32"))
def _(r):
    w = r(3, 3)
    return lambda x: NumpyTanh.apply(x @ w) @ w, r(2, 3)


@zoo.case("straight-through estimator", skip=NO_FUNC)
def _(r):
    return lambda x: StraightThrough.apply(2 * x).sin() * x, r(5)


@zoo.case("custom function with a None gradient", skip=NO_FUNC)
def _(r):
    return lambda x, y: NoneGradient.apply(x.exp(), y.sin()), (r(4), r(4))


@zoo.case("tensor hooks", skip=(*NO_FUNC, "float32"))
def _(r):
    def f(x):
        y = x.sin()
        if y.requires_grad:
            y.register_hook(lambda g: g * 2)
        return y * x

    return f, r(4)


@zoo.case("data-dependent control flow", skip=NO_FUNC)
def _(r):
    def f(a):
        b = a * 2
        while b.norm().item() < 1000:
            b = b * 2
        return b if b.sum().item() > 0 else 100 * b

    return f, r(2, 3)


@zoo.case("piecewise by where, with a Newton inner loop")
def _(r):
    def f(c):
        x = torch.ones_like(c)
        for _ in range(6):
            x = x - (x**3 - c) / (3 * x * x)
        return torch.where(c > 1, x, c.sqrt())

    return f, r.positive(5)


# float32 inside: results round in another order.
@zoo.case("dtype changes", skip=("float32", "forward"), tol=Tolerance(rtol=1e-6, atol=1e-6))
def _(r):
    return lambda x: (x.float().sin().double() * x).to(torch.float32).double() + x, r(5)


@zoo.case("several outputs")
def _(r):
    return lambda x, y: (x @ y, x.sum(1), y.exp()), (r(2, 3), r(3, 2))


@zoo.case("output that is an input")
def _(r):
    return lambda x, y: (x, x * y), (r(3), r(3))


@zoo.case("one unused input")
def _(r):
    return lambda x, y: x.sin(), (r(3), r(2))


@zoo.case("linear function")
def _(r):
    w = r(3, 2)
    return lambda x: x @ w, r(4, 3)


@zoo.case("0-dim input and output")
def _(r):
    return lambda x: (x.sin() * x) ** 2, r(1)[0]


@zoo.case("0-dim with vector")
def _(r):
    return lambda a, x: a * x.exp() + a * a, (r(1)[0], r(4))


@zoo.case("zero-size input")
def _(r):
    return lambda x, y: x.sin().sum(0) + y, (r(0, 3), r(3))


@zoo.case("zero-size output", skip=("graph",))
def _(r):
    return lambda x: x.sin()[:0] * 2, r(4)


@zoo.case("one element axes")
def _(r):
    return lambda x, y: (x * y).squeeze(0).sin(), (r(1, 3, 1), r(1, 1, 2))


@zoo.case("complex in the middle")
def _(r):
    return lambda x, y: torch.view_as_real(torch.complex(x, y) ** 2).sum(0) + torch.polar(x.abs(), y).real[:, None], (r(4), r(4))


@zoo.case("integer side input and one-hot")
def _(r):
    at = r.integers(0, 4, 3)
    return lambda x: x * torch.nn.functional.one_hot(at, 4).to(x.dtype) + at.sum() * x.sin(), r(3, 4)


@zoo.case("nested function calls of autograd", skip=(*NO_FUNC, "strided"))
def _(r):
    def f(x):
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            (g,) = torch.autograd.grad((z.sin() * z).sum(), z, create_graph=True)
        return g * x

    return f, r(4)


# Beyond the first derivative torch's 0 * inf spreads its nan into sums.
@zoo.case("biased variance")
def _(r):
    return lambda x: x.var(unbiased=False), r(5)  # whose Hessian has numbers that no exact fold computes: 0.4 * 0.2


@zoo.case("infinities off the structure", skip=("hessian", "create_graph", "history"))
def _(r):
    x = torch.tensor([0.0, 1.0, 2.0]).to(r(1))
    return lambda x: x.sqrt() * torch.ones_like(x), x


@zoo.parametrize()
def test_semantics(case, mode):
    case.check(mode)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (lambda x: (x.sin() * x).sum(0), [(3, 2)]),
        (lambda x, y: (x @ y).tanh(), [(2, 3), (3, 2)]),
        (lambda x: x.softmax(1), [(2, 3)]),
        (lambda x: x * x.roll(1), [(4,)]),
    ],
)
def test_gradcheck_through_our_results(fn, shapes):
    check_against_torch(fn, tuple(randn(*s) for s in shapes), modes=("gradcheck",))


def test_the_same_tensor_twice():
    x = randn(3)
    for f in (lambda a, b: a * b.sin(), lambda a, b: (a * b).sum()):
        assert_same(wengert.jacobian(f, (x, x)), torch_functional.jacobian(f, (x, x)))
    scalar = lambda a, b: (a * b * b).sum()
    assert_same(wengert.hessian(scalar, (x, x)), torch_functional.hessian(scalar, (x, x)))
    leaf = x.clone().requires_grad_()
    y = leaf.sin() * leaf
    one = wengert.jacobian(y, leaf)
    assert_same(wengert.jacobian(y, (leaf, leaf)), (one, one))


def test_graph_form_on_a_middle_tensor():
    x = randn(4).requires_grad_()
    h = x.sin()
    y = h * h.sum()
    assert_same(wengert.jacobian(y, h), torch_functional.jacobian(lambda z: z * z.sum(), h.detach()))
    both = wengert.jacobian(y, (h, x))
    assert_same(both[1], torch_functional.jacobian(lambda z: z.sin() * z.sin().sum(), x.detach()))


def test_graph_form_of_nothing_has_the_full_shape():
    x = randn(4).requires_grad_()
    assert wengert.jacobian(x.sin()[:0], x).shape == (0, 4)
    z = randn(0, 3).requires_grad_()
    assert wengert.jacobian(z.sin().sum(0), z).shape == (3, 0, 3)


def test_parameters_of_norms_of_nothing():
    w, b = (randn(4).requires_grad_() for _ in range(2))
    norms = {
        "layer": lambda x: torch.nn.functional.layer_norm(x, (4, 2), w[:, None].expand(4, 2), b[:, None].expand(4, 2)),
        "group": lambda x: torch.nn.functional.group_norm(x, 2, w, b),
        "batch": lambda x: torch.nn.functional.batch_norm(x, randn(4), randn(4).exp(), w, b, training=False),
    }
    for name, norm in norms.items():
        y = norm(randn(0, 4, 2))
        for g in wengert.grad(y, (w, b), randn(3, *y.shape), is_grads_batched=True):
            assert_same(g, torch.zeros(3, 4, dtype=torch.float64, device=DEVICE), name)


def test_graph_form_tells_unused_inputs():
    x, z = randn(3).requires_grad_(), randn(2).requires_grad_()
    y = x.exp()
    assert_same(wengert.jacobian(y, (x, z))[1], torch.zeros(3, 2, dtype=torch.float64, device=DEVICE))
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        wengert.jacobian(y, (x, z), allow_unused=False)


def test_graph_form_through_retain_grad_and_hooks():
    x = randn(4).requires_grad_()
    h = x.sin()
    h.retain_grad()
    y = h * x
    expected = torch_functional.jacobian(lambda z: z.sin() * z, x.detach())
    assert_same(wengert.jacobian(y, x), expected)
    assert x.grad is None


def test_graph_stays_alive_and_backward_still_works():
    x = randn(3).requires_grad_()
    y = (x.exp() * x).sum()
    wengert.hessian(y, x)
    y.backward()
    torch.testing.assert_close(x.grad, (x.exp() * (1 + x)).detach())


@pytest.mark.parametrize("form", ("functional", "graph"))
def test_freed_graph_raises_as_torch_does(form):
    x = randn(3).requires_grad_()
    h = x.exp()
    h.sum().backward()
    if form == "graph":
        ours = lambda: wengert.jacobian(h, x)
        theirs = lambda: torch.autograd.grad(h.sum(), x)
        assert_same_call(ours, theirs, "freed graph")
    else:
        assert_same_call(
            lambda: wengert.grad(h.sum(), x, retain_graph=True),
            lambda: torch.autograd.grad(h.sum(), x, retain_graph=True),
            "freed",
        )


def test_saved_tensor_modified_in_place_raises_as_torch_does():
    x = randn(3).requires_grad_()
    h = x.exp()
    y = h.sin()
    with torch.no_grad():
        h.add_(1)
    assert_same_call(lambda: wengert.jacobian(y, x), lambda: torch.autograd.grad(y.sum(), x), "modified saved tensor")


def test_grad_modes_around_the_call():
    x = randn(4)
    f = lambda z: (z.sin() * z).cumsum(0)
    expected = torch_functional.jacobian(f, x)
    with torch.no_grad():
        assert_same(wengert.jacobian(f, x), expected)
    with torch.enable_grad():
        assert_same(wengert.jacobian(f, x), expected)
    with torch.inference_mode():
        assert_same_call(lambda: wengert.jacobian(f, x), lambda: torch_functional.jacobian(f, x), "inference mode")


def test_inference_tensor_inputs():
    with torch.inference_mode():
        x = randn(4)
    f = lambda z: z.sin()
    assert_same_call(lambda: wengert.jacobian(f, x), lambda: torch_functional.jacobian(f, x), "inference tensor")


def test_autocast_around_the_call():
    x, w = torch.randn(4, 3), torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = lambda z: (z @ w).float().tanh()
        ours, theirs = wengert.jacobian(f, x), torch_functional.jacobian(f, x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_low_precision_keeps_dtype(dtype):
    x = torch.linspace(0.5, 1.5, 6, device=DEVICE).to(dtype)
    f = lambda z: (z.sin() * z.exp() / z).tanh()
    ours, theirs = wengert.jacobian(f, x), torch_functional.jacobian(f, x)
    assert ours.dtype == theirs.dtype == dtype
    bound = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), torch_functional.jacobian(f, x.double()), rtol=bound, atol=bound)


def test_saved_tensor_hooks_run():
    x = randn(4).requires_grad_()
    unpacked = []

    def unpack(t):
        unpacked.append(1)
        return t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = x.sin() * x
    assert_same(wengert.jacobian(y, x), torch_functional.jacobian(lambda z: z.sin() * z, x.detach()))
    assert unpacked


def test_checkpoint_recomputes_each_segment_a_bounded_number_of_times():
    w, calls = randn(3, 3), []

    def segment(z):
        calls.append(1)
        return (z @ w).tanh() @ w

    x = randn(4, 3).requires_grad_()
    y = checkpoint(segment, x, use_reentrant=False)
    calls.clear()
    assert_same(wengert.jacobian(y, x), torch_functional.jacobian(lambda z: (z @ w).tanh() @ w, x.detach()))
    assert len(calls) <= y.numel(), "more recomputation than torch's row loop"


def test_second_call_with_other_values_and_shapes():
    """A cached plan must not remember values, and must not serve another shape."""
    f = lambda z: (z.sin() @ z.t()).softmax(1)
    for shape in ((3, 2), (3, 2), (4, 3), (1, 1), (3, 2)):
        x = randn(*shape)
        assert_same(wengert.jacobian(f, x), torch_functional.jacobian(f, x))


def test_cached_plans_follow_values_the_graph_hides():
    """The same graph shape with other scalars, indices or masks."""
    x = randn(5)
    for scale in (1.0, 2.0, -3.5):
        f = lambda z: (z * scale + scale) ** 2
        assert_same(wengert.jacobian(f, x), torch_functional.jacobian(f, x))
    for power in (2, 3, 0.5, -1):
        g = lambda z: (z.abs() + 1) ** power
        assert_same(wengert.jacobian(g, x), torch_functional.jacobian(g, x))
    for at in ([0, 1], [3, 3], [4, 0]):
        index = torch.tensor(at, device=DEVICE)
        h = lambda z: z[index].sin()
        assert_same(wengert.jacobian(h, x), torch_functional.jacobian(h, x))
    for shift in (1, 2, -1):
        k = lambda z: z.roll(shift) * z[1:4].sum()
        assert_same(wengert.jacobian(k, x), torch_functional.jacobian(k, x))
    for bound in (-1.0, 0.0, 1.0):
        c = lambda z: z.clamp(min=bound) * z.masked_fill(z > bound, 2.0)
        assert_same(wengert.jacobian(c, x), torch_functional.jacobian(c, x))


def test_inputs_keep_requires_grad_and_version():
    x = fresh(randn(3))
    version = x._version
    wengert.jacobian(lambda z: z.sin(), x)
    assert x.requires_grad and x.grad is None and x._version == version


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ignored_classes_stop_what_is_not_finite(reduction):
    """Their derivative is 0 whatever arrives there, as torch's kernel skips them."""
    z = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.nll_loss(z, torch.tensor([0, 1, 0, 2]), ignore_index=0, reduction=reduction)
    bad = torch.tensor([math.inf, 1.0, math.nan, 2.0], dtype=torch.float64)[: y.numel()].reshape(y.shape)
    assert_same(wengert.grad(y, z, bad, retain_graph=True), torch.autograd.grad(y, z, bad, retain_graph=True))


@pytest.mark.parametrize("spread", [torch.std, lambda x: x.std(unbiased=False), lambda x: torch.std_mean(x)[0]])
def test_three_derivatives_of_a_spread_of_equal_values(spread):
    """What is masked at deviation 0 stays masked in every derivative of it."""

    def third(grad):
        x = torch.full((4,), 3.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
        (first,) = grad(spread(x), x, create_graph=True)
        (second,) = grad(first.square().sum(), x, create_graph=True)
        return grad(second.square().sum(), x)

    assert_same(third(wengert.grad), third(torch.autograd.grad), "the third derivative")


@pytest.mark.parametrize(
    "after",
    [lambda s: (s * s.sum()).sum(), lambda s: torch.atan2(s.tanh(), s.tanh().sum()).sum(), lambda s: (s + 1).prod()],
    ids=["times its sum", "atan2", "prod"],
)
def test_a_sum_of_what_is_masked_stays_behind_its_mask(after):
    """Attention to nothing: the softmax is nan, and what it multiplies is masked before it is summed."""
    x, v = torch.rand(3, dtype=torch.float64, device=DEVICE), torch.rand(3, dtype=torch.float64, device=DEVICE)
    nothing = torch.ones(3, dtype=torch.bool, device=DEVICE)

    def f(x):
        return after(x.exp().masked_fill(nothing, -torch.inf).softmax(0).nan_to_num())

    for name in ("hvp", "vhp"):
        assert_same(getattr(wengert, name)(f, x, v), getattr(torch.autograd.functional, name)(f, x, v))
    assert_same(wengert.hessian(f, x), torch.autograd.functional.hessian(f, x))


@pytest.mark.parametrize("f", [torch.norm, lambda x: torch.nn.functional.normalize(x, dim=0).sum()], ids=["norm", "normalize"])
def test_second_products_of_a_norm_at_zero(f):
    """Finite in a direction, though the Hessian is not."""
    x, v = torch.zeros(3, dtype=torch.float64, device=DEVICE), torch.rand(3, dtype=torch.float64, device=DEVICE)
    assert_same(wengert.hvp(f, x, v), torch.autograd.functional.hvp(f, x, v))


NOTHING_LEFT = {
    "cross_entropy": lambda z: torch.nn.functional.cross_entropy(z, torch.full((2,), -100, device=z.device)) ** 2,
    "nll_loss": lambda z: torch.nn.functional.nll_loss(z, torch.full((2,), -100, device=z.device)).exp(),
}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is not asked whether samples are ignored")
@pytest.mark.parametrize("name", NOTHING_LEFT)
def test_means_of_ignored_samples_alone(name):
    """Are nan, and do not move."""
    check_against_torch(NOTHING_LEFT[name], randn(2, 3), modes=("jacobian", "hessian", "products", "gradient"))


@pytest.mark.parametrize("weighted", [False, True])
def test_third_derivatives_of_a_loss_over_pixels(weighted):
    """PyTorch's node for them wants cotangents that are contiguous."""
    x, target = randn(2, 3, 2, 2), torch.randint(0, 3, (2, 2, 2), device=DEVICE)
    weight = torch.linspace(1, 2, 3, dtype=torch.float64, device=DEVICE) if weighted else None
    f = lambda z: torch.nn.functional.cross_entropy(z, target, weight, label_smoothing=0.1) ** 2
    check_against_torch(f, x, modes=("hessian", "products", "gradient", "create_graph"))
    call = lambda m: torch.autograd.grad(m.hvp(f, y, torch.ones_like(y), create_graph=True)[1].sum(), y)[0]
    y = x.clone().requires_grad_()
    assert_same(call(wengert), call(torch_functional))
