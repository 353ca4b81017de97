"""What results taken with create_graph lead to: compared with torch's over every form, in inputs and in captured leaves."""

# ruff: noqa: B023 - every function made in a loop is called within the same iteration

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import wengert
from torch.autograd import functional as torch_functional

from support.compare import Outcome, Tolerance, assert_same

ROWS, ELEMENTS = 20_000, 30  # of the Jacobians and Hessians that are looked at
Function = Callable[..., Any]
Tensors = tuple[torch.Tensor, ...]
Form = Callable[[Any], Any]  # of wengert or torch.autograd.functional


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def weights_like(t: torch.Tensor) -> torch.Tensor:
    """Fixed, irregular weights: a sum with them hides no entry and cancels no symmetry."""
    k = torch.arange(t.numel(), dtype=torch.float64, device=t.device)
    return torch.cos(1.7 * k + 0.3).add(0.25).to(t.dtype).reshape(t.shape)


def variants(fn: Function, inputs: Tensors) -> Iterator[tuple[str, Function, Tensors, Tensors]]:
    """The function of all inputs, of all but one, which it captures, and with a captured factor."""
    floating = [k for k, x in enumerate(inputs) if x.is_floating_point()]
    yield "", fn, inputs, ()
    if len({id(x) for x in inputs}) == len(inputs) > 1:
        for k in floating[:3]:
            captured = inputs[k].detach().clone().requires_grad_()
            yield f" input {k} captured", lambda *a: fn(*a[:k], captured, *a[k:]), inputs[:k] + inputs[k + 1 :], (captured,)
    for k in floating[:1]:
        factor = torch.ones_like(inputs[k]).requires_grad_()
        yield " captured factor", lambda *a: fn(*a[:k], a[k] * factor, *a[k + 1 :]), inputs, (factor,)


def forms(fn: Function, scalar: Function, xs: Tensors) -> Iterator[tuple[str, Form]]:
    """Every form with create_graph, and gradients of gradients by hand."""
    options = {"create_graph": True}
    ys = fn(*xs)
    cotangents = tuple(map(weights_like, ys)) if isinstance(ys, tuple) else weights_like(ys)
    tangents = tuple(map(weights_like, xs))
    elements = sum(x.numel() for x in xs)
    for vectorize in (False, True):
        if elements * sum(y.numel() for y in as_tuple(ys)) <= ROWS:
            yield f"jacobian {vectorize=}", lambda m: m.jacobian(fn, xs, vectorize=vectorize, **options)
        if elements <= ELEMENTS:
            yield f"hessian {vectorize=}", lambda m: m.hessian(scalar, xs, vectorize=vectorize, **options)
    yield "vjp", lambda m: m.vjp(fn, xs, cotangents, **options)[1]
    yield "jvp", lambda m: m.jvp(fn, xs, tangents, **options)[1]
    yield "vhp", lambda m: m.vhp(scalar, xs, tangents, **options)[1]
    yield "hvp", lambda m: m.hvp(scalar, xs, tangents, **options)[1]
    active = [x for x in dict.fromkeys(xs) if x.requires_grad]
    live = [y for y in as_tuple(ys) if y.requires_grad]
    if not live:
        return
    seeds = [weights_like(y) for y in live]

    def grad(module: Any, *args: Any, **more: Any) -> Any:
        function = wengert.grad if module is wengert else torch.autograd.grad
        return function(*args, create_graph=True, allow_unused=True, **more)

    def again(module: Any) -> Any:
        first = grad(module, scalar(*xs), active)
        return grad(module, sum((g * g).sum() for g in first if g is not None and g.requires_grad), active)

    yield "grad", lambda m: grad(m, live, active, seeds)
    yield "grad batched", lambda m: grad(m, live, active, [torch.stack([s, s]) for s in seeds], is_grads_batched=True)
    yield "grad of the gradient's square", again


def flat(tree: Any) -> list[Any]:
    """The tensors of a result, with None where there is none."""
    return [t for part in tree for t in flat(part)] if isinstance(tree, (tuple, list)) else [tree]


def assert_same_history(ours: list[Any], theirs: list[Any], wrt: Sequence[torch.Tensor], where: str, tol: Tolerance) -> None:
    """Ours are None, require grad, and have no derivative or zeros exactly where torch's do."""
    assert [t is None for t in ours] == [t is None for t in theirs], f"{where}: which results are None"
    for k, (a, b) in enumerate((a, b) for a, b in zip(ours, theirs) if b is not None):
        assert a.requires_grad == b.requires_grad, f"{where}[{k}]: requires_grad is {a.requires_grad}, torch's {b.requires_grad}"
        assert a.is_contiguous() or not b.is_contiguous(), f"{where}[{k}]: strides {a.stride()}, torch's {b.stride()}"
        if not b.requires_grad:
            continue
        found, expected = (
            Outcome.of(lambda: torch.autograd.grad((t * weights_like(t)).sum(), wrt, retain_graph=True, allow_unused=True))
            for t in (a, b)
        )
        if expected.error is not None:  # torch has no derivative of this derivative
            continue
        assert found.error is None, f"{where}[{k}]: {found.describe()}"
        absent = [[g is None for g in outcome.value] for outcome in (found, expected)]
        assert absent[0] == absent[1], f"{where}[{k}]: which gradients are None: {absent[0]}, torch's {absent[1]}"
        assert_same(found.value, expected.value, f"derivative of {where}[{k}]", tol)


def assert_same_histories(fn: Function, scalar: Callable[[Function], Function], inputs: Tensors, tol: Tolerance) -> None:
    """Of every variant in every form that torch serves; `scalar` makes a function with one output element of another."""
    for variant, f, arguments, captured in variants(fn, inputs):
        fresh = {id(x): x.detach().clone().requires_grad_(x.is_floating_point()) for x in arguments}
        xs = tuple(fresh[id(x)] for x in arguments)
        wrt = [x for x in dict.fromkeys((*xs, *captured)) if x.requires_grad]
        if not any(x.requires_grad for x in xs) or Outcome.of(lambda: f(*xs)).error is not None:
            continue
        for name, form in forms(f, scalar(f), xs):
            theirs = Outcome.of(lambda: flat(form(torch_functional)))
            if theirs.error is None:
                assert_same_history(flat(form(wengert)), theirs.value, wrt, name + variant, tol)
