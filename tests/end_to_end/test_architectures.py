"""Small networks with torch.nn modules and functionals."""

import torch
import torch.nn.functional as F
from support.zoo import Zoo
from torch import nn

zoo = Zoo()

ACTIVATIONS = (
    "ReLU LeakyReLU ELU CELU SELU GELU SiLU Mish Softplus Sigmoid LogSigmoid Tanhshrink Softsign Hardswish Hardsigmoid ReLU6"
).split()


def of_parameters(module, x, loss):
    """The loss as a function of the module's parameters."""
    names, values = zip(*((n, p.detach().clone()) for n, p in module.named_parameters()))
    return lambda *ps: loss(torch.func.functional_call(module, dict(zip(names, ps)), (x,))), values


@zoo.case("MLP in inputs and weights")
def _(r):
    w3 = r(4, 2)
    return lambda x, a, b, c: ((x @ a + c).tanh() @ b).tanh() @ w3, (r(3, 3), r(3, 4), r(4, 4), r(4))


@zoo.case("residual MLP")
def _(r):
    w = r(4, 4)

    def f(x):
        for _ in range(3):
            x = x + (x @ w).tanh() @ w * 0.1
        return x

    return f, r(4, 4)


@zoo.case("sequential of linears")
def _(r):
    return r.module(nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))), r(3, 3)


for _name in ACTIVATIONS:

    @zoo.case(f"activation {_name}")
    def _(r, name=_name):
        return r.module(nn.Sequential(nn.Linear(2, 3), getattr(nn, name)(), nn.Linear(3, 2))), r(3, 2)


@zoo.case("parameters of a classifier")
def _(r):
    net = r.module(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    target = torch.arange(5) % 3
    return of_parameters(net, r(5, 3), lambda z: F.cross_entropy(z, target, reduction="none"))


for _loss in (
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy_with_logits",
    "soft_margin_loss",
    "kl_div",
):

    @zoo.case(f"loss {_loss}")
    def _(r, loss=_loss):
        y = r.positive(4, 3) - 0.5
        return lambda x: getattr(F, loss)(x, y, reduction="none"), r(4, 3)


@zoo.case("mse of a broadcast prediction and target", skip=("func", "forward"))  # PyTorch's rules refuse to broadcast
def _(r):
    def f(x, t):
        mse = torch.ops.aten.mse_loss
        return torch.stack([mse(x.sin(), t, 1), mse(t.exp(), x, 2), mse(x.exp(), t, 0).square().sum()])

    return f, (r(4, 3), r(3))


@zoo.case("conv1d, transposed and pooled")
def _(r):
    net = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.AvgPool1d(2), nn.ConvTranspose1d(3, 2, 3, stride=2))
    return r.module(net), r(2, 2, 6)


@zoo.case("conv2d with stride, groups and max pooling")
def _(r):
    net = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Softplus(), nn.MaxPool2d(2), nn.Flatten())
    return r.module(net), r(2, 2, 6, 6)


@zoo.case("conv2d in its weights")
def _(r):
    x = r(2, 1, 4, 4)
    return lambda w, b: F.conv2d(x, w, b, dilation=2).tanh(), (r(2, 1, 2, 2), r(2))


@zoo.case("padded and strided conv2d in data and weights")
def _(r):
    return lambda x, w, b: F.conv2d(x, w, b, stride=(1, 2), padding=(0, 1)).sigmoid(), (r(2, 2, 3, 4), r(2, 2, 2, 3), r(2))


@zoo.case("depthwise conv1d in its weights")
def _(r):
    x = r(2, 3, 5)
    return lambda w: F.conv1d(x, w, groups=3, padding=1, dilation=2).tanh(), r(3, 1, 3)


@zoo.case("grouped and transposed conv1d in their weights")
def _(r):
    x = r(2, 4, 4)
    return lambda w, v: F.conv_transpose1d(F.conv1d(x, w, groups=2).tanh(), v, stride=2), (r(4, 2, 2), r(4, 1, 2))


@zoo.case("conv3d")
def _(r):
    return r.module(nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh())), r(1, 1, 3, 3, 2)


@zoo.case("adaptive and unfolded pooling")
def _(r):
    return lambda x: F.adaptive_avg_pool2d(F.unfold(x, 2)[:, None], (2, 3)).exp(), r(2, 1, 3, 4)


@zoo.case("upsampling")
def _(r):
    return lambda x: F.interpolate(x, scale_factor=2, mode="bilinear").square() + F.interpolate(x, size=(4, 6)), r(1, 2, 2, 3)


@zoo.case("layer norm with affine")
def _(r):
    x = r(3, 4)
    return lambda y, w, b: F.layer_norm((y + x).sin(), (4,), w, b), (r(3, 4), r(4), r(4))


@zoo.case("batch norm, training", skip=("func", "forward", "value"))
def _(r):
    w, b = r(3), r(3)
    return lambda x: F.batch_norm(x.sin(), None, None, w, b, training=True), r(5, 3)


@zoo.case("batch norm, evaluation")
def _(r):
    net = r.module(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())).eval()
    return net, r(4, 3)


@zoo.case("group, instance and rms norm")
def _(r):
    def f(x):
        y = F.group_norm(x, 2) * F.instance_norm(x.exp())
        return y + F.rms_norm(x, (3,))

    return f, r(2, 4, 3)


@zoo.case("parameters of norms", skip=("func", "forward"))  # which miss what mean and deviation depend on
def _(r):
    x, moved = r(3, 4, 2), r(3, 4, 2)

    def f(a, w, b, v):
        x1 = x + a * moved
        layer = F.layer_norm(x1, (4, 2), w.unsqueeze(1) * v, b.unsqueeze(1) * v)
        return torch.stack([layer, F.group_norm(x1, 2, w, b), F.rms_norm(x1, (2,), v)]).sin()

    return f, (r(1), r(4), r(4), r(2))


@zoo.case("parameters of a batch norm, training", skip=("func", "forward", "value"))
def _(r):
    x, moved = r(3, 4, 2), r(3, 4, 2)
    return lambda a, w, b: F.batch_norm(x + a * moved, None, None, w, b, training=True).sin(), (r(1), r(4), r(4))


@zoo.case("parameters of a batch norm, evaluation")
def _(r):
    x, mean, variance = r(3, 4, 2), r(4), r.positive(4)
    return lambda a, w, b: F.batch_norm(x * a, mean, variance, w, b).sin(), (r(3, 1, 2), r(4), r(4))


@zoo.case("attention block")
def _(r):
    wq, wk, wv, wo = (r(4, 4) * 0.5 for _ in range(4))

    def f(x):
        b, t, _ = x.shape
        q, k, v = ((x @ w).reshape(b, t, 2, 2).transpose(1, 2) for w in (wq, wk, wv))
        a = (q @ k.transpose(-2, -1) / 2**0.5).softmax(-1)
        x = x + (a @ v).transpose(1, 2).reshape(b, t, 4) @ wo
        return F.layer_norm(x, (4,))

    return f, r(2, 3, 4)


@zoo.case("causal attention by masked_fill")
def _(r):
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)

    def f(q, k, v):
        return (q @ k.transpose(-2, -1)).masked_fill(mask, float("-inf")).softmax(-1) @ v

    return f, (r(2, 3, 2), r(2, 3, 2), r(2, 3, 2))


@zoo.case("scaled dot product attention, math", skip=("forward",))
def _(r):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def f(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return f, (r(1, 2, 3, 2), r(1, 2, 3, 2), r(1, 2, 3, 2))


# The fused kernel's own backward has no derivative, so that Hessians are errors; under torch.func it is not batched.
ONCE = ("hessian", "products", "gradient", "create_graph", "history", "graph", "forward", "func")


@zoo.case("scaled dot product attention", skip=ONCE)
def _(r):
    later = r(1, 2, 3, 3)

    def f(q, k, v, x):
        plain = F.scaled_dot_product_attention(q, k, v)
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)
        masked = F.scaled_dot_product_attention(x, x, x, attn_mask=later > 0)
        biased = F.scaled_dot_product_attention(q.sin(), k, v, attn_mask=later)
        return torch.stack([plain, causal, masked.tanh(), biased])

    return f, (r(2, 2, 3, 2), r(2, 2, 3, 2), r(2, 2, 3, 2), r(2, 2, 3, 2))


@zoo.case("embedding with shared rows")
def _(r):
    at = torch.tensor([[0, 2, 1], [2, 2, 3]])
    w = r(3, 2)
    return lambda table: (F.embedding(at, table) @ w).tanh().sum(1), r(4, 3)


@zoo.case("gated recurrent cell")
def _(r):
    cell = r.module(nn.GRUCell(2, 3))
    xs = r(4, 2, 2)

    def f(h):
        for x in xs:
            h = cell(x, h)
        return h

    return f, r(2, 3)


@zoo.case("LSTM cell")
def _(r):
    cell = r.module(nn.LSTMCell(2, 3))
    x = r(2, 2)
    return lambda h, c: cell(x, cell(x, (h, c))), (r(2, 3), r(2, 3))


@zoo.case("recurrent loop over a sequence")
def _(r):
    w, u = r(3, 3) * 0.5, r(2, 3)

    def f(x):
        h, out = x.new_zeros(2, 3), []
        for t in range(4):
            h = (x[t] @ u + h @ w).tanh()
            out.append(h)
        return torch.stack(out)

    return f, r(4, 2, 2)


@zoo.case("graph net with edge features")
def _(r):
    a, b = r.integers(0, 5, 8), r.integers(0, 5, 8)
    we, wn, e, z = r(5, 3), r(5, 2), r(8, 1), r.zeros(5, 3)

    def f(x):
        m = (torch.cat([x[a], x[b], e], 1) @ we).tanh()
        return x + (torch.cat([x, z.index_add(0, b, m)], 1) @ wn).tanh()

    return f, r(5, 2)


@zoo.case("normalizing flow coupling layers")
def _(r):
    w1, w2 = r(2, 4), r(4, 4)

    def f(x):
        log_det = 0.0
        for _ in range(2):
            a, b = x[:, :2], x[:, 2:]
            s, t = ((a @ w1).tanh() @ w2).chunk(2, 1)
            x = torch.cat([b * torch.exp(s.tanh()) + t, a], 1)
            log_det = log_det + s.tanh().sum(1)
        return x, log_det

    return f, r(3, 4)


@zoo.case("variational loss with fixed noise")
def _(r):
    noise, x = r(4, 2), r(4, 3)

    def f(mean, log_scale, decoder):
        z = mean + noise * log_scale.exp()
        fit = ((z @ decoder).tanh() - x).pow(2).sum(1)
        return fit + 0.5 * (mean**2 + (2 * log_scale).exp() - 2 * log_scale - 1).sum(1)

    return f, (r(4, 2), r(4, 2), r(2, 3))


@zoo.case("dropout with a fixed seed", skip=("func", "forward", "value", "float32"))
def _(r):
    w = r(4, 4)

    def f(x):
        torch.manual_seed(3)
        return F.dropout((x @ w).tanh(), 0.5) @ w

    return f, r(3, 4)


@zoo.case("mixture density")
def _(r):
    x = r(5)

    def f(logits, mean, log_scale):
        z = (x[:, None] - mean) * torch.exp(-log_scale)
        return (logits.log_softmax(0) - 0.5 * z**2 - log_scale).logsumexp(1)

    return f, (r(3), r(3), r(3))


@zoo.case("radial basis and Fourier features")
def _(r):
    c, w, v = r(4, 2), r(2, 3), r(6, 2)

    def f(x):
        rbf = torch.exp(-((x[:, None] - c) ** 2).sum(-1))
        p = x @ w
        return torch.cat([p.sin(), p.cos()], 1) @ v * rbf.sum(1, keepdim=True)

    return f, r(3, 2)


@zoo.parametrize()
def test_architectures(case, mode):
    case.check(mode)
