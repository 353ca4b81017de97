"""What an operation of a random program may draw: structure from one seed, content from another.

*Structure* is what decides the graph: which axes, how many steps, which variant. *Content* is what a cached plan must not hold:
numbers, indices, masks. Programs of one structural seed with several contents have equal graphs and meet the same plan.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

FLOAT = torch.float64


class Draw:
    """The draws of one step.

    Args:
        structure, content: seeds.
        values: the values of the program so far.
        first: the first axis an operation may touch: 1 in programs over a batch, whose samples must stay independent.
    """

    def __init__(self, structure: object, content: object, values: Sequence[torch.Tensor], first: int) -> None:
        self._structure, self._content = random.Random(str(structure)), random.Random(str(content))
        self.values, self.first = values, first

    # structure

    def integer(self, low: int, high: int) -> int:
        return self._structure.randint(low, high)

    def choice(self, options: Sequence[Any]) -> Any:
        return self._structure.choice(options)

    def chance(self, p: float) -> bool:
        return self._structure.random() < p

    def sample(self, options: Sequence[Any], count: int) -> list[Any]:
        return self._structure.sample(options, count)

    def shuffled(self, options: Sequence[Any]) -> list[Any]:
        return self.sample(options, len(options))

    def axis(self, x: torch.Tensor) -> int:
        return self._structure.randrange(self.first, x.dim())

    def axes(self, x: torch.Tensor, least: int = 1) -> tuple[int, ...]:
        inner = range(self.first, x.dim())
        return tuple(self.sample(inner, self.integer(min(least, len(inner)), len(inner))))

    def small_shape(self, most: int = 3) -> tuple[int, ...]:
        return tuple(self.integer(1, most) for _ in range(self.integer(1, 2)))

    # content

    def number(self, low: float = -1.5, high: float = 1.5) -> float:
        return self._content.uniform(low, high)

    def value(self, options: Sequence[Any]) -> Any:
        return self._content.choice(options)

    def tensor(self, *shape: int, low: float = -1.5, high: float = 1.5) -> torch.Tensor:
        numbers = [self.number(low, high) for _ in range(math.prod(shape))]
        return torch.tensor(numbers, dtype=FLOAT).reshape(shape)

    def indices(self, shape: Sequence[int], size: int) -> torch.Tensor:
        numbers = [self._content.randrange(size) for _ in range(math.prod(shape))]
        return torch.tensor(numbers, dtype=torch.long).reshape(tuple(shape))

    def permutation(self, size: int) -> torch.Tensor:
        return torch.tensor(self._content.sample(range(size), size), dtype=torch.long)

    def mask(self, shape: Sequence[int]) -> torch.Tensor:
        numbers = [self._content.random() < 0.5 for _ in range(math.prod(shape))]
        return torch.tensor(numbers, dtype=torch.bool).reshape(tuple(shape))

    # shapes, the batch axis left alone

    def lead(self, x: torch.Tensor) -> tuple[int, ...]:
        return tuple(x.shape[: self.first])

    def inner(self, x: torch.Tensor) -> tuple[int, ...]:
        return tuple(x.shape[self.first :])

    def size(self, x: torch.Tensor) -> int:
        return math.prod(self.inner(x))

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*self.lead(x), self.size(x))

    def view(self, x: torch.Tensor, *shape: int) -> torch.Tensor:
        return x.reshape(*self.lead(x), *shape)

    def matrix(self, x: torch.Tensor) -> torch.Tensor:
        """The inner axes as a matrix."""
        return self.view(x, self.size(x) // x.shape[-1] if x.shape[-1] else 0, x.shape[-1])

    def square(self, x: torch.Tensor, k: int) -> torch.Tensor:
        """A k x k matrix of the first elements, again and again where there are few."""
        return self.view(self.cycled(x, k * k), k, k)

    def cycled(self, x: torch.Tensor, count: int) -> torch.Tensor:
        flat = self.flat(x)
        return flat[..., torch.arange(count) % flat.shape[-1]] if flat.shape[-1] < count else flat[..., :count]

    def along(self, x: torch.Tensor, axis: int, key: Any) -> torch.Tensor:
        return x[(slice(None),) * axis + (key,)]

    def other(self, x: torch.Tensor) -> torch.Tensor:
        """Another value of the program, cut or summed to something that broadcasts against x."""
        y = self.choice(self.values)
        if y.dim() < self.first or y.shape[: self.first] != x.shape[: self.first] or not y.is_floating_point():
            return x
        y = self.view(y, -1) if y.numel() else x
        if y.numel() == 0:
            return x
        if self.chance(0.6):
            return self.cycled(y, self.size(x)).reshape(x.shape)
        return y.sum(-1).reshape(self.lead(x) + (1,) * (x.dim() - self.first))


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation: a function of a value with at least one inner axis and of its draws.

    Attributes:
        batched: leaves the axes in front of `Draw.first` alone.
        single: computes in float32 within.
        exact: up to which order PyTorch's own derivatives are right, and why no further.
    """

    run: Callable[[torch.Tensor, Draw], torch.Tensor]
    family: str
    batched: bool = True
    single: bool = False
    exact: tuple[int, str] = (9, "")


OPS: dict[str, Op] = {}
FAMILIES: dict[str, list[str]] = {}


def op(
    run: Any = None, *, batched: bool = True, single: bool = False, exact: tuple[int, str] = (9, "")
) -> Any:
    """Registers an operation under its name; its family is the file it stands in."""

    def register(run: Callable[[torch.Tensor, Draw], torch.Tensor]) -> Callable[[torch.Tensor, Draw], torch.Tensor]:
        family = run.__module__.rpartition(".")[2]
        assert run.__name__ not in OPS, run.__name__
        OPS[run.__name__] = Op(run, family, batched, single, exact)
        FAMILIES.setdefault(family, []).append(run.__name__)
        return run

    return register if run is None else register(run)
