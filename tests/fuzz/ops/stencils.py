"""Shifted copies of a value, added and multiplied, several times over: many blocks that differ by an offset."""

import torch
import torch.nn.functional as nnf
from draw import op


@op
def roll(x, d):
    axes = d.axes(x)
    return x.roll([d.integer(-4, 4) for _ in axes], axes)


@op(batched=False)
def roll_flat(x, d):
    return x.roll(d.integer(-7, 7)) + x if d.chance(0.5) else x.roll([1, d.integer(-2, 2)], [0, 0])


@op
def laplacian_steps(x, d):
    axis = d.axis(x)
    for _ in range(d.integer(1, 4)):
        x = x + 0.1 * (x.roll(1, axis) - 2 * x + x.roll(-1, axis)) * x
    return x


@op
def products_with_shifts(x, d):
    axis = d.axis(x)
    for _ in range(d.integer(1, 4)):
        x = torch.sin(x) * x.roll(d.integer(1, 2), axis)
    return x


@op
def lorenz96(x, d):
    for _ in range(d.integer(1, 3)):
        x = x + 0.05 * ((x.roll(-1, -1) - x.roll(2, -1)) * x.roll(1, -1) - x + d.number())
    return x


@op
def heat_on_a_plate(x, d):
    x = d.matrix(x)
    for _ in range(d.integer(1, 2)):
        p = nnf.pad(x, (1, 1, 1, 1))
        x = x + d.number(0, 0.2) * (p[..., 2:, 1:-1] + p[..., :-2, 1:-1] + p[..., 1:-1, 2:] + p[..., 1:-1, :-2] - 4 * x)
    return x


@op
def slices_of_neighbours(x, d):
    axis = d.axis(x)
    for _ in range(d.integer(1, 3)):
        n = x.shape[axis]
        if n < 3:
            break
        a, b, c = (x.narrow(axis, k, n - 2) for k in range(3))
        x = a * b - 0.5 * c + d.number() * b.sin()
    return x


@op
def rosenbrock_terms(x, d):
    y = d.flat(x)
    return 100 * (y[..., 1:] - y[..., :-1] ** 2) ** 2 * 0.01 + (1 - y[..., :-1]) ** 2


@op
def upwind(x, d):
    """Shifts in both directions, chosen by the sign of the value."""
    axis = d.axis(x)
    for _ in range(d.integer(1, 3)):
        forward, backward = x.roll(-1, axis) - x, x - x.roll(1, axis)
        x = x - 0.1 * x * torch.where(x > 0, backward, forward)
    return x


@op
def mirrored_stencil(x, d):
    axis = d.axis(x)
    for _ in range(d.integer(1, 3)):
        x = 0.5 * x + 0.25 * x.flip(axis) * x.roll(1, axis)
    return x


@op
def dilated_stencil(x, d):
    y = d.flat(x)
    for k in range(d.integer(1, 3)):
        y = y + 0.3 * torch.tanh(y.roll(1 << k, -1)) * d.number()
    return y


@op
def stencil_beside_copies(x, d):
    """A stencil over what was repeated, and repeated over what a stencil gave."""
    y = x.repeat_interleave(2, -1) if d.chance(0.5) else x.unsqueeze(-1).expand(*x.shape, 2).flatten(-2)
    y = y * y.roll(1, -1) + 0.1 * y.roll(-2, -1)
    return y.unflatten(-1, (x.shape[-1], 2)).sum(-1) + x if d.chance(0.5) else y


@op
def finite_differences(x, d):
    axis = d.axis(x)
    return torch.diff(x, dim=axis, n=d.integer(1, 2)) * d.number()


@op
def wave(x, d):
    axis = d.axis(x)
    before, now = x, x.sin()
    for _ in range(d.integer(1, 3)):
        before, now = now, 2 * now - before + d.number(0, 0.2) * (now.roll(1, axis) + now.roll(-1, axis) - 2 * now)
    return now


@op
def circular_pad(x, d):
    y = d.view(x, 1, d.size(x)) if d.first else x.reshape(1, 1, -1)
    y = nnf.pad(y, (1, d.integer(0, 1)), mode="circular").flatten(d.first)
    return y * y.roll(1, -1)


@op
def moving_window(x, d):
    y = d.flat(x)
    w = y.unfold(-1, min(3, y.shape[-1]), 1)
    return (w * d.tensor(w.shape[-1])).sum(-1) + w.amax(-1)
