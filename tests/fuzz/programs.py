"""A random program: inputs, steps, outputs, all drawn from one structural seed; its values from a second one."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable

import ops  # noqa: F401 - registers the operations
import torch
from draw import FAMILIES, FLOAT, OPS, Draw

LIMIT = 24  # elements of a value, or of a sample of it: PyTorch's row loops are what a program costs
BATCH = 3
# How often a step comes from a family. What is wrong shows where few families meet often: most programs have a theme.
EVERYTHING = {
    "views": 5,
    "index": 5,
    "stencils": 4,
    "reductions": 4,
    "norms": 3,
    "conv": 3,
    "losses": 2,
    "inplace": 4,
    "rollouts": 3,
    "algebra": 3,
    "pointwise": 4,
    "control": 2,
}
THEMES = [
    EVERYTHING,
    EVERYTHING,
    {"stencils": 3, "rollouts": 1, "copies": 3},
    {"views": 3, "index": 4, "inplace": 2, "reductions": 1},
    {"conv": 2, "norms": 3, "losses": 2, "algebra": 2, "pointwise": 2},
]
COPIES = "kron_ones interleave expand_last pairs_transposed repeat repeat_interleave tile expand_reshape rk4".split()

Tensors = tuple[torch.Tensor, ...]


@dataclasses.dataclass
class Step:
    """An operation, the seed of its structure, and which value it takes: counted from the last one."""

    name: str
    seed: int
    back: int
    bounded: bool


class Program:
    """A function of some tensors.

    Args:
        seed: decides everything but values.
        keep: the steps to keep, for making a failing program smaller; all of them by default.
    """

    def __init__(self, seed: int, keep: tuple[int, ...] | None = None, single_output: bool = False) -> None:
        draw = random.Random(f"program {seed}")
        self.seed = seed
        self.first = 1 if draw.random() < 0.2 else 0  # over a batch of independent samples
        self.shapes = [self._shape(draw) for _ in range(draw.choice([1, 1, 1, 2, 2, 3]))]
        if draw.random() < 0.03 and not self.first:
            self.shapes[0] = draw.choice([(), (0,), (0, 2), (1,), (2, 0, 2)])
        self.layouts = [draw.choice(["plain"] * 5 + [*LAYOUTS]) for _ in self.shapes]
        self.repeated = len(self.shapes) > 1 and draw.random() < 0.06
        outputs = draw.choice([*OUTPUTS, "one", "one", "one", "one"])
        self.outputs = "one" if single_output else outputs
        self.theme = draw.choice(THEMES)
        steps = [self._step(draw) for _ in range(draw.randint(2, 6))]
        self.steps = steps if keep is None else [steps[k] for k in keep]
        self.length = len(steps)
        self._settle()

    def _shape(self, draw: random.Random) -> tuple[int, ...]:
        while True:
            shape = tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 3)))
            if math.prod(shape) <= (6 if self.first else 12):
                return (BATCH,) * self.first + shape

    def _step(self, draw: random.Random) -> Step:
        while True:
            family = draw.choices(list(self.theme), list(self.theme.values()))[0]
            name = draw.choice(COPIES if family == "copies" else FAMILIES[family])
            if OPS[name].batched or not self.first:
                back = draw.randrange(4) if draw.random() < 0.35 else 0
                return Step(name, draw.randrange(1 << 30), back, draw.random() < 0.35)

    def _settle(self) -> None:
        """Replaces the steps whose operation refuses what it is given, once and for all contents."""
        values = [x.clone().requires_grad_() for x in self.inputs(0)]
        for k, step in enumerate(self.steps):
            try:
                values.append(self._apply(k, step, values, 0))
            except (RuntimeError, IndexError, ValueError, ZeroDivisionError, TypeError, NotImplementedError):
                self.steps[k] = step = dataclasses.replace(step, name="smooth")
                values.append(self._apply(k, step, values, 0))

    def _apply(self, k: int, step: Step, values: list[torch.Tensor], content: int) -> torch.Tensor:
        draw = Draw(step.seed, f"content {self.seed} {content} {k}", values, self.first)
        x = values[-1 - step.back % len(values)]
        lead = tuple(values[0].shape[: self.first])
        if x.dim() == self.first:
            x = x.unsqueeze(-1)
        y = OPS[step.name].run(x, draw).to(FLOAT)
        if tuple(y.shape[: self.first]) != lead:
            raise ValueError("a sample lost its place")
        size = math.prod(y.shape[self.first :])
        limit = LIMIT // BATCH if self.first else LIMIT
        if size > limit:
            y = y.flatten(self.first)[..., :: -(-size // limit)]
        if y.dim() > 4 + self.first:
            y = y.flatten(self.first, y.dim() - 4)
        return torch.tanh(y) if step.bounded else y

    def function(self, content: int) -> Callable[..., torch.Tensor | Tensors]:
        """The program with the indices, masks and numbers of one content seed."""

        def f(*xs: torch.Tensor) -> torch.Tensor | Tensors:
            values = list(xs)
            for k, step in enumerate(self.steps):
                values.append(self._apply(k, step, values, content))
            return OUTPUTS[self.outputs](values, self.first)

        return f

    def inputs(self, content: int) -> Tensors:
        """Leaves; every third content has ties and zeros in it."""
        draw = Draw(0, f"input {self.seed} {content}", (), self.first)
        xs = []
        for shape, layout in zip(self.shapes, self.layouts):
            t = draw.tensor(*shape)
            if content % 3 == 2:
                t = (t * 2).round() / 2
            xs.append(LAYOUTS[layout](t) if layout != "plain" else t)
        if self.repeated:
            xs[1] = xs[0]
        return tuple(xs)

    @property
    def names(self) -> list[str]:
        return [step.name for step in self.steps]

    @property
    def single(self) -> bool:
        return any(OPS[name].single for name in self.names)

    @functools.cached_property
    def exact(self) -> tuple[int, str]:
        """Up to which order PyTorch's derivatives of this program are right, and the reason."""
        return min(OPS[name].exact for name in self.names) if self.steps else (9, "")

    def __str__(self) -> str:
        extra = [f"layouts={self.layouts}"] * any(v != "plain" for v in self.layouts) + ["repeated input"] * self.repeated
        extra += ["batched"] * bool(self.first)
        steps = " ".join(f"{s.name}{f'@-{s.back}' * bool(s.back)}{'!' * s.bounded}" for s in self.steps)
        return " ".join([f"{self.shapes} ->", steps, f"-> {self.outputs}", *extra])


def _overlapping(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).clone().as_strided(t.shape, (1,) * t.dim())


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t,
    "window": lambda t: torch.full([2 * n + 1 for n in t.shape], math.nan, dtype=t.dtype)[
        tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)
    ].copy_(t),
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() and t.shape[0] else t,
    "overlapping": lambda t: _overlapping(t) if t.numel() > 1 else t,
    "offset": lambda t: torch.cat([t.new_full((3,), math.nan), t.reshape(-1)])[3:].view(t.shape),
}

OUTPUTS: dict[str, Callable[[list[torch.Tensor], int], torch.Tensor | Tensors]] = {
    "one": lambda values, first: values[-1],
    "last two": lambda values, first: (values[-1], values[-2]),
    "and an input": lambda values, first: (values[-1], values[0]),
    "twice": lambda values, first: (values[-1], values[-1]),
    "and a part": lambda values, first: (values[-1], values[-1].unsqueeze(-1).flatten(first)[..., :2]),
    "and the middle": lambda values, first: (values[len(values) // 2], values[-1], values[-1].sin()),
    "of one element": lambda values, first: (values[-1],),
}
