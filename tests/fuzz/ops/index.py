"""Index algebra: reads and writes at positions that are data."""

import math

import torch
import torch.nn.functional as nnf
from draw import FLOAT, op


@op
def index_select(x, d):
    axis = d.axis(x)
    return x.index_select(axis, d.indices((d.integer(1, 3),), x.shape[axis]))


@op
def index_read(x, d):
    """Advanced indexing of some axes, with slices, integers and new axes among them."""
    key = [slice(None)] * d.first
    shape = d.choice([(2,), (1,), (2, 2), (1, 2), ()])
    for n in d.inner(x):
        kind = d.choice("iiisn:")
        if kind == "i":
            key.append(d.indices(shape, n) - d.choice([0, n]))
        elif kind == "s":
            key.append(d.integer(0, n - 1))
        elif kind == "n":
            key += [None, slice(None, None, 2)]
        else:
            key.append(slice(None))
    return x[tuple(key)]


@op
def index_two_axes(x, d):
    x = d.matrix(x)
    k = d.integer(1, 3)
    return x[(*(slice(None),) * d.first, d.indices((k,), x.shape[-2]), d.indices((k,), x.shape[-1]))]


@op(batched=False)
def index_put(x, d):
    accumulate = d.chance(0.7)
    n, k = x.shape[0], d.integer(1, 3)
    where = d.indices((k,), n) if accumulate else torch.arange(min(k, n))
    v = x[torch.arange(where.numel()) % n]
    return d.choice(
        [
            lambda: (x * 1.0).index_put((where,), v * 2, accumulate=accumulate),
            lambda: (x * 1.0).index_put_((where,), v.sum(0), accumulate=accumulate),
            lambda: torch.zeros_like(x).index_put((where,), v, accumulate=accumulate),
        ]
    )()


@op(batched=False)
def index_put_two_axes(x, d):
    x = d.matrix(x)
    i, j = d.indices((2,), x.shape[0]), d.indices((2,), x.shape[1])
    if d.chance(0.5):
        return x.index_put((i, j), x[i, j].sin(), accumulate=True)
    y = x.clone()
    y[i[:1], j[:1]] = x[j[:1] % x.shape[0], i[:1] % x.shape[1]] * 3
    return y


@op
def index_add(x, d):
    axis = d.axis(x)
    where = d.indices((d.integer(1, 3),), x.shape[axis])
    return x.index_add(axis, where, x.index_select(axis, where).sin(), alpha=d.value([1, -1, 2, 0.5]))


@op
def index_fill_copy(x, d):
    axis = d.axis(x)
    where = d.permutation(x.shape[axis])[: d.integer(1, 3)]
    if d.chance(0.5):
        return x.index_fill(axis, where, d.number())
    return x.index_copy(axis, where, x.flip(axis).narrow(axis, 0, where.numel()) * 2)


@op
def index_reduce(x, d):
    axis = d.axis(x)
    where = d.indices((d.integer(1, 3),), x.shape[axis])
    how = d.choice(["mean", "amax", "amin", "prod"])
    return x.index_reduce(axis, where, x.index_select(axis, where) * 1.5, how, include_self=True)


@op
def gather(x, d):
    axis = d.axis(x)
    shape = [*d.lead(x), *(d.integer(1, n) for n in d.inner(x))]
    return x.gather(axis, d.indices(shape, x.shape[axis]))


@op
def gather_gather(x, d):
    return gather(gather(x, d), d)


@op
def take_along(x, d):
    axis = d.axis(x)
    shape = [1 if a != axis and d.chance(0.3) else n for a, n in enumerate(x.shape)]
    shape[axis] = d.integer(1, 4)
    return torch.take_along_dim(x, d.indices(shape, x.shape[axis]), axis)


@op(batched=False)
def take_put(x, d):
    where = d.indices(d.small_shape(), x.numel())
    if d.chance(0.6):
        return x.take(where)
    return x.put(where, x.reshape(-1)[:1].expand(where.numel()).reshape(where.shape) * 2, accumulate=True)


@op
def scatter_add(x, d):
    axis = d.axis(x)
    part = x.narrow(axis, 0, d.integer(1, x.shape[axis]))
    where = d.indices(part.shape, x.shape[axis])
    return x.scatter_add(axis, where, x) if d.chance(0.5) else torch.zeros_like(x).scatter_add_(axis, where, part.sin())


@op
def scatter(x, d):
    axis = d.axis(x)
    n = x.shape[axis]
    where = d.permutation(n).reshape([-1 if a == axis else 1 for a in range(x.dim())]).expand(x.shape)
    where = where.narrow(axis, 0, d.integer(1, n))
    return x.scatter(axis, where, x.cos()) if d.chance(0.7) else x.scatter(axis, where, d.number())


@op(exact=(1, "the second derivative of prod in PyTorch's scatter_reduce is not implemented or drops terms at zeros"))
def scatter_reduce(x, d):
    axis = d.axis(x)
    how = d.choice(["sum", "mean", "amax", "amin", "prod"])
    where = d.indices(x.shape, x.shape[axis])
    return x.sin().scatter_reduce(axis, where, x * 1.3, how, include_self=d.chance(0.5))


@op
def masked_fill(x, d):
    return x.masked_fill(d.mask(x.shape), d.value([0.0, 1.0, -2.0]))


@op(batched=False)
def masked_select(x, d):
    y = x[d.mask(x.shape)]  # padded: the content must not change the shape of what follows
    return torch.cat([y, x.new_zeros(x.numel() - y.numel())])


@op
def where_mask(x, d):
    other = d.choice([lambda: x.flip(-1), x.detach, lambda: torch.zeros_like(x), lambda: d.other(x)])()
    return torch.where(d.mask(x.shape), x, other)


@op
def masked_scatter(x, d):
    return x.masked_scatter(d.mask(x.shape), x.flip(d.axis(x))) if not d.first else torch.where(d.mask(x.shape), x, x.flip(-1))


@op
def where_of_bad_branch(x, d):
    """nan or infinite derivatives in the branch that is not taken."""
    safe = x > 0
    return d.choice(
        [
            lambda: torch.where(safe, torch.log(x), x),
            lambda: torch.where(safe, torch.sqrt(torch.where(safe, x, torch.ones_like(x))), x * 0),
            lambda: torch.nan_to_num(torch.log(x), nan=0.5),
            lambda: torch.nansum(torch.where(safe, x, x * math.nan), d.axis(x), keepdim=True),
            lambda: torch.where(d.mask(x.shape), torch.sqrt(x.abs() - 5), x).nan_to_num(0.0),
        ]
    )()


@op(batched=False)
def embedding(x, d):
    x = d.matrix(x)
    where = d.indices(d.small_shape(), x.shape[0])
    return d.choice(
        [
            lambda: nnf.embedding(where, x),
            lambda: nnf.embedding(where, x, padding_idx=0),
            lambda: nnf.embedding_bag(where.reshape(1, -1), x, mode=d.choice(["sum", "mean", "max"])),
        ]
    )()


@op
def select_scatter(x, d):
    axis = d.axis(x)
    return x.select_scatter(x.select(axis, 0).cos(), axis, d.integer(0, x.shape[axis] - 1))


@op
def slice_scatter(x, d):
    axis, step = d.axis(x), d.integer(1, 2)
    return x.slice_scatter(d.along(x, axis, slice(None, None, step)).sin() * 2, axis, 0, None, step)


@op
def diagonal_scatter(x, d):
    x = d.matrix(x)
    return x.diagonal_scatter(x.diagonal(0, -2, -1).exp(), 0, -2, -1)


@op(batched=False)
def as_strided_scatter(x, d):
    return torch.as_strided_scatter(x.contiguous(), x.reshape(-1)[:1] * 2, (1,), (1,), d.integer(0, x.numel() - 1))


@op
def one_hot_product(x, d):
    n = x.shape[-1]
    return x @ nnf.one_hot(d.indices((2,), n), n).to(FLOAT).t()


@op
def bucketize(x, d):
    return torch.bucketize(x.detach(), torch.tensor([0.0, d.number(0.1, 1)], dtype=FLOAT)) * x


@op
def reads_of_reads(x, d):
    """One index array read several times, through several others."""
    y = d.flat(x)
    i = d.indices((4,), y.shape[-1])
    j = d.indices((3,), 4)
    return y[..., i][..., j] * y[..., i[j]] + y[..., j % y.shape[-1]]


@op
def table_lookup(x, d):
    """Linear interpolation in a table whose entries are the values."""
    y = d.flat(x)
    n = y.shape[-1]
    low = d.indices((4,), n - 1)
    t = d.tensor(4, low=0, high=1)
    return (1 - t) * y[..., low] + t * y[..., low + 1]
