"""Nodes that only PyTorch's libraries for GPUs make, on the host: while a test runs, their operators have kernels for the CPU.

tests/gpu/test_libraries.py runs the same nodes where they come from.
"""

import pytest
import torch
import wengert
from support.check import MODES, check_against_torch
from torch import Tensor
from torch.library import Library

aten = torch.ops.aten
# What vmap can do of these operators varies.
FORMS = [mode for mode in MODES if mode not in ("func", "forward", "value", "float32")]


def batch_norm(x, weight, bias, mean, variance, training, momentum, eps):
    y, saved_mean, saved_inverse = aten.native_batch_norm(x, weight, bias, mean, variance, training, momentum, eps)
    return y, saved_mean, saved_inverse, x.new_empty(0, dtype=torch.uint8)


def batch_norm_backward(x, g, weight, mean, variance, saved_mean, saved_inverse, eps, reserve):
    weight = weight.contiguous()  # PyTorch's kernel takes it for that
    return aten.native_batch_norm_backward(g, x, weight, mean, variance, saved_mean, saved_inverse, True, eps, [True, True, True])


def attention(q, k, v, bias, wants_logsumexp, dropout=0.0, causal=False, *, scale=None):
    mask = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
    y, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return y, logsumexp, torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)


def attention_backward(g, q, k, v, bias, y, logsumexp, seed, offset, dropout, wanted, causal=False, *, scale=None):
    mask = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
    found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, y, logsumexp, 0.0, causal, attn_mask=mask, scale=scale
    )
    return *found, None


@pytest.fixture(autouse=True)
def on_the_host():
    library = Library("aten", "IMPL")
    for name, kernel in {
        "cudnn_batch_norm": batch_norm,
        "cudnn_batch_norm_backward": batch_norm_backward,
        "_scaled_dot_product_efficient_attention": attention,
        "_scaled_dot_product_efficient_attention_backward": attention_backward,
    }.items():
        library.impl(name, kernel, "CPU")
    yield
    library._destroy()


def r(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2)])
def test_batch_norm_of_cudnn(shape):
    x, moved = r(*shape), r(*shape)

    def f(a, w, b):
        y, *_ = torch.cudnn_batch_norm(x + a * moved, w, b, None, None, True, 0.1, 1e-5)
        assert y.grad_fn.name() == "CudnnBatchNormBackward0"
        return y.sin()

    check_against_torch(f, (r(1), r(3), r(3)), modes=FORMS)
    w, b = r(3), r(3)
    check_against_torch(lambda x: f(x.mean(), w, b) * x.sum(), x, modes=FORMS)


@pytest.mark.parametrize("masked", ["", "causal", "mask"])
def test_fused_attention_is_read_as_what_it_is_composed_of(masked):
    mask = r(2, 1, 5, 6) if masked == "mask" else None

    def f(q, k, v):
        y, *_ = torch._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, masked == "causal")
        assert y.grad_fn.name() == "ScaledDotProductEfficientAttentionBackward0"
        return y

    def composed(q, k, v):
        scores = q @ k.mT / 2
        if masked == "causal":
            scores = scores.masked_fill(torch.ones(5, 6, dtype=torch.bool).triu(1), -torch.inf)
        return (scores if mask is None else scores + mask).softmax(-1) @ v

    inputs = (r(2, 3, 5, 4), r(2, 3, 6, 4), r(2, 3, 6, 4))
    assert "ScaledDotProductEfficientAttentionBackward0" not in str(wengert.explain(f, inputs))
    check_against_torch(f, inputs, modes=["jacobian", "graph", "gradient"])
    for mine, other in zip(wengert.jacobian(f, inputs), torch.autograd.functional.jacobian(composed, inputs)):
        torch.testing.assert_close(mine, other)
