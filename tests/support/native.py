"""How much of what was just called ran on the engine, from wengert.stats()."""

from __future__ import annotations

import dataclasses
from collections import Counter

import wengert


@dataclasses.dataclass(frozen=True)
class Calls:
    """Counts since the process began: calls answered natively, calls handed to torch and why, single nodes called."""

    native: int
    fallback: Counter[str]
    nodes: int

    @classmethod
    def now(cls) -> Calls:
        stats = wengert.stats()
        reasons: Counter[str] = Counter()
        for by_reason in stats.fallback.values():
            reasons.update(by_reason)
        return cls(sum(stats.native.values()), reasons, int(stats.engine.get("node_calls", 0)))

    def __sub__(self, earlier: Calls) -> Calls:
        return Calls(self.native - earlier.native, self.fallback - earlier.fallback, self.nodes - earlier.nodes)
