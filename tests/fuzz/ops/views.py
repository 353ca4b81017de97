"""Views, and what only copies: no arithmetic but to tell copies apart."""

import torch
from draw import FLOAT, op


@op(batched=False)
def as_strided(x, d):
    x = x.contiguous()
    offset = d.integer(0, x.numel() - 1)
    size, stride, last = [], [], 0
    for _ in range(d.integer(1, 3)):
        step = d.choice([0, 1, 1, 2, 3, 5])
        room = (x.numel() - 1 - offset - last) // step if step else 3
        size.append(d.integer(1, max(1, min(4, room + 1))))
        stride.append(step)
        last += step * (size[-1] - 1)
    return torch.as_strided(x, size, stride, x.storage_offset() + offset)


@op(batched=False)
def as_strided_of_slice(x, d):
    y = x.reshape(-1)[d.integer(0, 1) :] * 1.0
    return y.as_strided((2, y.numel() // 2), (1, 2 if y.numel() >= 4 else 0))


@op
def unfold(x, d):
    axis = d.axis(x)
    return x.unfold(axis, d.integer(1, x.shape[axis]), d.integer(1, 3))


@op
def unfold_twice(x, d):
    y = x.unfold(d.axis(x), 2, 1)
    axis = d.axis(y)
    return y.unfold(axis, min(2, y.shape[axis]), 1)


@op
def expand_reshape(x, d):
    y = x.unsqueeze(d.integer(d.first, x.dim()))
    ones = [a for a in range(d.first, y.dim()) if y.shape[a] == 1]
    sizes = list(y.shape)
    sizes[d.choice(ones)] = d.integer(2, 3)
    y = y.expand(sizes)
    return d.view(y, *d.choice([(-1,), (-1, y.shape[-1]), (y.shape[d.first], -1)]))


@op
def movedim(x, d):
    return x.movedim(d.axis(x), d.axis(x))


@op
def permute(x, d):
    return x.permute(*range(d.first), *d.shuffled(range(d.first, x.dim())))


@op
def transpose_reshape(x, d):
    y = x.transpose(d.axis(x), -1)
    n = d.size(y)
    divisor = d.choice([k for k in range(1, n + 1) if n % k == 0])
    return d.view(y, divisor, n // divisor)


@op
def reshape(x, d):
    n = d.size(x)
    divisor = d.choice([k for k in range(1, n + 1) if n % k == 0])
    return d.view(x, divisor, n // divisor)


@op
def flip_slice(x, d):
    y = x.flip([a for a in range(d.first, x.dim()) if d.chance(0.6)])
    key = [slice(d.integer(0, n - 1), None, d.integer(1, 3)) if d.chance(0.6) else slice(None) for n in d.inner(y)]
    return y[(slice(None),) * d.first + tuple(key)]


@op
def negative_index(x, d):
    key = [slice(None)] * d.first
    for n in d.inner(x):
        key += d.choice([[-d.integer(1, n)], [slice(-d.integer(1, n), None)], [None, slice(None)], [slice(None)], [slice(None)]])
    return x[tuple(key)]


@op
def diag_embed(x, d):
    return torch.diag_embed(x, offset=d.integer(-1, 1), dim1=d.choice([-2, d.first]), dim2=-1)


@op
def diagonal(x, d):
    x = d.matrix(x)
    return x.diagonal(d.integer(-1, 1), *d.shuffled([-1, -2]))


@op
def triangle(x, d):
    return d.choice([torch.tril, torch.triu])(d.matrix(x), d.integer(-2, 2))


@op
def cat_views(x, d):
    axis = d.axis(x)
    makers = [
        lambda: x.flip(axis),
        lambda: x.narrow(axis, 0, d.integer(0, x.shape[axis])),
        lambda: x.roll(1, axis),
        lambda: x * d.number(),
        lambda: x.detach(),
        lambda: torch.zeros_like(x),
    ]
    return torch.cat(d.shuffled([x] + [d.choice(makers)() for _ in range(d.integer(1, 3))]), axis)


@op
def stack_unbind(x, d):
    return torch.stack(d.shuffled(x.unbind(d.axis(x))), d.axis(x))


@op
def split_mix(x, d):
    axis = d.axis(x)
    n = x.shape[axis]
    k = d.integer(1, n - 1)
    p, q = x.split([k, n - k], axis)
    m = min(k, n - k)
    return torch.cat([q, p], axis) * 1.5 if d.chance(0.5) else p.narrow(axis, 0, m) * q.narrow(axis, 0, m)


@op
def chunks(x, d):
    axis = d.axis(x)
    parts = (x.chunk if d.chance(0.5) else x.tensor_split)(d.integer(1, 3), axis)
    return torch.cat([p * (k + 1) for k, p in enumerate(parts)][::-1], axis)


@op
def kron_ones(x, d):
    if d.first:
        return d.flat(x).repeat_interleave(2, -1)
    return torch.kron(x.reshape(-1), torch.ones(2, dtype=FLOAT))


@op
def interleave(x, d):
    return torch.stack([x, x * d.number()], -1).flatten(-2)


@op
def expand_last(x, d):
    return x.unsqueeze(-1).expand(*x.shape, 2).reshape(*x.shape[:-1], -1)


@op
def pairs_transposed(x, d):
    y = d.view(d.flat(x)[..., : d.size(x) // 2 * 2], -1, 2) * torch.tensor([1.0, d.number()], dtype=FLOAT)
    return y.transpose(-1, -2).flatten(d.first)


@op
def repeat(x, d):
    return x.repeat([1] * d.first + [d.integer(1, 2) for _ in d.inner(x)])


@op
def repeat_interleave(x, d):
    return x.repeat_interleave(d.integer(1, 3), d.axis(x))


@op
def repeat_by_counts(x, d):
    axis = d.axis(x)
    counts = d.indices((x.shape[axis],), 3)
    counts[0] = max(1, 3 - int(counts[1:].sum()))
    return x.repeat_interleave(counts, axis).narrow(axis, 0, 3)


@op
def tile(x, d):
    return torch.tile(x, (2,))


@op
def rot90(x, d):
    return torch.rot90(d.matrix(x), d.integer(-2, 3), d.shuffled([-1, -2]))


@op(batched=False)
def products_of_sets(x, d):
    v = x.reshape(-1)
    return d.choice(
        [
            lambda: torch.cartesian_prod(v[:3], v[-2:]),
            lambda: torch.block_diag(v[:2].reshape(1, -1), v[-2:].reshape(-1, 1)),
            lambda: torch.meshgrid(v[:3], v[-2:], indexing="ij")[d.integer(0, 1)],
            lambda: torch.combinations(v[:4], 2),
            lambda: torch.kron(v[:3], v[:2]),
            lambda: torch.vander(v[:3]),
        ]
    )()


@op
def narrow_pad(x, d):
    axis = d.axis(x)
    n = x.shape[axis]
    start = d.integer(0, n - 1)
    y = x.narrow(axis, start, d.integer(1, n - start))
    return torch.cat([y, y.new_zeros(*y.shape[:axis], n - y.shape[axis], *y.shape[axis + 1 :])], axis)


@op
def flatten_unflatten(x, d):
    y = d.flat(x)
    n = y.shape[-1]
    return y.unflatten(-1, (2, n // 2)).transpose(-1, -2) if n % 2 == 0 else y.unflatten(-1, (n, 1))


@op
def real_of_complex_view(x, d):
    return torch.view_as_real(torch.complex(x, x.flip(-1)) * complex(d.number(), d.number())).flatten(-2)
