"""Building a zoo: cases made once for float64 and once for float32 from the same random numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from support.check import DEFAULT_TOLERANCE, DEVICE, MODES, check_against_torch
from support.compare import Tolerance


class Source:
    """Random tensors in one dtype; the same seed gives the same numbers in every dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(20)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self._generator, device="cpu").to(self.dtype).to(DEVICE)

    def positive(self, *shape: int) -> torch.Tensor:
        """Numbers in [0.5, 1.5)."""
        return (torch.rand(*shape, dtype=torch.float64, generator=self._generator, device="cpu") + 0.5).to(self.dtype).to(DEVICE)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self._generator, device="cpu").to(DEVICE)

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=DEVICE)

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Give a module's parameters and floating buffers this source's numbers."""
        module = module.to(DEVICE, self.dtype)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(self(*p.shape) * 0.4)
        return module.requires_grad_(False)


Built = tuple[Callable[..., Any], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[Source], Built]
    modes: tuple[str, ...]
    tol: Tolerance = DEFAULT_TOLERANCE

    def __str__(self) -> str:
        return self.name

    def check(self, mode: str) -> None:
        fn, inputs = self.build(Source(torch.float64))
        single = self.build(Source(torch.float32)) if mode == "float32" else None
        check_against_torch(fn, inputs, modes=(mode,), single=single, tol=self.tol)


class Zoo:
    """A list of cases filled by a decorator and turned into one parametrised test."""

    def __init__(self) -> None:
        self._cases: list[Case] = []

    def __iter__(self) -> Iterator[Case]:
        return iter(self._cases)

    def case(
        self, name: str, *, skip: Iterable[str] = (), extra: Iterable[str] = (), tol: Tolerance = DEFAULT_TOLERANCE
    ) -> Callable[[Any], Any]:
        """Register build(source) -> (fn, inputs). `skip` names modes torch itself cannot serve for this function."""
        modes = tuple(m for m in MODES if m not in set(skip)) + tuple(extra)

        def register(build: Callable[[Source], Built]) -> Callable[[Source], Built]:
            assert name not in {c.name for c in self._cases}, f"two cases are called {name}"
            self._cases.append(Case(name, build, modes, tol))
            return build

        return register

    def parametrize(self) -> pytest.MarkDecorator:
        params = [pytest.param(c, m, id=f"{c.name}-{m}") for c in self._cases for m in c.modes]
        return pytest.mark.parametrize(("case", "mode"), params)
