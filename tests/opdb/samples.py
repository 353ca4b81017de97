"""Samples of torch's operator database as functions of their differentiable inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from support.check import DEVICE
from support.compare import Outcome

SAMPLES, ELEMENTS, LOOKED_AT = 6, 64, 120

# Results are unspecified memory or drawn anew on every call: there is nothing to compare.
UNDEFINED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_", "resize_as_"}


def database() -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if torch.float64 in op.supported_dtypes(DEVICE.type)]


def op_name(op: Any) -> str:
    return op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for v in tree.values():
            yield from tensors_of(v)
    elif isinstance(tree, (tuple, list)):
        for v in tree:
            yield from tensors_of(v)


def rebuild(tree: Any, replacement: dict[int, torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return replacement.get(id(tree), tree)
    if isinstance(tree, dict):
        return {k: rebuild(v, replacement) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [rebuild(v, replacement) for v in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


def usable(t: torch.Tensor) -> bool:
    return t.requires_grad and t.is_floating_point() and t.layout is torch.strided


def as_function(op: Any, sample: Any) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    """The operator as a function of its differentiable floating inputs alone.

    Which outputs count is settled by one plain call: under a transform every tensor looks alike.
    """
    whole = (sample.input, sample.args, sample.kwargs)
    inputs = list({id(t): t for t in tensors_of(whole) if usable(t)}.values())

    def outputs(xs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, args, kwargs = rebuild(whole, {id(t): v for t, v in zip(inputs, xs)})
        out = op(x, *args, **kwargs)
        if sample.output_process_fn_grad is not None:
            out = sample.output_process_fn_grad(out)
        return list(tensors_of(out))

    detached = tuple(t.detach() for t in inputs)
    first = Outcome.of(lambda: outputs(tuple(x.clone().requires_grad_() for x in detached)))
    kept = [k for k, t in enumerate(first.value or ()) if t.requires_grad and t.layout is torch.strided]

    def f(*xs: torch.Tensor) -> Any:
        found = outputs(xs)
        if not kept:
            raise NoOutput
        # A complex output counts as its pair of real parts: torch has no Jacobian of the other kind.
        chosen = (found[k] for k in kept)
        return tuple(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in chosen)

    return f, detached


class NoOutput(Exception):
    """No differentiable floating output: not a case for a Jacobian."""


def chosen_samples(op: Any, full: bool) -> list[Any]:
    torch.manual_seed(0)
    samples = op.sample_inputs(str(DEVICE), torch.float64, requires_grad=True)
    if full:
        return list(samples)

    def size(sample: Any) -> int:
        return sum(t.numel() for t in tensors_of((sample.input, sample.args, sample.kwargs)) if usable(t))

    sized = [(size(s), s) for s in itertools.islice(samples, LOOKED_AT)]
    small = [s for n, s in sized if 0 < n <= ELEMENTS]
    if small:
        step = max(1, len(small) // SAMPLES)
        return small[::step][:SAMPLES]
    # An operator without a small sample is looked at on its two smallest.
    rest = sorted((n, k) for k, (n, _) in enumerate(sized) if n > 0)
    return [sized[k][1] for _, k in rest[:2]]


def scalar_of(f: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    def g(*xs: torch.Tensor) -> torch.Tensor:
        terms = []
        for y in f(*xs):
            k = torch.arange(y.numel(), dtype=torch.float64).reshape(y.shape)
            terms.append((y.double() * torch.cos(1.7 * k + 0.3)).sum())
        return sum(terms[1:], start=terms[0])

    return g
