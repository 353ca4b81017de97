"""Random programs from primitives, views, reductions, products and index operations, against torch.

A program is a list of drawn steps that are applied to a growing list of values; every step knows what shapes it
takes, so any drawn list is a program. The result depends on all inputs through some path or not at all: both occur.
"""

import math
from collections.abc import Callable

import torch
import wengert
from hypothesis import example, given
from hypothesis import strategies as st
from support.check import DEVICE, assert_aggregate, leaves, scalarised
from support.compare import Tolerance, assert_same
from torch.autograd import functional as torch_functional

# Bounded and smooth where random arguments land: rounding must not be amplified into disagreement.
UNARY: list[Callable[[torch.Tensor], torch.Tensor]] = [
    torch.sin,
    torch.cos,
    torch.tanh,
    torch.sigmoid,
    torch.atan,
    torch.neg,
    torch.erf,
    torch.abs,
    torch.relu,
    torch.square,
    torch.asinh,
    lambda x: torch.exp(-x * x),
    lambda x: torch.log1p(x * x),
    lambda x: torch.sqrt(1 + x * x),
    lambda x: 1 / (2 + torch.cos(x)),
    lambda x: (x.abs() + 0.5) ** 1.3,
    lambda x: torch.nn.functional.softplus(x),
    lambda x: torch.nn.functional.silu(x),
    lambda x: torch.nn.functional.gelu(x),
    lambda x: torch.clamp(x, -0.7, 0.9),
    lambda x: x.double().to(x.dtype) * 0.5 + 1,
]
BINARY: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    lambda a, b: a / (2 + b.square()),
    torch.maximum,
    torch.hypot,
    torch.atan2,
    torch.logaddexp,
    lambda a, b: torch.where(a > b, a * b, a - b),
    lambda a, b: (a.abs() + 0.5) ** torch.tanh(b),
    lambda a, b: torch.lerp(a, b, 0.3),
    lambda a, b: torch.addcmul(a, a, b, value=0.5),
]


def reshaped(x: torch.Tensor, k: int) -> torch.Tensor:
    """Into one of the factorisations of its size, so digits carry in odd places."""
    n = x.numel()
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    d = divisors[k % len(divisors)]
    return x.reshape(d, n // d)


def window(x: torch.Tensor, k: int) -> torch.Tensor:
    axis = k % x.dim()
    size = x.shape[axis]
    start, step = (k // 3) % size, 1 + k % 2
    return x[(slice(None),) * axis + (slice(start, None, step),)]


def gathered(x: torch.Tensor, k: int) -> torch.Tensor:
    axis = k % x.dim()
    index = torch.tensor([(7 * i + k) % x.shape[axis] for i in range(1 + k % 4)], device=x.device)
    return x.index_select(axis, index) if k % 2 else x[(slice(None),) * axis + (index,)]


def scattered(x: torch.Tensor, k: int) -> torch.Tensor:
    rows = x.shape[0]
    index = torch.tensor([(5 * i + k) % (rows + 1) for i in range(rows)], device=x.device)
    return x.new_zeros((rows + 1, *x.shape[1:])).index_add(0, index, x)


VIEW: list[Callable[[torch.Tensor, int], torch.Tensor]] = [
    reshaped,
    window,
    gathered,
    scattered,
    lambda x, k: x.transpose(0, -1),
    lambda x, k: x.roll(k % 3 - 1, k % x.dim()),
    lambda x, k: x.flip(k % x.dim()),
    lambda x, k: x.unsqueeze(k % (x.dim() + 1)) if x.dim() < 3 else x,
    lambda x, k: x.select(k % x.dim(), k % x.shape[k % x.dim()]) if x.dim() > 1 else x,
    lambda x, k: torch.cat([x, x.sin()], k % x.dim()),
    lambda x, k: torch.nn.functional.pad(x, (k % 2, 1)),
    lambda x, k: x.unfold(k % x.dim(), 2, 1).sum(-1) if x.shape[k % x.dim()] >= 2 else x,
    lambda x, k: x.expand(2, *x.shape)[k % 2 :] if x.dim() < 3 else x,
    lambda x, k: torch.stack(x.unbind(k % x.dim())[::-1], 0),
    lambda x, k: x.tril(k % 3 - 1) if x.dim() >= 2 else x,
    lambda x, k: x.diagonal() if x.dim() == 2 else x,
    lambda x, k: x.detach() * x,
]
REDUCE: list[Callable[[torch.Tensor, int, bool], torch.Tensor]] = [
    lambda x, d, keep: x.sum(d, keepdim=keep),
    lambda x, d, keep: x.mean(d, keepdim=keep),
    lambda x, d, keep: x.logsumexp(d, keepdim=keep),
    lambda x, d, keep: x.amax(d, keepdim=keep),
    lambda x, d, keep: (1 + x.square()).sum(d, keepdim=keep).sqrt(),
    lambda x, d, keep: x.softmax(d),
    lambda x, d, keep: x.log_softmax(d),
    lambda x, d, keep: x.cumsum(d),
    lambda x, d, keep: torch.nn.functional.layer_norm(x, x.shape[-1:]) if x.shape[-1] > 1 else x,
    lambda x, d, keep: x.tanh().prod(d, keepdim=keep),
]


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A matrix product of whatever the two are: cut to fit, scaled to stay bounded."""
    a = a.reshape(-1, a.shape[-1])
    b = b.reshape(-1, b.shape[-1])
    n = min(a.shape[1], b.shape[1])
    return (a[:, :n] @ b[:, :n].t()) / math.sqrt(max(1, n))


STEP = st.one_of(
    st.tuples(st.just("unary"), st.integers(0, len(UNARY) - 1), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("binary"), st.integers(0, len(BINARY) - 1), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("view"), st.integers(0, len(VIEW) - 1), st.integers(0, 9), st.integers(0, 11)),
    st.tuples(st.just("reduce"), st.integers(0, len(REDUCE) - 1), st.integers(0, 9), st.integers(0, 5)),
    st.tuples(st.just("product"), st.just(0), st.integers(0, 9), st.integers(0, 9)),
)
SHAPE = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
PROGRAM = st.tuples(st.lists(SHAPE, min_size=1, max_size=2), st.lists(STEP, min_size=1, max_size=9))
LIMIT = 48  # elements of any value: torch's row loops are the cost of a test


def broadcastable(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a.shape), reversed(b.shape)))


def run(steps: list[tuple[str, int, int, int]], *inputs: torch.Tensor) -> torch.Tensor:
    values = list(inputs)
    for kind, which, i, j in steps:
        x = values[-1 - i % len(values)]
        if x.dim() == 0 and kind in ("view", "reduce", "product"):
            x = x.reshape(1)
        if kind == "unary":
            y = UNARY[which](x)
        elif kind == "view":
            y = VIEW[which](x, j)
        elif kind == "reduce":
            y = REDUCE[which](x, j % x.dim(), bool(j % 2))
        else:
            other = values[-1 - j % len(values)]
            if kind == "product":
                y = product(x, other.reshape(1) if other.dim() == 0 else other)
            else:
                y = BINARY[which](x, other if broadcastable(x, other) else other.sum())
        if 0 < y.numel() <= LIMIT:
            values.append(y)
    return values[-1]


def inputs_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(s, dtype=torch.float64, generator=generator, device="cpu").to(dtype).to(DEVICE) for s in shapes)


TOLERANCE = Tolerance(rtol=1e-7, atol=1e-9)


@given(PROGRAM)
@example(([(3, 4)], [("view", 0, 0, 3), ("unary", 0, 0, 0), ("view", 0, 0, 4)]))
@example(([(4,)], [("view", 5, 0, 2), ("binary", 2, 0, 1), ("view", 5, 0, 0), ("binary", 2, 0, 1)]))
def test_jacobian(program):
    shapes, steps = program
    xs = inputs_of(shapes)
    f = lambda *a: run(steps, *a)
    expected = torch_functional.jacobian(f, xs)
    assert_same(wengert.jacobian(f, xs), expected, "jacobian", TOLERANCE)
    leaf = tuple(x.clone().requires_grad_() for x in xs)
    y = f(*leaf)
    if y.requires_grad:
        assert_same(wengert.jacobian(y, leaf), expected, "graph form", TOLERANCE)


@given(PROGRAM)
def test_gradient(program):
    shapes, steps = program
    leaf = tuple(x.requires_grad_() for x in inputs_of(shapes))
    y = scalarised(lambda *a: run(steps, *a))(*leaf)
    if y.requires_grad:
        ours = wengert.grad(y, leaf, retain_graph=True, materialize_grads=True)
        assert_same(ours, torch.autograd.grad(y, leaf, retain_graph=True, materialize_grads=True), "grad", TOLERANCE)


@given(PROGRAM)
def test_hessian(program):
    shapes, steps = program
    xs = inputs_of(shapes)
    f = scalarised(lambda *a: run(steps, *a))
    assert_same(wengert.hessian(f, xs), torch_functional.hessian(f, xs), "hessian", TOLERANCE)


@given(PROGRAM)
def test_third_derivative(program):
    """Differentiate our Hessian's graph again: fused operators must be closed under differentiation."""
    shapes, steps = program
    f = scalarised(lambda *a: run(steps, *a))
    results = []
    for hessian in (wengert.hessian, torch_functional.hessian):
        leaf = tuple(x.requires_grad_() for x in inputs_of(shapes))
        total = sum(t.sum() for t in leaves(hessian(f, leaf, create_graph=True)))
        if total.requires_grad:
            results.append(torch.autograd.grad(total, leaf, materialize_grads=True))
        else:
            results.append(tuple(torch.zeros_like(x) for x in leaf))
    assert_same(*results, "third derivative", Tolerance(rtol=1e-6, atol=1e-8))


@given(PROGRAM)
def test_float32_aggregates(program):
    shapes, steps = program
    f = lambda *a: run(steps, *a)
    exact = torch_functional.jacobian(f, inputs_of(shapes))
    single = inputs_of(shapes, torch.float32)
    ours, peer = wengert.jacobian(f, single), torch_functional.jacobian(f, single)
    for a, b, c in zip(leaves(ours), leaves(peer), leaves(exact)):
        assert a.dtype == torch.float32
        # Where float32 rounding decides a branch torch itself is far from float64: nothing to compare there.
        if float((b.double() - c).norm()) <= 1e-3 * (1 + float(c.norm())):
            assert_aggregate(a, b, c, "float32 jacobian")


@given(st.lists(st.tuples(SHAPE, st.lists(STEP, min_size=1, max_size=5)), min_size=2, max_size=4))
def test_plans_do_not_leak_between_programs(programs):
    """Interleaved calls of different programs and values get their own results."""
    for _ in range(2):
        for shape, steps in programs:
            xs = inputs_of([shape])
            f = lambda *a, steps=steps: run(steps, *a)
            assert_same(wengert.jacobian(f, xs), torch_functional.jacobian(f, xs), "interleaved", TOLERANCE)
            shifted = (xs[0] + 0.1,)
            assert_same(wengert.jacobian(f, shifted), torch_functional.jacobian(f, shifted), "other values", TOLERANCE)
