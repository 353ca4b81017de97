"""Comparing results, and telling a wrong number from an ill-conditioned one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from draw import FLOAT
from support.compare import Outcome, leaves, same_error

POLE = 1e7  # beyond this magnitude rounding decides

# Of several overwritten tensors the message names the first that a pass came upon.
OVERWRITTEN = "one of the variables needed for gradient computation has been modified by an inplace operation"


class Mismatch(AssertionError):
    """wengert and PyTorch disagree; by how much, relative to the largest entry, where that is the difference of two numbers."""

    def __init__(self, text: str, by: float | None = None) -> None:
        super().__init__(text)
        self.by = by


class Tolerant:
    """Compares nested results of one program."""

    def __init__(self, single: bool) -> None:
        # Where a program goes through float32 wengert may keep more digits in between than PyTorch does.
        self.rtol, self.atol = (1e-4, 1e-5) if single else (2e-7, 1e-9)

    def same(self, ours: Any, ref: Any, where: str, exactly: bool = False) -> None:
        if ref is None or isinstance(ref, torch.Tensor):
            self._tensor(ours, ref, where, exactly)
            return
        if type(ours) is not type(ref) or len(ours) != len(ref):
            count = len(ours) if isinstance(ours, (tuple, list)) else "no"
            raise Mismatch(f"{where}: {type(ours).__name__} with {count} parts for {type(ref).__name__} of {len(ref)}")
        for k, (a, b) in enumerate(zip(ours, ref)):
            self.same(a, b, f"{where}[{k}]", exactly)

    def _tensor(self, ours: Any, ref: torch.Tensor | None, where: str, exactly: bool) -> None:
        if type(ours) is not type(ref):
            raise Mismatch(f"{where}: {type(ours).__name__} for {type(ref).__name__}")
        if ref is None:
            return
        if ours.shape != ref.shape or ours.dtype != ref.dtype:
            raise Mismatch(f"{where}: {tuple(ours.shape)} {ours.dtype} for {tuple(ref.shape)} {ref.dtype}")
        a, b = ours.detach(), ref.detach()
        # An intended difference: 0 * inf off the structure is exactly 0, which may make what it is summed into finite.
        b = torch.where(b.isnan() & a.isfinite(), a, b)
        finite = b[b.isfinite()]
        scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
        if not b.numel() or (scale > POLE and not exactly):
            return
        rtol, atol = (0.0, 0.0) if exactly else (self.rtol, self.atol * scale)
        wrong = ~torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
        if bool(wrong.any()):
            k = int(wrong.reshape(-1).nonzero()[0])
            got, expected = a.reshape(-1)[k].item(), b.reshape(-1)[k].item()
            by = float((a - b)[wrong].abs().max()) / scale  # nan where one of them is not finite
            text = f"{int(wrong.sum())} of {b.numel()} differ, the first at {k}: {got!r} for {expected!r}"
            raise Mismatch(f"{where}: {text}", by)

    def agrees(self, ours: Any, ref: Any) -> bool:
        try:
            self.same(ours, ref, "")
        except Mismatch:
            return False
        return True


def same_calls(tol: Tolerant, ours: Callable[[], Any], theirs: Callable[[], Any], where: str) -> Any:
    """Equal results, or the same error. Returns PyTorch's result, None where it raised."""
    expected = Outcome.of(theirs)
    got = Outcome.of(ours)
    if expected.error is None:
        if got.error is not None:
            raise Mismatch(f"{where}: {got.describe()} where PyTorch returned") from got.error
        tol.same(got.value, expected.value, where)
        return expected.value
    if got.error is None:
        if "is not implemented" in str(expected.error):  # a derivative of a derivative that turns out not to be needed
            return None
        raise Mismatch(f"{where}: returned where PyTorch {expected.describe()}")
    if not same_error(got.error, expected.error) and not all(OVERWRITTEN in str(e) for e in (got.error, expected.error)):
        raise Mismatch(f"{where}: {got.describe()} where PyTorch {expected.describe()}") from got.error
    return None


def moves(call: Callable[[tuple[torch.Tensor, ...]], Any], xs: tuple[torch.Tensor, ...]) -> float:
    """How far a result moves, relative to its largest entry, when the inputs do in their last places."""
    base = leaves(call(xs))
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(2):
        moved = [x * (1 + 2e-15 * (torch.rand(x.shape, generator=generator, dtype=FLOAT) - 0.5)) for x in xs]
        for a, b in zip(leaves(call(tuple(moved))), base):
            keep = a.isfinite() & b.isfinite()
            if bool(keep.any()):
                worst = max(worst, float((a - b)[keep].abs().max()) / max(1.0, float(b[keep].abs().max())))
    return worst


def overflows(f: Callable[..., torch.Tensor], xs: tuple[torch.Tensor, ...]) -> bool:
    """Whether a number, or its gradient, is computed from numbers that are not finite or whose squares are not."""
    beyond = False

    def pack(t: torch.Tensor) -> torch.Tensor:
        nonlocal beyond
        # nan compares as False.
        beyond = beyond or (t.is_floating_point() and not bool((t.detach().abs() < torch.finfo(t.dtype).max ** 0.5).all()))
        return t

    leaves = tuple(x.detach().requires_grad_() for x in xs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f(*leaves)
        if y.requires_grad:
            torch.autograd.grad(y, leaves, create_graph=True, allow_unused=True)
    return beyond


def weights(t: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    """Numbers that weigh every entry differently."""
    k = torch.arange(t.numel(), dtype=FLOAT)
    return torch.cos(1.7 * k + 0.3 + shift).add(0.25).to(t.dtype).reshape(t.shape)


def weighted_sum(tree: Any, shift: float = 0.0) -> torch.Tensor:
    return sum(((t * weights(t, shift)).sum() for t in leaves(tree)), start=torch.zeros((), dtype=FLOAT))
