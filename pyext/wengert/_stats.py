"""Counts of calls the engine answered and of calls that took PyTorch's path, with the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ._native import C

native_calls: Counter[str] = Counter()
fallback_calls: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True)
class Stats:
    """A snapshot of the counters since the last `reset_stats`.

    Attributes:
        native: calls answered by the engine, by name of the public function.
        fallback: calls that took PyTorch's path, by name and then by reason.
        engine: the engine's own counters (tapes captured, plans cached, densifications by reason, ...).
    """

    native: dict[str, int]
    fallback: dict[str, dict[str, int]]
    engine: dict[str, Any]

    def __str__(self) -> str:
        lines = [f"{'function':<18}{'calls':>8}  path"]
        lines += [f"{name:<18}{count:>8}  native" for name, count in sorted(self.native.items())]
        for name, reasons in sorted(self.fallback.items()):
            lines += [f"{name:<18}{count:>8}  PyTorch: {reason}" for reason, count in sorted(reasons.items())]
        lines += [f"{name:<18}{count:>8}  engine" for name, count in sorted(self.engine.items())]
        return "\n".join(lines)


def stats() -> Stats:
    """How many calls ran on the engine, and how many took PyTorch's path and why.

    The counts are per process and over all threads.

    >>> import torch, wengert
    >>> wengert.reset_stats()
    >>> _ = wengert.jacobian(torch.sin, torch.ones(2, dtype=torch.complex64))
    Traceback (most recent call last):
    RuntimeError: grad can be implicitly created only for real scalar outputs but got torch.complex64
    >>> sum(wengert.stats().fallback["jacobian"].values())
    1
    """
    fallback: dict[str, dict[str, int]] = {}
    for (name, reason), count in list(fallback_calls.items()):
        fallback.setdefault(name, {})[reason] = count
    return Stats(dict(native_calls), fallback, dict(C.counters()))


def reset_stats() -> None:
    """Set every counter of `stats` to zero."""
    native_calls.clear()
    fallback_calls.clear()
    C.reset_counters()
