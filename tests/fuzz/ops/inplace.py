"""Writes into values and into views of them."""

import torch
from draw import op


@op
def add_into(x, d):
    return (x * 1.0).add_(x.flip(-1), alpha=d.value([1, 2, -1]))


@op
def chain_of_inplace(x, d):
    changes = [torch.tanh_, torch.sigmoid_, torch.exp_, lambda y: y.mul_(1.3), lambda y: y.clamp_(-0.4, 0.6), torch.neg_]
    y = x * 1.0
    for _ in range(d.integer(1, 3)):
        d.choice(changes)(y)
    return y


@op
def row_assignment(x, d):
    y, axis = x * 1.0, d.axis(x)
    n = x.shape[axis]
    y.select(axis, d.integer(0, n - 1)).copy_(x.select(axis, d.integer(0, n - 1)).sin())
    return y


@op
def slice_assignment(x, d):
    y, axis = x * 1.0, d.axis(x)
    key = (slice(None),) * axis
    y[(*key, slice(None, None, 2))] = x[(*key, slice(None, None, 2))].cos()
    y[(*key, slice(-1, None))] *= d.number()
    return y


@op
def shifted_within(x, d):
    v = d.flat(x * 1.0)
    v[..., 1::2] = v[..., : v[..., 1::2].shape[-1]].clone() * 3
    return v


@op
def through_a_transpose(x, d):
    y = d.matrix(x) * 1.0
    y.transpose(-1, -2).select(-1, 0).mul_(x.flatten(d.first).sum(-1, keepdim=True))
    return y


@op
def element_of_a_view(x, d):
    y = (x * 1.0).contiguous()
    y.view(*d.lead(y), -1)[..., 0].copy_(d.flat(x).sum(-1))
    return y.exp()


@op
def filled_rows(x, d):
    z = x.new_zeros(*d.lead(x), 2, *d.inner(x))
    z.select(d.first, 0).copy_(x)
    z.select(d.first, 1).copy_(z.select(d.first, 0) * x)
    return z


@op
def filled_by_recursion(x, d):
    v = d.flat(x)
    z = torch.zeros_like(v)
    for k in range(v.shape[-1]):
        z[..., k] = v[..., k] * (z[..., k - 1].clone().tanh() + 1 if k else 1)
    return z


@op
def diagonal_scaled(x, d):
    y = d.matrix(x) * 1.0
    y.diagonal(0, -2, -1).mul_(d.value([0.0, 2.0, -1.0]))
    return y


@op(batched=False)
def masked_assignment(x, d):
    y = x * 1.0
    y[x > 0] = d.value([0.0, 1.0]) if d.chance(0.5) else y[x > 0] * 2
    return y


@op
def masked_fill_into(x, d):
    return (x * 1.0).masked_fill_(x.detach() > d.number(), d.number())


@op
def view_of_a_view(x, d):
    y = d.flat(x) * 1.0
    y[..., 1:][..., ::2].mul_(2).add_(d.flat(x).mean(-1, keepdim=True))
    return y


@op
def rows_of_a_workspace(x, d):
    z = x.new_zeros(*d.lead(x), 3, d.size(x))
    z.select(d.first, 1).copy_(d.flat(x))
    w = z.select(d.first, 1)
    w[..., ::2] += w[..., :1].clone()
    z.select(d.first, 2).add_(z.select(d.first, 1).detach() + z.select(d.first, 1))
    return z.sum(d.first)


@op(batched=False)
def index_assignment(x, d):
    y = x * 1.0
    y[d.permutation(x.shape[0])[:2]] = x[:1] * d.number()
    y[d.indices((2,), x.shape[0])] += 1.0
    return y


@op
def scatter_into(x, d):
    axis = d.axis(x)
    return (x * 1.0).scatter_add_(axis, d.indices(x.shape, x.shape[axis]), x.sin())


@op
def swapped_halves(x, d):
    y = d.flat(x) * 1.0
    h = y.shape[-1] // 2
    a = y[..., :h].clone()
    y[..., :h] = y[..., h : 2 * h] * 2
    y[..., h : 2 * h] = a
    return y


@op
def accumulated_outer(x, d):
    v = d.cycled(x, 3)
    z = v.new_zeros(*d.lead(x), 3, 3)
    z.add_(v.unsqueeze(-1) * v.unsqueeze(-2))
    z[..., 0, :] -= v
    return z
