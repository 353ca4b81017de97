"""Elementwise functions (reductions over short rows among them), the points at which their derivatives are compared with
PyTorch's, and all public functions that give such derivatives, element by element."""

from __future__ import annotations

import torch
import torch.nn.functional as F

INF, NAN = float("inf"), float("nan")

# 0 of both signs, subnormal, tiny, kinks and thresholds, saturation, overflow of exp and of squares, infinite, nan
POINTS = [
    0.0, -0.0, 1e-320, -1e-320, 1e-200, -1e-200, 1e-30, -1e-8, 1e-8, 0.25, -0.25, 0.5, -0.5, 0.9, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0,
    3.0, -3.0, 6.0, -6.0, 10.0, -10.0, 19.9, 20.0, 20.1, -20.0, 40.0, -40.0, 88.8, -88.8, 104.0, -104.0, 710.0, -710.0,
    746.0, -746.0, 1e4, -1e4, 1e30, -1e30, 1e200, -1e200, INF, -INF, NAN,
]  # fmt: skip
# Left out: where the two differ by rounding alone, but by much of a result that cancels, underflows or overflows on the way;
# where PyTorch's is nan for an overflow that ours does not have; and what is outside a function's domain.
KEPT = {
    **dict.fromkeys("digamma lgamma special.psi special.gammaln mvlgamma".split(), lambda x: x > -0.4),  # poles
    **dict.fromkeys("prod cumprod".split(), lambda x: (x == 0) | (x.abs() > 1e-9) & (x.abs() < 1e9)),
    "logit": lambda x: (x > 1e-9) & (x < 1),
    "logit eps": lambda x: (x > 0) & (x < 1),
    "bce": lambda x: (x.abs() < 9) & (x.abs() > 1e-9),
    "special.log_ndtr": lambda x: x > -19,
    "special.erfcx": lambda x: x < 15,
    "logsigmoid": lambda x: x.abs() < 9,  # PyTorch subtracts 1 from the sigmoid
    "log sigmoid": lambda x: x.abs() < 9,
    "tanhshrink": lambda x: x.abs() > 1e-3,
    "gelu": lambda x: ~x.isfinite() | (x.abs() < 5),
    "gelu tanh": lambda x: x.abs() < 5,
    **dict.fromkeys(("softmax of two", "log_softmax of two", "logsumexp of two"), lambda x: (x.abs() < 15) | (x.abs() > 80)),
    "hypot 0": lambda x: (x == 0) | (x.abs() > 1e-9),
    "norm 0.5": lambda x: (x == 0) | (x.abs() > 1e-9) & (x.abs() < 1e9),
    "prelu": lambda x: x != 0,  # the second derivative takes the other side there
    "0 xlogy": lambda x: x.abs() > 1e-9,
    "atan2 relu": lambda x: ~x.isfinite() | (x.abs() < 1e9),
    "rms_norm": lambda x: ~x.isfinite() | (x.abs() < 1e9),
}
# both arguments run over these
GRID = [0.0, -0.0, 0.5, 1.0, -1.0, 2.0, -2.0, 3.0, -2.5, 100.0, NAN]
SINGLE = {
    1e-320: 1e-44,
    -1e-320: -1e-44,
    1e-200: 1e-30,
    -1e-200: -1e-30,
    1e200: 1e25,
    -1e200: -1e25,
}  # in float32


def points(values, dtype):
    if dtype == torch.float32:
        values = [SINGLE.get(v, v) for v in values]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


UNARY = {
    name: getattr(torch, name)
    for name in "abs acos acosh asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 floor frac "
    "lgamma log log10 log1p log2 logit nan_to_num neg rad2deg reciprocal relu round rsqrt sgn sigmoid sign sin sinc sinh sqrt "
    "square tan tanh trunc i0".split()
}
UNARY |= {
    f"special.{name}": getattr(torch.special, name)
    for name in "entr erfcx i0e i1 i1e log_ndtr ndtr ndtri gammaln psi expit xlog1py".split()
    if name != "xlog1py"
}
UNARY |= {
    name: getattr(F, name)
    for name in "celu elu selu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu6 silu softplus "
    "softshrink softsign tanhshrink gelu".split()
}
UNARY |= {
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu parameters": lambda x: torch.ops.aten.elu(x, 1.2, 1.7, 0.6),
    "elu negative": lambda x: F.elu(x, -0.5),
    "celu 0.7": lambda x: F.celu(x, 0.7),
    "elu in place": lambda x: F.elu_(x * 1.5),
    "celu in place": lambda x: torch.celu_(x * 1.5, 0.7),
    "selu in place": lambda x: torch.selu_(x * 1.5),
    "leaky in place": lambda x: F.leaky_relu_(x * 1.5, 0.3),
    "rrelu": lambda x: F.rrelu(x, 0.1, 0.4),
    "softplus 2 3": lambda x: F.softplus(x, 2, 3),
    "threshold": lambda x: F.threshold(x, 0.5, 3.0),
    "hardtanh 0 1.5": lambda x: F.hardtanh(x, 0.0, 1.5),
    "softmax of one": lambda x: torch.softmax(x[:, None], 1)[:, 0],
    "log_softmax of one": lambda x: torch.log_softmax(x[:, None], 1)[:, 0],
    "logsumexp of one": lambda x: torch.logsumexp(x[:, None], 1),
    "logsumexp of two": lambda x: torch.logsumexp(torch.stack([x, x * 0.5], 1), 1),
    "softmax of two": lambda x: torch.softmax(torch.stack([x, x * 0.5], 1), 1)[:, 0],
    "log_softmax of two": lambda x: torch.log_softmax(torch.stack([x, x * 0.5], 1), 1)[:, 0],
    "glu": lambda x: F.glu(torch.stack([x, x], 1), 1)[:, 0],
    "prelu": lambda x: F.prelu(x[:, None], x.new_tensor([0.3]))[:, 0],
    "cbrt": lambda x: x.abs() ** (1 / 3),
    "clamp 0 1": lambda x: x.clamp(0, 1),
    "clamp nan": lambda x: x.clamp(NAN, 1),
    "clamp 2 1": lambda x: x.clamp(2, 1),
    "clamp min": lambda x: x.clamp(min=0),
    "clamp max": lambda x: x.clamp(max=1),
    "clamp min tensor": lambda x: x.clamp(min=x.new_tensor(0.5)),
    "clamp tensors": lambda x: torch.clamp(x, x.new_tensor(-1.0), x.new_tensor(1.0)),
    "fmod 1.5": lambda x: x.fmod(1.5),
    "fmod 0": lambda x: x.fmod(0),
    "remainder 1.5": lambda x: x.remainder(1.5),
    "remainder 0": lambda x: x.remainder(0),
    "copysign -1": lambda x: x.copysign(-1.0),
    "xlogx": lambda x: torch.xlogy(x, x),
    "xlogy 2": lambda x: torch.xlogy(x, 2.0),
    "xlogy 0": lambda x: torch.xlogy(x, 0.0),
    "0 xlogy": lambda x: torch.xlogy(0.0, x),
    "2 xlogy": lambda x: torch.xlogy(2.0, x),
    "0 xlog1py": lambda x: torch.special.xlog1py(0.0, x),
    "2 xlog1py": lambda x: torch.special.xlog1py(2.0, x),
    "xlog1py -1": lambda x: torch.special.xlog1py(x, -1.0),
    "x / x": lambda x: x / x,
    "1 / x": lambda x: 1 / x,
    "x / 0": lambda x: x / 0,
    "x / 3": lambda x: x / 3,
    "x * inf": lambda x: x * INF,
    "x * 0": lambda x: x * 0,
    "x ** x": lambda x: x**x,
    "hypot self": lambda x: torch.hypot(x, x),
    "hypot 0": lambda x: torch.hypot(x, x.new_zeros(())),
    "atan2 self": lambda x: torch.atan2(x, x),
    "atan2 relu": lambda x: torch.atan2(torch.relu(x), torch.relu(x)) * x,
    "atan2 0": lambda x: torch.atan2(x, x.new_zeros(())),
    "0 atan2": lambda x: torch.atan2(x.new_zeros(()), x),
    "maximum self": lambda x: torch.maximum(x, x),
    "maximum 1": lambda x: torch.maximum(x, x.new_ones(())),
    "maximum nan": lambda x: torch.maximum(x, x.new_tensor(NAN)),
    "fmax nan": lambda x: torch.fmax(x, x.new_tensor(NAN)),
    "fmin 1": lambda x: torch.fmin(x, x.new_ones(())),
    "logaddexp self": lambda x: torch.logaddexp(x, x),
    "logaddexp 0": lambda x: torch.logaddexp(x, x.new_zeros(())),
    "logaddexp -inf": lambda x: torch.logaddexp(x, x.new_tensor(-INF)),
    "logaddexp2 self": lambda x: torch.logaddexp2(x, x),
    "where": lambda x: torch.where(x > 0, x.sqrt(), x * x),
    "where log": lambda x: torch.where(x > 0, x.log(), x.exp()),
    "masked_fill": lambda x: x.sqrt().masked_fill(x <= 0, 0.0),
    "polygamma 1": lambda x: torch.polygamma(1, x),
    "polygamma 2": lambda x: torch.polygamma(2, x),
    "polygamma 3": lambda x: torch.polygamma(3, x),
    "mvlgamma": lambda x: torch.mvlgamma(x, 2),
    "logit eps": lambda x: torch.logit(x, 0.1),
    "relu then sqrt": lambda x: torch.relu(x).sqrt(),
    "sqrt of square": lambda x: (x * x).sqrt(),
    "sqrt of pow": lambda x: (x**2).sqrt(),
    "log of exp": lambda x: x.exp().log(),
    "log sigmoid": lambda x: x.sigmoid().log(),
    "exp of exp": lambda x: x.exp().exp(),
    "dropout": lambda x: F.dropout(x, 0.0),
    "norm of one": lambda x: x[:, None].norm(dim=1),
    "norm of two": lambda x: torch.stack([x, 0.5 * x], 1).norm(dim=1),
    "norm 1": lambda x: torch.stack([x, 0.5 * x], 1).norm(p=1, dim=1),
    "norm 3": lambda x: torch.stack([x, 0.5 * x], 1).norm(p=3, dim=1),
    "norm 1.5": lambda x: torch.stack([x, 0.5 * x], 1).norm(p=1.5, dim=1),
    "norm 0.5": lambda x: torch.stack([x, 0.5 * x], 1).norm(p=0.5, dim=1),
    "norm 0": lambda x: torch.stack([x, 0.5 * x], 1).norm(p=0, dim=1),
    "norm inf": lambda x: torch.stack([x, 0.5 * x], 1).norm(p=INF, dim=1),
    "norm inf tie": lambda x: torch.stack([x, x], 1).norm(p=INF, dim=1),
    "norm -inf": lambda x: torch.stack([x, 0.5 * x], 1).norm(p=-INF, dim=1),
    "normalize": lambda x: F.normalize(torch.stack([x, x + 1], 1), dim=1)[:, 0],
    "normalize of equal": lambda x: F.normalize(torch.stack([x, x], 1), dim=1)[:, 0],
    "normalize 1": lambda x: F.normalize(torch.stack([x, x * 2], 1), p=1, dim=1)[:, 0],
    "cosine": lambda x: F.cosine_similarity(torch.stack([x, x * 2], 1), torch.stack([x * 0.5, x + 1], 1), dim=1),
    "cosine of same": lambda x: F.cosine_similarity(torch.stack([x, x * 2], 1), torch.stack([x, x * 2], 1), dim=1),
    "pairwise": lambda x: F.pairwise_distance(torch.stack([x, x * 2], 1), torch.stack([x, x], 1)),
    "pairwise same": lambda x: F.pairwise_distance(torch.stack([x, x * 2], 1), torch.stack([x, x * 2], 1)),
    "pairwise eps 0": lambda x: F.pairwise_distance(torch.stack([x, x * 2], 1), torch.stack([x, x * 2], 1), eps=0.0),
    "std of two": lambda x: torch.stack([x, 0.5 * x], 1).std(1),
    "std of same": lambda x: torch.stack([x, x], 1).std(1),
    "std of one": lambda x: x[:, None].std(1),
    "std of one, uncorrected": lambda x: x[:, None].std(1, correction=0),
    "var of two": lambda x: torch.stack([x, 0.5 * x], 1).var(1),
    "var of one": lambda x: x[:, None].var(1),
    "var_mean": lambda x: torch.var_mean(torch.stack([x, 0.5 * x], 1), 1)[0],
    "std_mean": lambda x: torch.std_mean(torch.stack([x, x], 1), 1)[0],
    "prod": lambda x: torch.stack([x, x * 2, x], 1).prod(1),
    "prod with zero": lambda x: torch.stack([x, x * 0, x + 1], 1).prod(1),
    "cumprod": lambda x: torch.stack([x, x * 2, x], 1).cumprod(1)[:, 2],
    "logcumsumexp": lambda x: torch.stack([x, x * 2, x], 1).logcumsumexp(1)[:, 2],
    "amax": lambda x: torch.stack([x, x * 2, x], 1).amax(1),
    "max": lambda x: torch.stack([x, x * 2, x], 1).max(1)[0],
    "aminmax": lambda x: torch.stack([x, x * 2, x], 1).aminmax(dim=1)[0],
    "median": lambda x: torch.stack([x, x * 2, x], 1).median(1)[0],
    "nansum": lambda x: torch.stack([x, x * 2, x], 1).nansum(1),
    "nanmean": lambda x: torch.stack([x, x * 2, x], 1).nanmean(1),
    "layer_norm": lambda x: F.layer_norm(torch.stack([x, x * 2, x + 1], 1), (3,))[:, 0],
    "layer_norm of same": lambda x: F.layer_norm(torch.stack([x, x, x], 1), (3,))[:, 0],
    "rms_norm": lambda x: F.rms_norm(torch.stack([x, x * 2, x], 1), (3,))[:, 0],
    "renorm": lambda x: torch.renorm(torch.stack([x, x * 2], 1), 2, 0, 1.0)[:, 0],
    "cross_entropy": lambda x: F.cross_entropy(torch.stack([x, x * 2, -x], 1), x.new_zeros(len(x)).long(), reduction="none"),
    "nll": lambda x: F.nll_loss(torch.stack([x, x * 2, -x], 1), x.new_zeros(len(x)).long(), reduction="none"),
    "mse": lambda x: F.mse_loss(x, torch.ones_like(x), reduction="none"),
    "l1": lambda x: F.l1_loss(x, torch.ones_like(x), reduction="none"),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none"),
    "smooth_l1 0": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none", beta=0.0),
    "huber": lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none"),
    "bce": lambda x: F.binary_cross_entropy(x.sigmoid(), torch.full_like(x, 0.3), reduction="none"),
    "bce logits": lambda x: F.binary_cross_entropy_with_logits(x, torch.full_like(x, 0.3), reduction="none"),
    "kl_div": lambda x: F.kl_div(torch.full_like(x, -0.3), x, reduction="none"),
    "kl_div log": lambda x: F.kl_div(torch.full_like(x, -0.3), x, reduction="none", log_target=True),
    "poisson": lambda x: F.poisson_nll_loss(x, torch.full_like(x, 2.0), reduction="none", full=True),
    "gaussian": lambda x: F.gaussian_nll_loss(x, torch.ones_like(x), torch.ones_like(x), reduction="none"),
    "soft_margin": lambda x: F.soft_margin_loss(x, torch.ones_like(x), reduction="none"),
    "hinge": lambda x: F.hinge_embedding_loss(x, -torch.ones_like(x), reduction="none"),
}
for p in (-3, -2, -1, -0.5, 0, 0.0, 0.5, 1, 1.5, 2, 3, 4, 2.5, 0.3, -1.5, INF, NAN):
    UNARY[f"x ** {p}"] = lambda x, p=p: x**p
for b in (0.0, -0.0, 1.0, 2.0, -1.5, INF, NAN, 0.5):
    UNARY[f"{b} ** x"] = lambda x, b=b: torch.pow(b, x)
UNARY["x ** ints"] = lambda x: x ** (torch.arange(len(x)) % 5 - 2)
UNARY["zeros ** x"] = lambda x: torch.zeros_like(x) ** x
UNARY["float_power"] = lambda x: torch.float_power(x, 2.5).to(x.dtype)
UNARY["ldexp"] = lambda x: torch.ldexp(x, torch.full_like(x, 3.0))
UNARY["ldexp of"] = lambda x: torch.ldexp(torch.full_like(x, 3.0), x)

BINARY = {
    name: getattr(torch, name)
    for name in "add sub mul div atan2 pow hypot logaddexp logaddexp2 maximum minimum fmax fmin fmod remainder copysign xlogy "
    "ldexp floor_divide".split()
}
BINARY |= {
    "xlog1py": torch.special.xlog1py,
    "trunc div": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "lerp weight": lambda a, b: torch.lerp(a.new_tensor(0.7), a, b),
    "lerp low": lambda a, b: torch.lerp(a.new_tensor(0.7).expand(len(a)), a, b),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b, value=0.5),
    "clamp": lambda a, b: torch.clamp(a, min=b),
    "clamp both": lambda a, b: torch.clamp(a, min=b, max=b + 1),
    "clamp max": lambda a, b: torch.clamp(a, max=b),
    "where": lambda a, b: torch.where(a > b, a / b, a * b),
    "threshold prelu": lambda a, b: torch.where(a > 0, a, a * b),
    "norm": lambda a, b: torch.stack([a, b], 1).norm(dim=1),
    "norm 3": lambda a, b: torch.stack([a, b], 1).norm(p=3, dim=1),
    "norm 0.5": lambda a, b: torch.stack([a, b], 1).norm(p=0.5, dim=1),
    "norm inf": lambda a, b: torch.stack([a, b], 1).norm(p=INF, dim=1),
    "norm 1": lambda a, b: torch.stack([a, b], 1).norm(p=1, dim=1),
    "normalize": lambda a, b: F.normalize(torch.stack([a, b], 1), dim=1)[:, 0],
    "std": lambda a, b: torch.stack([a, b], 1).std(1),
    "var": lambda a, b: torch.stack([a, b], 1).var(1),
    "cumprod": lambda a, b: torch.stack([a, b, a], 1).cumprod(1)[:, 2],
    "logsumexp": lambda a, b: torch.logsumexp(torch.stack([a, b], 1), 1),
    "log_softmax": lambda a, b: torch.log_softmax(torch.stack([a, b], 1), 1)[:, 0],
    "softmax": lambda a, b: torch.softmax(torch.stack([a, b], 1), 1)[:, 0],
    "logcumsumexp": lambda a, b: torch.logcumsumexp(torch.stack([a, b, a], 1), 1)[:, 2],
    "cosine": lambda a, b: F.cosine_similarity(torch.stack([a, b], 1), torch.stack([b, a + 1], 1), dim=1),
    "cross_entropy": lambda a, b: F.cross_entropy(torch.stack([a, b], 1), a.new_zeros(len(a)).long(), reduction="none"),
    "amax": lambda a, b: torch.stack([a, b], 1).amax(1),
    "layer_norm": lambda a, b: F.layer_norm(torch.stack([a, b], 1), (2,))[:, 0],
    "mse": lambda a, b: F.mse_loss(a, b, reduction="none"),
    "smooth_l1": lambda a, b: F.smooth_l1_loss(a, b, reduction="none"),
    "huber": lambda a, b: F.huber_loss(a, b, reduction="none", delta=0.5),
    "l1": lambda a, b: F.l1_loss(a, b, reduction="none"),
    "bce logits": lambda a, b: F.binary_cross_entropy_with_logits(a, b, reduction="none"),
    "kl_div": lambda a, b: F.kl_div(a, b, reduction="none"),
    "poisson": lambda a, b: F.poisson_nll_loss(a, b, reduction="none"),
    "gaussian": lambda a, b: F.gaussian_nll_loss(a, torch.ones_like(a), b.abs() + 0.1, reduction="none"),
    "complex abs": lambda a, b: torch.complex(a, b).abs(),
    "dist cdist": lambda a, b: torch.cdist(a[:, None, None], b[:, None, None])[:, 0, 0],
}  # fmt: skip


WEIGHTS = (1.25, -0.75, 0.5, 2.0, -1.5)


def weights(x):
    return x.new_tensor(WEIGHTS).repeat(len(x) // len(WEIGHTS) + 1)[: len(x)]


# What stands around a function: nothing, a factor that depends on the input too, a square, a mask before it.
AROUND = {
    "alone": lambda f: f,
    "product": lambda f: lambda x, *r: f(x, *r) * x,
    "square": lambda f: lambda x, *r: f(x, *r) ** 2,
    "of relu": lambda f: lambda x, *r: f(torch.relu(x), *r),
    "masked": lambda f: lambda x, *r: torch.where(x > 0.7, f(x, *r), x),
    "exp": lambda f: lambda x, *r: torch.exp(f(x, *r)),
}


ORDER = {
    "grad": 1, "jacobian": 1, "vjp": 1, "jvp": 1, "jacrev": 1, "jacfwd": 1,
    "grad twice": 2, "hessian": 2, "hvp": 2, "vhp": 2, "func.hessian": 2,
    "grad three times": 3,
}  # fmt: skip


def diagonals(tree, n):
    """The entries on the structure: of n x n blocks the diagonals."""
    if isinstance(tree, torch.Tensor):
        return [tree.diagonal().clone() if tree.shape == (n, n) else tree]
    return [d for part in tree for d in diagonals(part, n)]


def forms(f, xs, functional, grad, func):
    """Derivatives of the elementwise function f, or of its weighted sum: name -> thunk that gives tensors of f's size."""
    n, w = len(xs[0]), weights(xs[0])
    single = len(xs) == 1
    given, argnums = (xs[0], 0) if single else (xs, tuple(range(len(xs))))
    directions = tuple(w.flip(0) * (k + 1) for k in range(len(xs)))
    v = directions[0] if single else directions

    def scalar(*args):
        return (f(*args) * w).sum()

    def gradients(order):
        inputs = [x.clone().requires_grad_() for x in xs]
        out, found = scalar(*inputs), ()
        for k in range(order):
            if not out.requires_grad:
                return [torch.zeros_like(x) for x in inputs]
            found = grad(out, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
            out = sum((g * (w + k)).sum() for g in found)
        return [g.detach() for g in found]

    def product(call, *args):
        result = call(*args)[1]
        return [result] if isinstance(result, torch.Tensor) else list(result)

    return {
        "grad": lambda: gradients(1),
        "grad twice": lambda: gradients(2),
        "grad three times": lambda: gradients(3),
        "jacobian": lambda: diagonals(functional.jacobian(f, given), n),
        "vjp": lambda: product(functional.vjp, f, given, w),
        "jvp": lambda: product(functional.jvp, f, given, v),
        "hessian": lambda: diagonals(functional.hessian(scalar, given), n),
        "hvp": lambda: product(functional.hvp, scalar, given, v),
        "vhp": lambda: product(functional.vhp, scalar, given, v),
        "jacrev": lambda: diagonals(func.jacrev(f, argnums)(*xs), n),
        "jacfwd": lambda: diagonals(func.jacfwd(f, argnums)(*xs), n),
        "func.hessian": lambda: diagonals(func.hessian(scalar, argnums)(*xs), n),
    }


def finite(t):
    return torch.where(t.isfinite(), t.abs().double(), 0.0)


def sizes(f, xs):
    """Order -> the size of what may have cancelled in a derivative of that order: lower derivatives over powers of x."""
    xs = [x.double().requires_grad_() for x in xs]
    inverse = finite(1 / torch.stack([x.detach().abs() for x in xs]).amin(0))
    level, found = f(*xs), []
    for _ in range(3):
        found.append(finite(level.detach()))
        level = level.sum()
        if not level.requires_grad:
            break
        try:
            level = sum(finite(g) * g.sign() for g in torch.autograd.grad(level, xs, create_graph=True, materialize_grads=True))
        except (RuntimeError, NotImplementedError):
            break

    def over_powers(d, order):
        for _ in range(order):
            d = finite(d * inverse)
        return d

    return {order: sum(over_powers(d, order - k) for k, d in enumerate(found)) for order in (1, 2, 3)}


def agreement(ours, theirs, size, noise=0.0):
    """Elementwise: equal, both nan, or as near as rounding leaves sums of terms of that size."""
    single = ours.dtype == torch.float32
    a, b = ours.detach().double(), theirs.detach().double()
    tolerance = (2e-4 if single else 1e-8) * b.abs() + (2e-4 if single else 1e-10) * size + (1e-36 if single else 1e-290) + noise
    return (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance)
