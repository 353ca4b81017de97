"""PyTorch's conventions where arithmetic alone would say nan: masks under infinite cotangents, 0 log 0, poles, infinities."""

import itertools
import math

import pytest
import torch
import wengert
from support.compare import Tolerance, assert_same
from torch.autograd import functional as torch_functional
from torch.nn import functional as F

POINT = torch.tensor([-1.0, 0.0, 0.5, 2.0, -3.0, 1.0], dtype=torch.float64)
ZERO, ONE = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)

# Each gives 0 somewhere, without passing a cotangent on there.
MASKS = {
    "relu": torch.relu,
    "clamp": lambda x: x.clamp(min=0),
    "clamp both": lambda x: x.clamp(0, 1),
    "clamp by tensor": lambda x: x.clamp(min=ZERO),
    "where": lambda x: torch.where(x > 0, x, ZERO),
    "masked_fill": lambda x: x.masked_fill(x <= 0, 0.0),
    "maximum": lambda x: torch.maximum(x, ZERO),
    "fmax": lambda x: torch.fmax(x, ZERO),
    "relu6": F.relu6,
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "hardshrink": lambda x: F.hardshrink(x, 0.6),
    "softshrink": lambda x: F.softshrink(x, 0.6),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "tril": lambda x: x.reshape(2, 3).tril().reshape(6),
    "index_fill": lambda x: x.index_fill(0, torch.tensor([1]), 0.0),
    "xlogy with 0": lambda x: torch.xlogy(x, ZERO),
}
OUTER = {
    "log": torch.log,
    "sqrt": lambda x: x.abs().sqrt(),
    "reciprocal": torch.reciprocal,
    "times 0": lambda x: x * 0,
    "xlogy": lambda x: torch.xlogy(ONE, x),
    "power": lambda x: x**0.5,
}


def check(f, x):
    ours, ref = wengert.jacobian(f, x), torch_functional.jacobian(f, x)
    assert_same(ours, torch.where(ref.isnan() & ours.isfinite(), ours, ref))
    scalar = lambda x: f(x).sum()
    ours, ref = wengert.hessian(scalar, x), torch_functional.hessian(scalar, x)
    assert_same(ours, torch.where(ref.isnan() & ours.isfinite(), ours, ref), tol=Tolerance(rtol=1e-8, atol=1e-9))


@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 3.5, math.inf])
def test_norms_at_zero(order):
    norm = lambda x: torch.linalg.vector_norm(x, order)
    assert_same(*(m.jacobian(lambda x: norm(x) * math.nan, ZERO) for m in (wengert, torch_functional)))
    for f in (norm, lambda x: norm(x) ** 2, lambda x: (norm(x) * x).sum()):
        assert_same(wengert.jacobian(f, ZERO), torch_functional.jacobian(f, ZERO))
        ours, ref = wengert.hessian(f, ZERO), torch_functional.hessian(f, ZERO)
        assert_same(ours, torch.where(ref.isnan() & ours.isfinite(), ours, ref))


@pytest.mark.parametrize(("mask", "outer"), list(itertools.product(MASKS, OUTER)))
def test_masks_stop_infinite_cotangents(mask, outer):
    f = lambda x: OUTER[outer](MASKS[mask](x))
    ours, ref = wengert.jacobian(f, POINT), torch_functional.jacobian(f, POINT)
    assert_same(ours, torch.where(ref.isnan() & ours.isfinite(), ours, ref))


@pytest.mark.parametrize("order", range(5))
def test_polygamma_at_poles_and_infinities(order):
    x = torch.tensor([-7.3, -3, -2.5, -1, -0.5, 0.0, -0.0, 0.25, 1, 2, 30, math.inf, -math.inf, math.nan], dtype=torch.float64)
    f = lambda x: torch.polygamma(order, x)
    tol = Tolerance(rtol=1e-8, atol=0.0)
    ours, ref = wengert.jacobian(f, x).diagonal(), torch_functional.jacobian(f, x).diagonal()
    for a, b in zip(ours, ref):  # one by one, as the bound is relative to the largest
        assert_same(a, b, tol=tol)


X = torch.tensor([0.0, 0, 0, 1, 1, 2, -0.0, math.inf, -1, 0], dtype=torch.float64)
Y = torch.tensor([0.0, 1, -1, 0, math.inf, -1, math.inf, 0, 0, math.nan], dtype=torch.float64)


@pytest.mark.parametrize("op", [torch.xlogy, torch.special.xlog1py])
@pytest.mark.parametrize(
    ("f", "x"),
    [
        (lambda op, v: op(v, Y), X),
        (lambda op, v: op(X, v), Y),
        (lambda op, v: op(v, v), Y),
        (lambda op, v: op(2.0, v), Y),
        (lambda op, v: op(v, 0.0), X),
    ],
)
def test_products_with_a_logarithm(op, f, x):
    check(lambda v: f(op, v), x)
