"""Value and derivatives of every primitive against torch: regular points, kinks, ties and special values."""

import pytest
import torch
import wengert  # noqa: F401  (registers the op)
from wengert.reference import PRIMITIVES, evaluate

INF, NAN = float("inf"), float("nan")
REGULAR = [-2.7, -1.3, -0.6, -0.1, 0.2, 0.5, 0.9, 1.4, 3.1, 5.5]
UNIT = [-0.95, -0.6, -0.3, -0.001, 0.02, 0.4, 0.77, 0.99]
POSITIVE = [0.03, 0.4, 0.9, 1.0, 1.7, 4.2, 11.0]
KINKS = [-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0, 20.0]

UNARY = {
    **dict.fromkeys(
        "neg abs sign square exp exp2 expm1 sin cos tan atan sinh cosh tanh asinh sigmoid logsigmoid silu gelu_erf gelu_tanh "
        "mish selu relu relu6 hardsigmoid hardswish tanhshrink softsign erf erfc sinc floor ceil round trunc logical_not "
        "isnan".split(),
        REGULAR + KINKS,
    ),
    **dict.fromkeys("asin acos atanh erfinv".split(), UNIT),
    **dict.fromkeys("sqrt rsqrt log log2 log10 digamma trigamma lgamma cbrt reciprocal".split(), POSITIVE),
    "log1p": UNIT + POSITIVE,
    "acosh": [1.001, 1.5, 3.0, 20.0],
    "lgamma": POSITIVE + [-0.4, -1.7, -2.5],
    "digamma": POSITIVE + [-0.4, -1.7, -2.5],
    "reciprocal": POSITIVE + [-2.0],
}

PAIRS = [(a, b) for a in [-2.5, -1.0, 0.0, 0.7, 1.0, 3.0] for b in [-1.5, 0.0, 0.7, 1.0, 2.0]]
POSITIVE_PAIRS = [(a, b) for a in POSITIVE for b in [-1.5, -0.3, 0.0, 0.5, 1.0, 2.0, 3.0]]
BINARY = {
    **dict.fromkeys("add sub mul maximum minimum fmax fmin copysign lt le gt ge eq ne logical_and logical_or".split(), PAIRS),
    **{name: [(a, b) for a, b in PAIRS if b != 0] for name in "div fmod remainder hypot atan2".split()},
    **dict.fromkeys("logaddexp logaddexp2 heaviside".split(), PAIRS),
    "pow": POSITIVE_PAIRS + [(0.0, 0.0), (0.0, 2.0)],
    "xlogy": [(b, a) for a, b in POSITIVE_PAIRS] + [(0.0, 0.0), (0.0, -1.0)],
    "xlog1py": [(b, a) for a, b in POSITIVE_PAIRS] + [(0.0, -1.0)],
}

# argument lists with literal parameters: x is the differentiated operand
PARAMETRIC = {
    "pow a0 0": REGULAR + [0.0],
    "pow a0 1": REGULAR + [0.0],
    "pow a0 2": REGULAR + [0.0],
    "pow a0 3": REGULAR + [0.0],
    "pow a0 0.5": POSITIVE,
    "pow a0 -0.5": POSITIVE,
    "pow a0 -1": REGULAR,
    "pow a0 -2": REGULAR,
    "pow a0 2.5": POSITIVE,
    "pow a0 5": REGULAR + [0.0],
    "pow 2 a0": REGULAR + [0.0],
    "pow 0 a0": [0.0, 1.5, 2.0],
    "softplus a0 1 20": REGULAR + KINKS + [25.0],
    "softplus a0 2 3": REGULAR + [1.4, 1.6],
    "elu a0 1.5 1 1": REGULAR + KINKS[:-1],
    "elu a0 1.2 2 0.5": REGULAR + KINKS[:-1],
    "celu a0 1.5": REGULAR + KINKS[:-1],
    "leaky_relu a0 0.1": REGULAR + KINKS,
    "hardtanh a0 -1 1": REGULAR + KINKS,
    "clamp a0 -1 1": REGULAR + KINKS,
    "clamp a0 -inf 1": REGULAR + KINKS,
    "clamp a0 2 1": REGULAR + KINKS,
    "polygamma 2 a0": POSITIVE,
    "polygamma 3 a0": POSITIVE,
    "where a0 a0 3": REGULAR + [0.0],
    "div 1 a0": REGULAR,
    "maximum a0 1": REGULAR + [1.0],
}

CASES = (
    [(f"{name} a0", [(x,) for x in points]) for name, points in UNARY.items()]
    + [(f"{name} a0 a1", points) for name, points in BINARY.items()]
    + [(call, [(x,) for x in points]) for call, points in PARAMETRIC.items()]
)
# what torch itself differentiates less often
ORDERS = {"hardsigmoid a0": 1, "heaviside a0 a1": 0}


# PyTorch 2.14 chose other derivatives for these at ties.  What a program's text means does not hang on the installed PyTorch; the
# readers of the graph choose what that does.
TIES_CHANGED = {"fmax", "fmin", "clamp"}
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def untied(call, points):
    """The points where no two arguments of the call are equal."""
    arguments = call.split()[1:]
    values = [[point[int(a[1:])] if a[0] == "a" else float(a) for a in arguments] for point in points]
    return [point for point, row in zip(points, values) if len(set(row)) == len(row)]


def text(call, operands, compute="f64", out="f64"):
    return f"fused v1 rank=1 operands={operands} compute={compute}\nt0 = {call}\nout t0 {out}\n"


def columns(points, dtype=torch.float64):
    return [torch.tensor(column, dtype=dtype, requires_grad=True) for column in zip(*points)]


def derivatives(fn, points, order):
    """fn's value and, order by order, the gradients of the weighted sum of all gradients so far."""
    operands = columns(points)
    level = [fn(operands)]
    collected = [level[0].detach()]
    for _ in range(order):
        total = sum((value * (1 + 0.3 * k)).sum() for k, value in enumerate(level))
        if not total.requires_grad:
            grads = [None] * len(operands)
        else:
            grads = torch.autograd.grad(total, operands, create_graph=True, allow_unused=True)
        level = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, operands)]
        collected += [g.detach() for g in level]
    return collected


@pytest.mark.parametrize("call, points", CASES, ids=[case[0] for case in CASES])
def test_value_and_derivatives(call, points):
    if TORCH >= (2, 14) and call.split()[0] in TIES_CHANGED:
        points = untied(call, points)
    program = text(call, len(points[0]))
    order = ORDERS.get(call, 2)
    ours = derivatives(lambda xs: torch.ops.wengert.fused(xs, program)[0], points, order)
    torchs = derivatives(lambda xs: evaluate(xs, program)[0], points, order)
    for k, (mine, theirs) in enumerate(zip(ours, torchs, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, equal_nan=True, msg=lambda m, k=k: f"derivative {k}: {m}")


def test_every_primitive_is_covered():
    covered = {case[0].split()[0] for case in CASES}
    assert covered == set(PRIMITIVES)


SPECIAL = [0.0, -0.0, INF, -INF, NAN, 1e-310, -1e-310, 1e300, -1e300, 1.0, -1.0, 0.5, 88.8, -104.0, 710.0]


@pytest.mark.parametrize("name", sorted(set(UNARY) - {"cbrt"}))
def test_special_values(name):
    x = torch.tensor(SPECIAL, dtype=torch.float64)
    program = text(f"{name} a0", 1)
    mine, theirs = torch.ops.wengert.fused([x], program)[0], evaluate([x], program)[0]
    rtol = 1e-8 if name == "trigamma" else 1e-12  # torch's own has ten digits
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=1e-300, equal_nan=True)


@pytest.mark.parametrize("name", sorted(set(BINARY)))
def test_special_pairs(name):
    grid = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 2.5, -2.5, 3.0], dtype=torch.float64)
    a, b = (t.reshape(-1).contiguous() for t in torch.meshgrid(grid, grid, indexing="ij"))
    program = text(f"{name} a0 a1", 2)
    mine, theirs = torch.ops.wengert.fused([a, b], program)[0], evaluate([a, b], program)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("name", sorted(set(UNARY) - {"digamma", "trigamma", "lgamma", "cbrt"}))
def test_float32_accuracy(name):
    """Against float64 at the same points: worst error, and no bias."""
    low, high = min(UNARY[name]), max(UNARY[name])
    x = torch.linspace(low, high, 4001, dtype=torch.float32)
    mine = torch.ops.wengert.fused([x], text(f"{name} a0", 1, "f32", "f32"))[0].double()
    exact = evaluate([x.double()], text(f"{name} a0", 1))[0]
    theirs = evaluate([x], text(f"{name} a0", 1, "f32", "f32"))[0].double()
    scale = exact.abs() + 1e-3 * exact.abs().max() + 1e-30
    error, reference = (mine - exact) / scale, (theirs - exact) / scale
    assert error.abs().max() <= max(2 * reference.abs().max().item(), 4e-7)
    assert abs(error.mean().item()) <= max(2 * abs(reference.mean().item()), 2e-8)
