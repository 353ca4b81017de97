"""Graphs that are cut, custom functions, Python between the operations."""

import torch
from draw import op
from torch.utils.checkpoint import checkpoint


class Cube(torch.autograd.Function):
    """Saves its input and a Python number; can be differentiated again."""

    @staticmethod
    def forward(ctx, x, k):
        ctx.save_for_backward(x)
        ctx.k = k
        return x**3 * k

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g * ctx.k, None


class TwoOutputs(torch.autograd.Function):
    """Takes undefined gradients as they come, and gives None for what nothing reaches."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        ctx.set_materialize_grads(False)
        return x * y, x + 2 * y

    @staticmethod
    def backward(ctx, a, b):
        x, y = ctx.saved_tensors
        gx = gy = None
        if a is not None:
            gx, gy = a * y, a * x
        if b is not None:
            gx = b if gx is None else gx + b
            gy = 2 * b if gy is None else gy + 2 * b
        return gx, gy


class ByNumpy(torch.autograd.Function):
    """A backward that leaves PyTorch: neither batched nor differentiable again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy().copy()).sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(x.detach().numpy().copy()).cos()


class SameForBoth(torch.autograd.Function):
    """Gives one tensor as the gradient of two inputs."""

    @staticmethod
    def forward(ctx, x, y):
        return x + y

    @staticmethod
    def backward(ctx, g):
        return g, g


@op
def custom_cube(x, d):
    return Cube.apply(x, d.value([0.5, 1.0, -1.0]))


@op
def custom_two_outputs(x, d):
    a, b = TwoOutputs.apply(x, d.choice([x.detach, lambda: x.flip(-1), lambda: d.other(x).expand_as(x)])())
    return d.choice([a, b, a * b])


@op(exact=(1, "differentiable once"))
def custom_by_numpy(x, d):
    return ByNumpy.apply(x)


@op
def custom_same_for_both(x, d):
    return SameForBoth.apply(x, x.roll(1, -1)) * x


@op
def checkpointed(x, d):
    if d.chance(0.5):  # such graphs are PyTorch's as a whole: few of them are enough
        return x.sin()
    return checkpoint(lambda t: t.sin() * t.flip(-1), x, use_reentrant=False)


@op
def detached(x, d):
    return d.choice(
        [lambda: x * x.detach(), lambda: x + x.detach().mean(), lambda: x.detach() + x.sin(), lambda: x.detach().exp() - x]
    )()


@op
def constant(x, d):
    """A value no input reaches."""
    return d.tensor(*d.inner(x)).expand_as(x) if d.chance(0.3) else d.tensor(*d.inner(x)) + 0 * x


@op
def without_grad(x, d):
    with torch.no_grad():
        k = x.sin()
    return x * k


@op
def unused_branches(x, d):
    x.exp().sum()
    x.flip(-1)
    return x * d.number() + x.sin()


@op
def many_uses(x, d):
    terms = [x * d.number() for _ in range(d.integer(2, 10))]
    return sum(terms[1:], start=terms[0]) + x.roll(1, -1)


@op
def alias(x, d):
    return x.view_as(x) if d.chance(0.5) else x
