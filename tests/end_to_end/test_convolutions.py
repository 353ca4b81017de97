"""The gradient of a float32 convolution by its data takes another algorithm than PyTorch's where channels are few."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
import wengert
from support.check import DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cpu" or not torch.backends.mkldnn.is_available(), reason="about oneDNN's kernels, which are for the CPU"
)

# Channels in and out, kernel, options; enough samples that the other algorithm pays.
TAKEN = {
    "few out": (6, 6, (3, 3), {"padding": 1}),
    "one out": (8, 1, (3, 3), {"padding": 1}),
    "kernel that is no square": (5, 3, (2, 4), {"padding": (0, 2)}),
    "full padding": (4, 5, (3, 3), {"padding": 2}),
    "dilated": (4, 6, (3, 3), {"dilation": 2, "padding": (1, 2)}),
    "one in": (1, 16, (3, 3), {"padding": 1}),
    "one in, valid": (1, 16, (3, 3), {"padding": "valid"}),
    "three in, same": (3, 16, (3, 3), {"padding": "same"}),
    "strided": (3, 20, (3, 3), {"stride": 2, "padding": 1}),
    "strided along one axis": (8, 12, (3, 2), {"stride": (1, 3)}),
}
LEFT = {
    "many out": (6, 16, (3, 3), {"padding": 1}),
    "strided, many in": (16, 4, (3, 3), {"stride": 2}),
    "groups": (8, 4, (3, 3), {"groups": 2}),
    "kernel of one": (6, 6, (1, 1), {}),
    "large kernel": (3, 20, (8, 8), {"stride": 2, "padding": 4}),
    "one in, padded beyond the kernel": (1, 16, (3, 3), {"padding": 3}),
    "strided along one axis, dilated": (8, 12, (3, 2), {"stride": (1, 3), "dilation": (2, 1)}),
}


def problem(name, dtype=torch.float32, batch=40):
    torch.manual_seed(0)
    channels, out, kernel, options = {**TAKEN, **LEFT}[name]
    w = torch.randn(out, channels // options.get("groups", 1), *kernel, dtype=dtype)
    return torch.randn(batch, channels, 12, 13, dtype=dtype), w, lambda x, w: F.conv2d(x, w, **options).sin()


@contextlib.contextmanager
def without_pytorchs():
    """PyTorch's own gradients of convolutions are zero."""

    def convolution_backward(g, x, w, sizes, *options):
        return tuple(torch.zeros_like(t) if wanted else None for t, wanted in zip((x, w), options[-1])) + (None,)

    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an overridden kernel
        library.impl("convolution_backward", convolution_backward, "CPU")
        yield


def errors(name, derive):
    """Of ours and of PyTorch's in float32, as root mean squares, by the derivative in float64."""
    x, w, f = problem(name)
    exact = derive(torch, *(t.double() for t in (x, w)), f)
    return [(derive(backend, x, w, f).double() - exact).square().mean().sqrt() for backend in (wengert, torch)]


def by_data(backend, x, w, f):
    x = x.clone().requires_grad_()
    return (backend.grad if backend is wengert else torch.autograd.grad)(f(x, w).sum(), x)[0]


def by_sample(backend, x, w, f):
    x = x[:, :, :5, :6]
    if backend is wengert:
        return wengert.batch_jacobian(lambda x: f(x, w), x)
    return torch.func.vmap(torch.func.jacrev(lambda s: f(s[None], w)[0]))(x)


@pytest.mark.parametrize("derive", [by_data, by_sample])
@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_is_as_accurate_as_pytorchs(name, derive):
    ours, theirs = errors(name, derive)
    assert ours <= 2 * theirs + 1e-7


@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_is_computed_by_the_faster_algorithm(name):
    x, w, f = problem(name)
    with without_pytorchs():
        computed = by_data(wengert, x, w, f).any()
    assert bool(computed) == (name in TAKEN)


def channels_last(x, w):
    return x.contiguous(memory_format=torch.channels_last), w


def in_double(x, w):
    return x.double(), w.double()


def few_samples(x, w):
    return x[:1], w


@pytest.mark.parametrize("change", [channels_last, in_double, few_samples])
def test_what_else_is_left_to_pytorch(change):
    x, w, f = problem("few out")
    x, w = change(x, w)
    with without_pytorchs():
        assert not by_data(wengert, x, w, f).any()
    torch.testing.assert_close(by_data(wengert, x, w, f), by_data(torch, x, w, f))


@pytest.mark.parametrize("name", ["few out", "one in"])
def test_with_gradients_of_the_weights(name):
    x, w, f = problem(name)
    x, w = x.requires_grad_(), w.requires_grad_()
    ours, theirs = (grad(f(x, w).sum(), (x, w)) for grad in (wengert.grad, torch.autograd.grad))
    torch.testing.assert_close(ours, theirs)
    first, second = (grad(f(x, w).sum(), (x, w), create_graph=True) for grad in (wengert.grad, torch.autograd.grad))
    again = [grad(g[0].square().sum(), w) for grad, g in ((wengert.grad, first), (torch.autograd.grad, second))]
    torch.testing.assert_close(*again, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("of", ["cotangent", "kernel"])
def test_infinities_and_nans_stay_where_they_are(name, of):
    """What is padded multiplies nothing; in PyTorch's float32 kernels some of it does, beyond the last step."""
    x, w, _ = problem(name)
    if of == "kernel":
        w[0, 0, 0, 0] = torch.inf
    cotangent = torch.randn_like(F.conv2d(x, w, **TAKEN[name][3]))
    if of == "cotangent":
        cotangent[0, 0, 0, 0], cotangent[1, 0, 2, 2] = torch.inf, torch.nan

    def gradient(grad, dtype):
        data = x.to(dtype).requires_grad_()
        return grad(F.conv2d(data, w.to(dtype), **TAKEN[name][3]), data, cotangent.to(dtype))[0].float()

    ours, exact = gradient(wengert.grad, torch.float32), gradient(torch.autograd.grad, torch.float64)
    assert not exact.isfinite().all()
    torch.testing.assert_close(ours, exact, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_complains_of_what_was_changed_or_freed():
    x, w, f = problem("few out")
    x = x.requires_grad_()
    y = F.conv2d(x * 1, w)
    w += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        wengert.grad(y.sum(), x)
    y = f(x, w).sum()
    wengert.grad(y, x)
    with pytest.raises(RuntimeError, match="second time"):
        wengert.grad(y, x)
