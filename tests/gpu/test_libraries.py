"""Nodes that only PyTorch's libraries for GPUs make: batch norm and recurrent nets of cuDNN, fused attention and cells."""

import pytest
import torch
import torch.nn.functional as F
import wengert
from support.check import MODES, check_against_torch
from torch import nn
from torch.autograd import functional as torch_functional
from torch.nn.attention import SDPBackend, sdpa_kernel

# What cannot be transformed has to agree in the forms that need no vmap.
PLAIN = [mode for mode in MODES if mode not in ("func", "forward", "value", "float32")]


@pytest.fixture
def r(gpu):
    generator = torch.Generator().manual_seed(0)
    return lambda *sizes: torch.randn(sizes, generator=generator, dtype=torch.float64, device="cpu").to(gpu)


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (2, 3, 2, 2)])
def test_batch_norm(r, shape):
    x, moved, w, b = r(*shape), r(*shape), r(3), r(3)
    fn = lambda a, w, b: F.batch_norm(x + a * moved, None, None, w, b, training=True).sin()
    check_against_torch(fn, (r(1), w, b), modes=PLAIN)
    check_against_torch(lambda x: F.batch_norm(x.sin(), None, None, w, b, training=True), x, modes=PLAIN)


def test_batch_norm_in_evaluation(r):
    x, mean, variance = r(2, 3, 2, 2), r(3), r(3).exp()
    fn = lambda a, w, b: F.batch_norm(x * a, mean, variance, w, b).sin()
    check_against_torch(fn, (r(2, 1, 1, 1), r(3), r(3)), modes=PLAIN)


def test_instance_norm(r):
    check_against_torch(lambda x, w, b: F.instance_norm(x.sin(), weight=w, bias=b), (r(2, 3, 4), r(3), r(3)), modes=PLAIN)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_cells(r, gpu, cell):
    net = cell(2, 3, dtype=torch.float64, device=gpu)
    first = lambda y: y[0] if isinstance(y, tuple) else y
    check_against_torch(lambda x: first(net(x)), r(3, 2), modes=PLAIN)


@pytest.mark.parametrize("net", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_nets(r, gpu, net):
    """cuDNN's have a first derivative only, and no batching rule."""
    net, x = net(2, 3, dtype=torch.float64, device=gpu), r(4, 2, 2)
    fn = lambda x: net(x)[0]
    check_against_torch(fn, x, modes=["jacobian", "gradient"])


@pytest.mark.parametrize("masked", ["", "causal", "boolean", "added", "hidden row"])
def test_fused_attention(gpu, r, masked):
    q, k, v = (r(2, 2, 5, 8).float() for _ in range(3))
    mask = None
    if masked in ("boolean", "hidden row"):
        mask = r(5, 5) > -0.5
        mask[:, 0] = True
        if masked == "hidden row":
            mask[2] = False
    elif masked == "added":
        mask = r(2, 2, 5, 5)

    def attention(q, k, v, backend=SDPBackend.EFFICIENT_ATTENTION):
        typed = mask.to(q.dtype) if masked == "added" else mask
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, typed, is_causal=masked == "causal")

    exact = lambda q, k, v: attention(q, k, v, SDPBackend.MATH)
    expected = torch_functional.jacobian(exact, (q.double(), k.double(), v.double()))
    theirs = torch_functional.jacobian(attention, (q, k, v))
    ours = wengert.jacobian(attention, (q, k, v))
    assert "ScaledDotProductEfficientAttentionBackward0" not in str(wengert.explain(attention, (q, k, v)))
    for mine, torchs, exactly in zip(ours, theirs, expected):
        distance = lambda t: (t.double() - exactly).norm() / exactly.norm()  # noqa: B023
        assert distance(mine) <= max(4 * distance(torchs), 1e-6)
