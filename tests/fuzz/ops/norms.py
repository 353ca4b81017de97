"""Norms and normalisations, softmaxes and what is built of them."""

import math

import torch
import torch.nn.functional as nnf
from draw import FLOAT, op

ZERO_NORM = [1, 2, 2, 3, math.inf]


@op
def vector_norm(x, d):
    return torch.linalg.vector_norm(x, d.choice([0.5, 1, 2, 4, math.inf, -math.inf]), dim=d.axis(x), keepdim=True) * x


@op
def norm_with_zeros(x, d):
    return torch.where(d.mask(x.shape), x, torch.zeros_like(x)).norm(d.choice(ZERO_NORM), d.axis(x), keepdim=True)


@op
def norm_of_zero(x, d):
    return (x - x).norm(dim=-1, keepdim=True) + x


@op
def normalize(x, d):
    # With PyTorch's own eps, 1e-12, what rounding leaves of zeros becomes numbers.
    return nnf.normalize(x, p=d.choice([2.0, 2.0, 1.0, 3.0]), dim=d.axis(x), eps=1e-6)


@op
def layer_norm(x, d):
    n = x.shape[-1]
    weight = d.choice([lambda: None, lambda: d.tensor(n), lambda: None])()
    return nnf.layer_norm(x, (n,), weight, d.tensor(n) if d.chance(0.3) else None, eps=0.1 if n > 1 else 1.0)


@op(batched=False, exact=(1, "forward over reverse of an affine layer norm drops terms in PyTorch"))
def layer_norm_of_parameters(x, d):
    n = x.shape[-1]
    return nnf.layer_norm(x, (n,), x.reshape(-1, n)[0].sin(), x.reshape(-1, n)[-1], eps=0.1)


@op
def layer_norm_of_two_axes(x, d):
    x = d.matrix(x)
    return nnf.layer_norm(x, x.shape[-2:], eps=0.1)


@op
def rms_norm(x, d):
    return nnf.rms_norm(x, (x.shape[-1],), d.tensor(x.shape[-1]) if d.chance(0.5) else None, eps=0.1)


@op
def group_norm(x, d):
    y = d.cycled(x, 4)
    return nnf.group_norm(y.reshape(-1, 2, 2) if d.first else y.reshape(1, 2, 2), d.choice([1, 2]), eps=0.1)


@op
def instance_norm(x, d):
    y = d.cycled(x, 6)
    return nnf.instance_norm(y.reshape(-1, 2, 3) if d.first else y.reshape(1, 2, 3), eps=0.1)


@op(batched=False)
def batch_norm(x, d):
    y = d.cycled(x, max(4, x.numel() // 2 * 2)).reshape(-1, 2)
    return nnf.batch_norm(y, None, None, d.tensor(2) if d.chance(0.5) else None, None, True, eps=0.1)


@op
def batch_norm_of_running(x, d):
    y = d.cycled(x, 6)
    y = y.reshape(-1, 2, 3) if d.first else y.reshape(1, 2, 3)
    return nnf.batch_norm(y, d.tensor(2), d.tensor(2, low=0.5, high=2), d.tensor(2), d.tensor(2), False)


@op
def standardise(x, d):
    axis = d.axis(x)
    centred = x - x.mean(axis, keepdim=True)
    return centred / (centred.square().mean(axis, keepdim=True) + 0.1).sqrt()


@op
def softmax(x, d):
    y = x.softmax(d.axis(x))
    return y.softmax(d.axis(x)) if d.chance(0.4) else y


@op
def log_softmax(x, d):
    return x.log_softmax(d.axis(x))


@op
def softmin_and_product(x, d):
    return nnf.softmin(x, d.axis(x)) * x


@op
def masked_softmax(x, d):
    return torch.softmax(x.masked_fill(d.mask(x.shape), -math.inf), d.axis(x)).nan_to_num(0.0)


@op
def glu(x, d):
    axis = d.axis(x)
    return nnf.glu(torch.cat([x, x.cos()], axis), axis)


@op
def attention(x, d):
    q = d.view(d.cycled(x, 6), 3, 2)
    scores = q @ q.transpose(-1, -2) / math.sqrt(2)
    if d.chance(0.5):
        scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ q.sin()


@op
def scaled_dot_product_attention(x, d):
    q = d.view(d.cycled(x, 6), 1, 3, 2)
    return nnf.scaled_dot_product_attention(q, q.cos(), q * d.number(), is_causal=d.chance(0.5))


@op
def logsumexp_of_shifted(x, d):
    return torch.logsumexp(torch.stack([x, x.roll(1, -1), x * d.number()]), 0)


@op
def cosine_similarity(x, d):
    y = x + torch.arange(1, 1 + x.shape[-1], dtype=FLOAT)
    return nnf.cosine_similarity(y, y.roll(1, -1) * d.number(0.5, 1.5), dim=-1).unsqueeze(-1) * x


@op(batched=False, exact=(1, "PyTorch has no second derivative of cdist"))
def distances(x, d):
    y = d.matrix(x)
    return torch.cdist(y + torch.arange(y.shape[0]).unsqueeze(1), d.tensor(2, y.shape[-1], low=-3, high=-2))


@op(batched=False)
def weight_norm(x, d):
    v = d.matrix(x) + 0.1
    return v * (d.tensor(v.shape[0], 1) / v.norm(dim=1, keepdim=True))


@op
def softmax_cross_terms(x, d):
    p = x.softmax(-1)
    return -(p * (p + 1e-3).log()).sum(-1, keepdim=True) * x
