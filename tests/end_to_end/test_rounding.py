"""float32 errors of derivatives that cancel: over some draws together they stay near PyTorch's own, whatever single ones do.

Of what cancels exactly in PyTorch only: see the README's intended differences.
"""

import pytest
import torch
import torch.nn.functional as F
import wengert
from support.check import DEVICE, scalarised, weights_like
from torch.nn.attention import SDPBackend, sdpa_kernel

DRAWS, SIZE = 12, 12
CLASSES = torch.tensor([0, 2, 1, 1], device=DEVICE)
EPS = torch.finfo(torch.float32).eps


def rows(x):
    return x.reshape(4, 3)


def shares(x):
    return rows(torch.arange(float(SIZE), dtype=x.dtype, device=x.device)).softmax(1)


def attention(x):
    with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
        return F.scaled_dot_product_attention(x.reshape(1, 4, 3) * 3, x.reshape(1, 4, 3), x.reshape(1, 4, 3))


FUNCTIONS = {
    "1000 logsumexp": lambda x: 1e3 * x.logsumexp(0),
    "logsumexp of 20": lambda x: (20 * x).logsumexp(0),
    "200 log_softmax": lambda x: 200 * x.log_softmax(0),
    "200 log_softmax, an entry": lambda x: 200 * x.log_softmax(0)[3],
    "200 log_softmax, the sum": lambda x: 200 * x.log_softmax(0).sum(),
    "cross_entropy of 200": lambda x: F.cross_entropy(200 * rows(x), CLASSES),
    "cross_entropy": lambda x: F.cross_entropy(rows(x), CLASSES),
    "cross_entropy by rows": lambda x: F.cross_entropy(5 * rows(x), CLASSES, reduction="none"),
    "cross_entropy of shares": lambda x: F.cross_entropy(5 * rows(x), shares(x)),
    "cross_entropy, smoothed": lambda x: F.cross_entropy(5 * rows(x), CLASSES, label_smoothing=0.1),
    "nll_loss": lambda x: F.nll_loss(F.log_softmax(5 * rows(x), 1), CLASSES),
    "kl_div": lambda x: F.kl_div(F.log_softmax(3 * rows(x), 1), shares(x), reduction="sum"),
    "entropy": lambda x: -(x.softmax(0) * x.log_softmax(0)).sum(),
    "softmax": lambda x: x.softmax(0),
    "softmax of 5": lambda x: (5 * x).softmax(0),
    "softmin": lambda x: F.softmin(3 * x, 0),
    "softplus": lambda x: F.softplus(5 * x),
    "sigmoid": lambda x: (5 * x).sigmoid(),
    "logsigmoid": lambda x: F.logsigmoid(5 * x),
    "binary cross entropy": lambda x: F.binary_cross_entropy_with_logits(5 * x, (x > 0).to(x)),
    "logaddexp": lambda x: torch.logaddexp(5 * x[:6], 5 * x[6:]),
    "logcumsumexp": lambda x: (3 * x).logcumsumexp(0),
    "attention": attention,
    "silu": lambda x: F.silu(5 * x),
    "mish": lambda x: F.mish(5 * x),
    "gelu": F.gelu,
    "tanh": lambda x: (3 * x).tanh(),
}


def derivatives(f, functional, func):
    """Each takes all draws, one a row, as float32 or float64."""
    scalar, hessian = scalarised(f), func.hessian(scalarised(f))
    by_rows = {
        "jacobian": lambda x: functional.jacobian(f, x),
        "hessian": lambda x: functional.hessian(scalar, x),
        "hvp": lambda x: functional.hvp(scalar, x, weights_like(x))[1],
        "vhp": lambda x: functional.vhp(scalar, x, weights_like(x))[1],
        "func.hessian": hessian,
    }
    return {name: lambda xs, of=of: torch.stack([of(x) for x in xs]) for name, of in by_rows.items()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_of_float32_stay_near_those_of_pytorch(name):
    f = FUNCTIONS[name]
    x = torch.randn(DRAWS, SIZE, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    reference = derivatives(f, torch.autograd.functional, torch.func)
    exact = {form: of(x.double()) for form, of in reference.items()}
    peers = {form: of(x) for form, of in reference.items()}
    found = {form: of(x) for form, of in derivatives(f, wengert, wengert.func).items()}
    found["batch_jacobian"] = wengert.batch_jacobian(torch.func.vmap(f), x)
    lines = []
    for form, mine in found.items():
        # Forward mode rounds otherwise than reverse mode, which ours is.
        peer = {"batch_jacobian": "jacobian", "func.hessian": "hessian"}.get(form, form)
        truth, theirs = exact[peer], {peer: peers[peer], form: peers.get(form, peers[peer])}
        if truth.isnan().any():  # hvp of logcumsumexp
            continue
        errors = [(d.double() - truth) / truth.abs().max() for d in (mine, *theirs.values())]
        for measure, of, floor in (
            ("rms", lambda e: e.square().mean().sqrt(), EPS),
            ("largest", lambda e: e.abs().max(), 4 * EPS),
        ):
            own, *bounds = [of(e).item() for e in errors]
            if not own <= 4 * max(bounds) + floor:
                lines.append(f"{form}: {measure} error {own:.1e}, torch's {max(bounds):.1e}")
    assert not lines, "\n".join(lines)


def mathematical_attention(q, k, v):
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's kernel need not have a second derivative
        return F.scaled_dot_product_attention(q, k, v)


TWICE = {
    "softmax": lambda x: ((x @ x.T).softmax(-1) @ x).square().sum(),
    "softmax in float32": lambda x: ((x @ x.T).float().softmax(-1) @ x.float())[1].sum(),
    "attention": lambda x: mathematical_attention(x[None], x[None] * 0.5, x[None])[0, 1].sum(),
    "product": lambda x: x.prod(-1).sum(),
}
SECOND = {
    "hvp": lambda m, n, f, x: m.hvp(f, x, torch.ones_like(x))[1],
    "vhp": lambda m, n, f, x: m.vhp(f, x, torch.ones_like(x))[1],
    "hessian": lambda m, n, f, x: m.hessian(f, x),
    "func.hessian": lambda m, n, f, x: n.hessian(f)(x),
    "jacrev of jacrev": lambda m, n, f, x: n.jacrev(n.jacrev(f))(x),
    "jacrev of a function with grad": lambda m, n, f, x: n.jacrev(lambda x: n.grad(f)(x))(x),
    "vmap(hessian)": lambda m, n, f, x: n.vmap(n.hessian(f))(x[None])[0],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", SECOND)
@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives_in_half_precision(name, form, dtype):
    """PyTorch's own: what is rounded between terms that cancel can be a thousand times what is left."""
    worst = {"mine": 0.0, "theirs": 0.0}
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 5, generator=generator, device="cpu").mul(3).to(DEVICE, dtype)
        exact = SECOND[form](torch.autograd.functional, torch.func, TWICE[name], x.double()).double()
        for who, modules in (("mine", (wengert, wengert.func)), ("theirs", (torch.autograd.functional, torch.func))):
            found = SECOND[form](*modules, TWICE[name], x).double()
            worst[who] = max(worst[who], float((found - exact).abs().max() / exact.abs().max()))
    assert worst["mine"] <= 1.5 * worst["theirs"], worst
