"""Sums, products, scans, orders; ties."""

import torch
import torch.nn.functional as nnf
from draw import op

LOGCUMSUMEXP = (1, "PyTorch's second derivative of logcumsumexp is wrong; difference quotients agree with the engine")


@op
def reduce(x, d):
    how = d.choice([torch.sum, torch.mean, torch.amax, torch.amin, torch.logsumexp, torch.nansum])
    return how(x, d.axes(x), keepdim=d.chance(0.5))


@op
def reduce_and_broadcast(x, d):
    return x * d.choice([torch.sum, torch.mean, torch.logsumexp])(x, d.axes(x), keepdim=True)


@op(batched=False)
def reduce_all(x, d):
    return d.choice([x.sum, x.mean, x.max, x.min, x.median, x.prod, x.norm, x.amax, x.std])().reshape(1) * x


@op
def prod(x, d):
    x = torch.where(d.mask(x.shape), x, torch.zeros_like(x)) if d.chance(0.4) else x
    return x.prod(d.axis(x), keepdim=d.chance(0.5))


@op
def cumsum(x, d):
    y = x.cumsum(d.axis(x))
    return y.cumsum(d.axis(x)) * 0.3 if d.chance(0.3) else y


@op
def cumprod(x, d):
    x = torch.where(d.mask(x.shape), x, torch.zeros_like(x)) if d.chance(0.3) else x
    return x.cumprod(d.axis(x))


@op
def running_extremes(x, d):
    return d.choice([torch.cummax, torch.cummin])(x, d.axis(x))[0]


@op(exact=LOGCUMSUMEXP)
def logcumsumexp(x, d):
    return x.logcumsumexp(d.axis(x))


@op
def trapezoid(x, d):
    axis = d.axis(x)
    return torch.cumulative_trapezoid(x, dim=axis) if d.chance(0.5) else torch.trapezoid(x, dim=axis)


@op
def sort(x, d):
    return x.sort(d.axis(x), descending=d.chance(0.5))[0]


@op
def topk(x, d):
    axis = d.axis(x)
    return x.topk(d.integer(1, x.shape[axis]), axis, largest=d.chance(0.5))[0]


@op
def one_of_an_order(x, d):
    axis = d.axis(x)
    return d.choice(
        [
            lambda: x.kthvalue(d.integer(1, x.shape[axis]), axis, keepdim=True)[0],
            lambda: x.median(axis, keepdim=True)[0],
            lambda: x.nanmedian(axis, keepdim=True)[0],
            lambda: x.mode(axis, keepdim=True)[0],
            lambda: x.quantile(d.value([0.3, 0.5, 1.0]), axis, keepdim=True),
            lambda: x.max(axis, keepdim=True)[0] - x.min(axis, keepdim=True)[0] * 0.3,
        ]
    )()


@op
def sorted_pairs(x, d):
    """A sort by other values, as one reads one array in the order of another."""
    order = d.flat(x).detach().sin().argsort(-1)
    return d.flat(x).gather(-1, order) * d.flat(x)


@op
def ties(x, d):
    axis = d.axis(x)
    y = torch.cat([x, x.flip(axis), x], axis)
    return d.choice(
        [
            lambda: y.amax(axis),
            lambda: y.amin(tuple(range(d.first, y.dim())), keepdim=True) * x,
            lambda: torch.maximum(x, x.flip(axis)),
            lambda: y.max(axis)[0],
            lambda: torch.aminmax(y, dim=axis, keepdim=True)[0] + x,
            lambda: nnf.relu(x - x) + nnf.hardtanh(x, -0.5, 0.5),
            lambda: y.median(axis, keepdim=True)[0] + x,
            lambda: y.sort(axis)[0],
            lambda: torch.fmin(x, x.flip(axis)) * x,
        ]
    )()


@op(batched=False)
def ties_of_all(x, d):
    y = torch.cat([x.reshape(-1), x.reshape(-1).flip(0)])
    return d.choice([y.max, y.min, y.median, y.amax, y.nanmedian])().reshape(1) * x


@op
def variance(x, d):
    axis = d.axis(x)
    return d.choice(
        [
            lambda: x.var(axis, keepdim=True, unbiased=False),
            lambda: x.var(axis, unbiased=x.shape[axis] > 1),
            lambda: (x + torch.arange(x.shape[-1])).std(-1, keepdim=True, unbiased=False),
            lambda: torch.var_mean(x, axis, unbiased=False)[d.integer(0, 1)],
            lambda: (x - x.mean(axis, keepdim=True)) / (x.var(axis, unbiased=False, keepdim=True) + 1).sqrt(),
        ]
    )()


@op(batched=False)
def covariance(x, d):
    return torch.cov(d.matrix(x)) if d.chance(0.7) else torch.cov(d.matrix(x), correction=0)


@op
def count_and_sign(x, d):
    return x * (x > 0).sum(-1, keepdim=True) + torch.sign(x) * x


@op
def segments(x, d):
    y = d.flat(x)
    return y.new_zeros(*d.lead(x), 3).index_add(-1, d.indices((y.shape[-1],), 3), y) ** 2
