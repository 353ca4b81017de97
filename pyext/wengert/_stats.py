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
        engine: the engine's own counters (plans found and made, launches, densifications, ...).
        caches: bytes that are kept in memory between calls, by kind; see `clear_caches`.
    """

    native: dict[str, int]
    fallback: dict[str, dict[str, int]]
    engine: dict[str, Any]
    caches: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{'function':<18}{'calls':>8}  path"]
        lines += [f"{name:<18}{count:>8}  native" for name, count in sorted(self.native.items())]
        for name, reasons in sorted(self.fallback.items()):
            lines += [f"{name:<18}{count:>8}  PyTorch: {reason}" for reason, count in sorted(reasons.items())]
        lines += [f"{name:<18}{count:>8}  engine" for name, count in sorted(self.engine.items())]
        lines += [f"{name:<18}{count:>8}  bytes kept" for name, count in sorted(self.caches.items())]
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
    return Stats(dict(native_calls), fallback, dict(C.counters()), dict(C.cache_bytes()))


def clear_caches() -> None:
    """Forget what is kept in memory between calls: plans, the programs they consist of, and the CUDA kernels of these, but for
    kernels whose launches may not have ended or that a CUDA graph holds.

    Both are made anew where they are needed; calls that are running in other threads keep theirs.  The caches are bounded
    anyway, and what was least recently used goes first: by ``WENGERT_PLAN_CACHE_MEGABYTES``, in all, which is 256 by default
    and read when the first plan is made; CUDA kernels by 64 MiB each as source and compiled, and 128 MiB loaded.

    >>> import torch, wengert
    >>> _ = wengert.jacobian(torch.sin, torch.ones(2))
    >>> wengert.clear_caches()
    >>> sum(wengert.stats().caches.values())
    0
    """
    C.clear_caches()


def reset_stats() -> None:
    """Set every counter of `stats` to zero."""
    native_calls.clear()
    fallback_calls.clear()
    C.reset_counters()
