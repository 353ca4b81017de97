"""Every read and target of a plan lies within its slot, for all values of the loops: judged from the plan's text."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from forms import Case, form
from judge import Mismatch, weighted_sum
from support.compare import Outcome, leaves
from wengert._native import C as native

SLOT = re.compile(r"s(\d+) \(([^)]*)\) ")
NEST = re.compile(r"(evaluate|matmul) over \(([^)]*)\): (.*)")
READ = re.compile(r"s(\d+)\[([^\]]*)\]")
NAMED_LOOPS = 17  # the loops i to y; more have no letters


def integers(text: str) -> list[int]:
    return [int(v) for v in text.split(",") if v.strip()]


def affine(text: str) -> tuple[dict[str, int], int]:
    """Steps by loop, and the start, of a coordinate such as 2i-k+3."""
    terms: dict[str, int] = {}
    start = 0
    for part in filter(None, text.replace(" ", "").replace("-", "+-").split("+")):
        if m := re.fullmatch(r"(-?\d*)([i-y])", part):
            terms[m[2]] = terms.get(m[2], 0) + int(m[1] + "1" if m[1] in ("", "-") else m[1])
        else:
            start += int(part)
    return terms, start


def violations(plan: str) -> Iterator[str]:
    slots: dict[int, list[int]] = {}
    for line in plan.splitlines():
        if m := SLOT.match(line):
            slots[int(m[1])] = integers(m[2])
            continue
        m = NEST.match(line)
        if not m or len(extents := integers(m[2])) > NAMED_LOOPS or 0 in extents:
            continue
        for slot, coordinates in READ.findall(m[3]):
            axes = [a for a in coordinates.split(",") if a.strip()]
            shape = slots[int(slot)]
            if len(axes) != len(shape):
                yield f"s{slot}[{coordinates}] of rank {len(shape)}: {line[:160]}"
                continue
            for axis, size in zip(axes, shape):
                terms, low = affine(axis)
                high = low
                for loop, step in terms.items():
                    reach = step * (extents[ord(loop) - ord("i")] - 1)
                    low, high = low + min(0, reach), high + max(0, reach)
                if low < 0 or high >= size:
                    yield f"s{slot}[{coordinates}] of {tuple(shape)} over {tuple(extents)}: {line[:160]}"


def _inspect(outputs: list[torch.Tensor], inputs: list[torch.Tensor], kind: str) -> None:
    if not outputs:
        return
    text = Outcome.of(lambda: native.plan(outputs, inputs, kind))
    if text.error is None:  # else refused: PyTorch's
        for violation in violations(text.value):
            raise Mismatch(f"plan of {kind}: {violation}")


def _live(tree: object) -> list[torch.Tensor]:
    return [t for t in leaves(tree) if t.requires_grad and t.numel()]


@form(2)
def plans(case: Case) -> None:
    leaf = [x.detach().clone().requires_grad_() for x in case.xs]
    outputs = _live(case.f(*leaf))
    if not outputs:
        return
    _inspect(outputs, leaf, "jacobian")
    total = weighted_sum(outputs)
    _inspect([total], leaf, "gradient")
    gradient = Outcome.of(lambda: torch.autograd.grad(total, leaf, create_graph=True, allow_unused=True))
    if gradient.error is None:
        second = _live(tuple(t for t in gradient.value if t is not None))
        _inspect(second, leaf, "jacobian")
        _inspect([weighted_sum(second)] if second else [], leaf, "gradient")
    if not case.program.first and not case.program.repeated:
        batch = [x.clone().requires_grad_() for x in case.batch]
        mapped = Outcome.of(lambda: torch.func.vmap(case.f)(*batch))
        if mapped.error is None:
            _inspect(_live(mapped.value), batch, "vmap")
            _inspect(_live(mapped.value), batch, "jacobian")
