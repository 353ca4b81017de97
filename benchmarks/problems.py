"""The benchmark's problems, each spelled out once and generic in its array namespace (torch or jax.numpy).

A problem is a function and its inputs at several sizes; the rows that are timed, with their forms and floors,
stand in rows.py. The tests run every problem at its `small` size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

# randn(*shape) and positive(*shape) (numbers in [0.5, 1.5)); xp is the array namespace.
Random = Callable[..., Any]
Build = Callable[[Any, Random, Random, Any], tuple[Callable[..., Any], Any]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """kind: jac | hess | batchjac (per-sample Jacobian of f mapping (B, *in) to (B, *out)) | grad | persample."""

    name: str
    kind: str
    make: Build
    small: Any

    def build(self, randn: Random, positive: Random, size: Any, xp: Any = torch) -> tuple[Callable[..., Any], Any]:
        return self.make(xp, randn, positive, size)


LIBRARY: dict[str, Problem] = {}


def problem(name: str, kind: str, small: Any) -> Callable[[Build], Build]:
    def register(make: Build) -> Build:
        LIBRARY[name] = Problem(name, kind, make, small)
        return make

    return register


@problem("two_variables", "hess", 2)
def _two_variables(xp, randn, positive, n):
    x = positive(n) * 2
    return lambda v: v[0] ** 0.7 + v[1] ** 2, x


@problem("notebook_10x2", "jac", 10)
def _notebook(xp, randn, positive, rows):
    data = positive(rows, 2) - 0.4
    return lambda v: v[0] ** data + v[1] ** 2, positive(2) * 3


@problem("linear_ab", "jac", 20)
def _linear_ab(xp, randn, positive, rows):
    x = randn(rows, 1)
    return lambda a, b: a * x + b, (randn(1), randn(1))


@problem("linear_xab", "jac", 20)
def _linear_xab(xp, randn, positive, rows):
    return lambda x, a, b: a * x + b, (randn(rows, 1), randn(1), randn(1))


@problem("pointwise", "jac", 12)
def _pointwise(xp, randn, positive, n):
    return lambda x: xp.sin(x) ** 2 / x * x**x, positive(n)


@problem("rosenbrock", "hess", 9)
def _rosenbrock(xp, randn, positive, n):
    return lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(), positive(n)


@problem("lorenz96", "jac", 9)
def _lorenz96(xp, randn, positive, n):
    return lambda x: (xp.roll(x, -1) - xp.roll(x, 2)) * xp.roll(x, 1) - x + 8.0, randn(n)


@problem("heat2d", "jac", 6)
def _heat2d(xp, randn, positive, n):
    def f(u):
        c = u[1:-1, 1:-1]
        return u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:] - 4 * c + c * c * c

    return f, randn(n, n)


@problem("softmax_ce", "hess", (4, 5))
def _softmax_ce(xp, randn, positive, size):
    def largest(z):
        return z.max(-1, keepdims=True).values if xp is torch else z.max(-1, keepdims=True)

    def f(z):
        e = z - largest(z)
        return (xp.log(xp.exp(e).sum(-1)) - e[..., 0]).sum()

    return f, randn(*size)


@problem("logistic", "hess", (12, 4))
def _logistic(xp, randn, positive, size):
    x, y = randn(*size), xp.sign(randn(size[0]))
    return lambda w: xp.log1p(xp.exp(-(x @ w) * y)).sum() + 0.5 * (w * w).sum(), randn(size[1])


@problem("cartpole", "batchjac", 4)
def _cartpole(xp, randn, positive, batch):
    def f(s):
        th, xd, thd, u = s[..., 1], s[..., 2], s[..., 3], s[..., 4]
        g, mc, mp, length = 9.81, 1.0, 0.1, 0.5
        sth, cth = xp.sin(th), xp.cos(th)
        tmp = (u + mp * length * thd * thd * sth) / (mc + mp)
        thdd = (g * sth - cth * tmp) / (length * (4 / 3 - mp * cth * cth / (mc + mp)))
        return xp.stack([xd, thd, tmp - mp * length * thdd * cth / (mc + mp), thdd], -1)

    return f, randn(batch, 5)


@problem("pendulum", "batchjac", 3)
def _pendulum(xp, randn, positive, batch, steps=8, h=0.05):
    def rhs(s):
        a, b, wa, wb = s[..., 0], s[..., 1], s[..., 2], s[..., 3]
        d = a - b
        den = 2 - xp.cos(d) ** 2
        da = (-9.8 * (2 * xp.sin(a) - xp.sin(b) * xp.cos(d)) - xp.sin(d) * (wb * wb + wa * wa * xp.cos(d))) / den
        db = (2 * xp.sin(d) * wa * wa + 19.6 * (xp.sin(a) * xp.cos(d) - xp.sin(b)) + wb * wb * xp.sin(d) * xp.cos(d)) / den
        return xp.stack([wa, wb, da, db], -1)

    def f(s):
        for _ in range(steps):
            k1 = rhs(s)
            k2 = rhs(s + h / 2 * k1)
            k3 = rhs(s + h / 2 * k2)
            k4 = rhs(s + h * k3)
            s = s + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return s

    return f, randn(batch, 4)


def tanh_net(xp, weights):
    def f(x):
        for w in weights[:-1]:
            x = xp.tanh(x @ w)
        return x @ weights[-1]

    return f


@problem("mlp", "batchjac", 4)
def _mlp(xp, randn, positive, batch):
    weights = [randn(3, 64) * 0.3, randn(64, 64) * 0.2, randn(64, 1) * 0.3]
    return tanh_net(xp, weights), randn(batch, 3)


@problem("mlp_deep", "batchjac", 3)
def _mlp_deep(xp, randn, positive, batch):
    weights = [randn(3, 64) * 0.3, randn(64, 64) * 0.2, randn(64, 64) * 0.2, randn(64, 1) * 0.3]
    return tanh_net(xp, weights), randn(batch, 3)


@problem("bottleneck", "batchjac", (3, 12))
def _bottleneck(xp, randn, positive, size):
    batch, n = size
    weights = [randn(n, 64) * 0.1, randn(64, 8) * 0.2, randn(8, 64) * 0.3, randn(64, n) * 0.2]
    return tanh_net(xp, weights), randn(batch, n)


@problem("chain", "grad", 12)
def _chain(xp, randn, positive, n):
    return lambda x: xp.sin(x) ** 2 / x * xp.exp(-x) + xp.tanh(x), positive(n)


@problem("persample_mlp", "persample", None)
def _persample(xp, randn, positive, batch):
    """(loss, (params, x, y)): one sample's squared loss in a 3-64-64-1 net of 4,417 parameters."""
    params = {
        "w1": randn(3, 64) * 0.3,
        "b1": randn(64) * 0.1,
        "w2": randn(64, 64) * 0.2,
        "w3": randn(64, 1) * 0.3,
        "b3": randn(1) * 0.1,
    }

    def loss(p, x, y):
        h = xp.tanh(x @ p["w1"] + p["b1"])
        h = xp.tanh(h @ p["w2"])
        return ((h @ p["w3"] + p["b3"] - y) ** 2).sum()

    return loss, (params, randn(batch, 3), randn(batch, 1))
