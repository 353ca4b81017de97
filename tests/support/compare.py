"""Comparing what wengert returns with what torch returns: structure, dtype, values and errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Element bounds; the absolute one is relative to the largest finite reference entry (or 1).

    Never tighter than a few units in the last place of the compared dtype.
    """

    rtol: float = 1e-8
    atol: float = 1e-10


def assert_tensor(ours: torch.Tensor, ref: torch.Tensor, where: str, tol: Tolerance) -> None:
    assert isinstance(ours, torch.Tensor), f"{where}: expected a tensor, got {type(ours).__name__}"
    assert ours.shape == ref.shape, f"{where}: shape {tuple(ours.shape)} where torch gives {tuple(ref.shape)}"
    assert ours.dtype == ref.dtype, f"{where}: dtype {ours.dtype} where torch gives {ref.dtype}"
    assert ours.device == ref.device, f"{where}: device {ours.device} where torch gives {ref.device}"
    a, b = ours.detach(), ref.detach()
    # The one intended difference: an off-structure entry is exactly 0 where torch computes 0 * inf = nan.
    b = torch.where(b.isnan() & (a == 0), torch.zeros_like(b), b)
    finite = b[b.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    eps = torch.finfo(b.dtype).eps if b.is_floating_point() or b.is_complex() else 0.0
    rtol, atol = max(tol.rtol, 32 * eps), max(tol.atol, 8 * eps) * scale
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{where}: {text}")


def assert_same(ours: Any, ref: Any, where: str = "result", tol: Tolerance = Tolerance()) -> None:
    """Nested tuples, lists and dicts of tensors must agree in structure, type, dtype and value."""
    if isinstance(ref, torch.Tensor):
        assert_tensor(ours, ref, where, tol)
    elif isinstance(ref, dict):
        assert isinstance(ours, dict) and list(ours) == list(ref), f"{where}: keys {list(ours)} for {list(ref)}"
        for key in ref:
            assert_same(ours[key], ref[key], f"{where}[{key!r}]", tol)
    elif isinstance(ref, (tuple, list)):
        assert type(ours) is type(ref), f"{where}: {type(ours).__name__} where torch gives {type(ref).__name__}"
        assert len(ours) == len(ref), f"{where}: {len(ours)} parts where torch gives {len(ref)}"
        for k, (a, b) in enumerate(zip(ours, ref)):
            assert_same(a, b, f"{where}[{k}]", tol)
    else:
        assert ours == ref, f"{where}: {ours!r} where torch gives {ref!r}"


def leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of a nested result, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    return [t for part in tree for t in leaves(part)] if not isinstance(tree, (str, type(None))) else []


@dataclasses.dataclass
class Outcome:
    """What a call did: its result or its exception."""

    value: Any = None
    error: BaseException | None = None

    @classmethod
    def of(cls, call: Callable[[], Any]) -> Outcome:
        try:
            return cls(value=call())
        except Exception as error:
            return cls(error=error)

    def describe(self) -> str:
        if self.error is None:
            return "returned"
        return f"raised {type(self.error).__name__}: {str(self.error).splitlines()[0] if str(self.error) else ''}"


def given(outcome: Outcome) -> Any:
    """What the call did, once more."""
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def same_error(ours: BaseException, ref: BaseException) -> bool:
    """Same type and same first line; what follows in torch's messages names C++ source lines."""

    def first(e: BaseException) -> str:
        return str(e).splitlines()[0] if str(e) else ""

    return type(ours) is type(ref) and first(ours) == first(ref)


def assert_same_call(ours: Callable[[], Any], ref: Callable[[], Any], where: str, tol: Tolerance = Tolerance()) -> Any:
    """Run both: equal results, or the same error. Returns torch's result (None when it raised)."""
    expected = Outcome.of(ref)
    if expected.error is None:
        assert_same(ours(), expected.value, where, tol)
        return expected.value
    got = Outcome.of(ours)
    assert got.error is not None, f"{where}: returned a value where torch {expected.describe()}"
    assert same_error(got.error, expected.error), f"{where}: {got.describe()} where torch {expected.describe()}"
    return None


def assert_same_error(ours: Callable[[], Any], ref: Callable[[], Any]) -> None:
    """Run both: torch raises, and ours raises the same type with the same text."""
    expected, got = Outcome.of(ref), Outcome.of(ours)
    assert expected.error is not None, "the case is no error in torch"
    assert type(got.error) is type(expected.error), f"{got.describe()} where torch {expected.describe()}"
    assert str(got.error) == str(expected.error)
