"""batch_jacobian: independent samples are answered, whatever was lost on the way; coupled ones are refused, proven in numbers."""

import pytest
import torch
import wengert
from support.check import DEVICE
from support.compare import assert_same
from torch.nn import functional as nnf


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE)


def labels(*values: int) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


class Opaque(torch.autograd.Function):
    """The identity, of which nothing is known."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clone()


def diffused(x):
    for _ in range(4):
        x = x + 0.1 * (x.roll(1, -1) - 2 * x + x.roll(-1, -1)) * x
    return x


def eval_norm(x):
    c = x.shape[1]
    return nnf.batch_norm(x, rand(c, seed=1), rand(c, seed=2).square() + 0.5, rand(c, seed=3), rand(c, seed=4), training=False)


class Scaled(torch.autograd.Function):
    """A node without a reader that keeps samples apart."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square() * x.sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x * x.sum(-1, keepdim=True) + (g * x.square()).sum(-1, keepdim=True)


INDEPENDENT = {
    "stencil of few points": (diffused, (2, 3)),
    "stencil": (diffused, (4, 8)),
    "stencil of more samples": (diffused, (16, 12)),
    "conv and max_pool": (lambda x: nnf.max_pool2d(nnf.conv2d(x, rand(2, 1, 3, 3)).relu(), 2), (5, 1, 6, 6)),
    "layer_norm and cross_entropy": (
        lambda x: nnf.cross_entropy(nnf.layer_norm(x, (6,)), labels(0, 3, 2), reduction="none"),
        (3, 6),
    ),
    "cumsum and sort": (lambda x: x.cumsum(1).sort(1)[0], (8, 3)),
    "eval batch_norm and max": (lambda x: eval_norm(x).max(1)[0], (6, 3)),
    "eval batch_norm and pooling": (lambda x: nnf.max_pool1d(eval_norm(x), 2), (4, 3, 6)),
    "instance_norm": (nnf.instance_norm, (4, 3, 8)),
    "group_norm": (lambda x: nnf.group_norm(x, 2).flatten(1), (3, 4, 5)),
    "gather then layer_norm": (lambda x: nnf.layer_norm(x.gather(1, labels(0, 2, 1, 1, 0, 0).view(3, 2)), (2,)), (3, 4)),
    "attention": (lambda x: nnf.scaled_dot_product_attention(x, x.sin(), x.cos()), (2, 3, 4)),
    "cholesky of each sample": (lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(3).to(x)), (4, 3, 3)),
    "a node without a reader": (lambda x: Scaled.apply(x).sin(), (4, 3)),
    "a mean that cancels": (lambda x: x.sin() - x.mean(0) + x.mean(0), (4, 3)),
    "folded into the channels": (lambda x: x.reshape(1, -1, 4).softmax(-1).reshape(x.shape).cumsum(-1), (3, 2, 4)),
}


def rows(fn, x):
    full = torch.autograd.functional.jacobian(fn, x)
    return torch.stack([full[b].select(full.dim() - x.dim() - 1, b) for b in range(len(x))])


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_samples(name):
    fn, shape = INDEPENDENT[name]
    x = rand(*shape)
    assert_same(wengert.batch_jacobian(fn, x), rows(fn, x), name)


TIED = [name for name in INDEPENDENT if name not in ("a node without a reader", "a mean that cancels", "attention")]


@pytest.mark.parametrize("name", TIED)
def test_structure_shows_it(name):
    """The blocks stay tied along the batch; no numbers are needed."""
    fn, shape = INDEPENDENT[name]
    x = rand(*shape).requires_grad_()
    wengert._C.batch_jacobian([fn(x)], [x], False, True)


COUPLED = {
    "centred": lambda x: x - x.mean(0),
    "a small part of the mean": lambda x: x.sin() + 1e-10 * x.mean(0),
    "flipped": lambda x: x.flip(0),
    "batch_norm": lambda x: nnf.batch_norm(x, None, None, training=True),
    "softmax over the samples": lambda x: x.softmax(0),
    "sorted over the samples": lambda x: x.sort(0)[0].cumsum(1),
    "cumsum over the samples": lambda x: x.cumsum(0),
    "cholesky over the samples": lambda x: torch.linalg.solve(x @ x.mT + 3 * torch.eye(4, dtype=x.dtype, device=x.device), x),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_samples(name):
    with pytest.raises(ValueError, match="of one sample depends on input 0 of another sample"):
        wengert.batch_jacobian(COUPLED[name], rand(4, 3))


def test_the_message_names_the_node():
    with pytest.raises(ValueError, match="meet in SubBackward0"):
        wengert.batch_jacobian(lambda x: x - x.mean(0), rand(4, 3))


def test_what_cancels_to_rounding_is_not_taken_for_other_samples():
    """The logarithms of logcumsumexp's backward do not scale exactly, and nothing else is left of the derivative of 0."""

    def f(x):
        z = x[:, :1].expand(-1, 3)
        zeros = torch.linalg.cross(z.sin(), z.cos(), dim=1)
        return Opaque.apply(zeros.logcumsumexp(1).reshape(-1)).reshape(zeros.shape)

    assert wengert.batch_jacobian(f, rand(4, 2)).abs().max() < 1e-15
    with pytest.raises(ValueError, match="of one sample depends on input 0 of another sample"):
        wengert.batch_jacobian(lambda x: f(x) + 1e-12 * x.sum(), rand(4, 2))
