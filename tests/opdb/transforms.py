"""The operators under torch.func's transforms, of one point and of a batch with ties in it."""

# ruff: noqa: B023 - every function made in a loop is called within the same iteration

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.func
import wengert
from agreement import OpReport, compare_either
from support.compare import Outcome, leaves
from torch.autograd import functional as torch_functional

POLE = 1e7
Inputs = tuple[torch.Tensor, ...]
Function = Callable[..., Any]


def sweep_transforms(report: OpReport, label: str, f: Function, g: Function, inputs: Inputs, second: bool) -> None:
    """f as it is and g, the sum of its weighted outputs, through every transform and every transform under vmap."""
    argnums = tuple(range(len(inputs)))
    first_order = [("jacrev", f), ("jacfwd", f), ("grad", g)]
    forms = [(name, h, torch_functional.jacobian) for name, h in first_order]
    forms += [("hessian", g, torch_functional.hessian)] * second
    samples = batch_of(g, inputs, torch_functional.hessian if second else torch_functional.jacobian)
    batch = tuple(torch.stack(parts) for parts in zip(*samples))
    for name, h, loop in forms:
        ours, theirs = getattr(wengert.func, name)(h, argnums), getattr(torch.func, name)(h, argnums)
        one = Outcome.of(lambda: leaves(loop(h, inputs)))
        compare_either(report, f"{label} {name}", lambda: ours(*inputs), one, lambda: theirs(*inputs))
        rows = Outcome.of(lambda: [torch.stack(parts) for parts in zip(*(leaves(loop(h, s)) for s in samples))])
        compare_either(
            report,
            f"{label} vmap({name})",
            lambda: wengert.func.vmap(ours)(*batch),
            rows,
            lambda: torch.func.vmap(theirs)(*batch),
        )


def batch_of(g: Function, inputs: Inputs, derivative: Function) -> list[Inputs]:
    """Three samples near the inputs, the last one rounded to halves: ties and repeated values.

    Where the operator is not defined there, or has a pole, the inputs themselves take their place.
    """
    samples = [inputs]
    for candidate in (tuple(0.97 * x for x in inputs), tuple((2 * x).round() / 2 for x in inputs)):
        found = Outcome.of(lambda: leaves(derivative(g, candidate)))
        usable = found.error is None and all(bool((t.abs() < POLE).all()) for t in found.value)
        samples.append(candidate if usable else inputs)
    return samples
