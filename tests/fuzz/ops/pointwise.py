"""Elementwise functions of one or two values; dtypes."""

import math

import torch
import torch.nn.functional as nnf
from draw import op

SMOOTH = [
    torch.sin,
    torch.tanh,
    torch.sigmoid,
    torch.atan,
    torch.erf,
    torch.asinh,
    torch.square,
    torch.neg,
    torch.sinc,
    nnf.softplus,
    nnf.silu,
    nnf.mish,
    nnf.logsigmoid,
    lambda x: torch.exp(-x * x),
    lambda x: torch.log1p(x * x),
    lambda x: 1 / (2 + torch.cos(x)),
    lambda x: torch.expm1(x).log1p().atan(),
    lambda x: torch.special.i0(x) * 0.3 + torch.lgamma(x.abs() + 0.5),
    lambda x: torch.special.xlog1py(x, x.abs() + 0.1),
    lambda x: torch.digamma(x.abs() + 1),
    lambda x: torch.acos(0.5 * torch.tanh(x)),
]
KINKED = [
    torch.abs,
    nnf.relu,
    nnf.relu6,
    nnf.elu,
    nnf.selu,
    nnf.celu,
    nnf.hardtanh,
    nnf.hardswish,
    nnf.hardsigmoid,
    nnf.softshrink,
    nnf.hardshrink,
    nnf.tanhshrink,
    nnf.softsign,
    torch.frac,
    lambda x: nnf.threshold(x, 0.1, 0.0),
    lambda x: x.clamp(min=0.0),
    lambda x: torch.fmod(x, 0.7) + torch.remainder(x, 0.9),
    lambda x: torch.sign(x) * x + torch.floor(x),
]
PAIRS = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.atan2,
    torch.maximum,
    torch.minimum,
    torch.fmax,
    torch.logaddexp,
    torch.logaddexp2,
    torch.hypot,
    lambda a, b: a / (2 + b * b),
    lambda a, b: torch.where(a > b, a, b * 2),
    lambda a, b: (a.abs() + 0.5) ** torch.tanh(b),
    lambda a, b: torch.xlogy(a, b.abs() + 0.1),
    lambda a, b: torch.copysign(a, b),
    lambda a, b: torch.special.entr(a.abs() + 0.1) * b,
]


@op
def smooth(x, d):
    return d.choice(SMOOTH)(x)


@op
def kinked(x, d):
    return d.choice(KINKED)(x)


@op
def pair(x, d):
    return d.choice(PAIRS)(x, d.other(x))


@op
def pair_with_itself(x, d):
    return d.choice(PAIRS)(x, d.choice([lambda: x, lambda: x.flip(-1), lambda: x.roll(1, -1)])())


@op
def with_a_number(x, d):
    s = d.value([0.0, 1.0, -1.0, 2.0, 0.5, d.number()])
    return d.choice(
        [
            lambda: torch.sin(x) * s + x,
            lambda: x / (s if s else 1.0),
            lambda: x.clamp(-0.5, 0.5 + abs(s)),
            lambda: torch.add(x, x.flip(-1), alpha=s),
            lambda: nnf.leaky_relu(x, abs(s) * 0.1),
            lambda: nnf.elu(x, 1 + abs(s)),
            lambda: torch.lerp(x, x.flip(-1), s),
            lambda: nnf.softplus(x, beta=1 + abs(s)),
            lambda: nnf.gelu(x, approximate=d.choice(["none", "tanh"])),
            lambda: torch.addcmul(x, x, x.cos(), value=s),
            lambda: torch.addcdiv(x, x, x.cos() + 2, value=s),
            lambda: torch.rsub(x, x.sin(), alpha=s),
        ]
    )()


@op
def powers(x, d):
    return d.choice(
        [
            lambda: (x * d.mask(x.shape)) ** d.value([0, 1, 2, 3]),
            lambda: torch.pow(x.abs() + 0.1, x),
            lambda: torch.pow(d.value([1.0, 2.0, 0.5]), x.abs() + 0.1),
            lambda: torch.pow(x.abs() * d.mask(x.shape), d.choice([0.0, 1.0, 2.0, 2.5])),
            lambda: x.square() ** 1.5,
            lambda: torch.sqrt(1 + x * x),
            lambda: torch.rsqrt(1 + x * x),
            lambda: x**3,
        ]
    )()


@op
def long_chain(x, d):
    for _ in range(d.integer(3, 9)):
        x = d.choice(SMOOTH)(x)
    return x


@op
def polynomial(x, d):
    return sum(c * x**k for k, c in enumerate(d.tensor(4).tolist()))


@op
def shared_subexpression(x, d):
    s = torch.sin(x) * d.other(x)
    return s * s + torch.exp(-s.abs()) * s.roll(1, -1)


@op(single=True)
def through_float32(x, d):
    return x.to(torch.float32).to(x.dtype) * 2 + x if d.chance(0.5) else torch.where(x > 0, x, x.float())


@op
def integers_among_floats(x, d):
    return d.choice(
        [
            lambda: x + x.detach().long() + (x > 0),
            lambda: x * (torch.arange(d.size(x)).reshape(d.inner(x)) % 3),
            lambda: x * d.mask(x.shape),
        ]
    )()


@op
def near_limits(x, d):
    return d.choice(
        [
            lambda: torch.sigmoid(30 * x),
            lambda: torch.log(torch.sigmoid(20 * x) + 1e-3),
            lambda: torch.exp(x.clamp(max=0.5)) * math.pi,
            lambda: torch.tanh(20 * x) * x,
            lambda: torch.atan2(nnf.relu(x), nnf.relu(x) + 1) * x,
            lambda: nnf.softplus(25 * x),
        ]
    )()
