"""batch_jacobian: independent samples are always answered, coupled ones never."""

from __future__ import annotations

from collections.abc import Callable

import torch
import wengert
from forms import Case, form
from judge import Mismatch, same_calls
from programs import BATCH
from support.compare import Outcome, leaves

# Ways of coupling samples, each of which leaves no sample alone.
COUPLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda y: y - y.mean(0),
    "roll": lambda y: y * y.roll(1, 0),
    "cumsum": lambda y: y.cumsum(0),
    "softmax": lambda y: y.softmax(0) * y,
    "permutation": lambda y: y[torch.tensor([2, 0, 1])].sin() + y,
    "norm": lambda y: y / (1 + y.square().sum()),
    "product": lambda y: (y.flatten(1) @ y.flatten(1).t()).reshape(BATCH, -1),
    "batch_norm": lambda y: torch.nn.functional.batch_norm(y.flatten(1), None, None, training=True, eps=0.1),
    "first sample": lambda y: y + y[:1].sin(),
}
# Ways across the batch axis and back: every sample ends where it was.
ROUND_TRIPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flips": lambda y: y.flip(0).sin().flip(0),
    "rolls": lambda y: y.roll(1, 0).tanh().roll(-1, 0),
    "cat": lambda y: torch.cat([y[1:], y[:1]]).sin().roll(1, 0),
    "stacked": lambda y: torch.stack([s.sin() for s in y.unbind(0)]),
    "moved": lambda y: y.movedim(0, -1).sin().movedim(-1, 0),
    "flattened": lambda y: y.reshape(-1).tanh().reshape(y.shape),
    "sorted": lambda y: y[torch.tensor([2, 0, 1])].sin()[torch.tensor([1, 2, 0])],
    "masked": lambda y: torch.where(torch.arange(BATCH).reshape(-1, *(1,) * (y.dim() - 1)) > 0, y.sin(), y),
}


def _blocks(case: Case, jacobian: list[torch.Tensor], outputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    """The per-sample parts of a whole Jacobian, and the largest entry outside of them."""
    parts, outside = [], 0.0
    blocks = iter(jacobian)
    for out in outputs:
        for x in case.xs:
            j = next(blocks).reshape(BATCH, -1, BATCH, x[0].numel())
            diagonal = torch.stack([j[b, :, b] for b in range(BATCH)])
            parts.append(diagonal.reshape(*out.shape, *x.shape[1:]))
            rest = j.clone()
            for b in range(BATCH):
                rest[b, :, b] = 0
            outside = max(outside, float(rest.nan_to_num(0.0, 0.0, 0.0).abs().max()) if rest.numel() else 0.0)
    return parts, outside


def _compare(case: Case, f: Callable[..., object], label: str) -> None:
    whole = Outcome.of(lambda: torch.autograd.functional.jacobian(f, case.xs))
    if whole.error is not None:
        return
    parts, outside = _blocks(case, leaves(whole.value), leaves(f(*case.xs)))
    got = Outcome.of(lambda: wengert.batch_jacobian(f, case.xs))
    if outside > 1e-6:
        if got.error is None:
            raise Mismatch(f"{label}: coupled samples were answered (by {outside:.2g})")
        if not isinstance(got.error, ValueError):
            raise Mismatch(f"{label}: {got.describe()} of coupled samples") from got.error
        return
    if got.error is None:
        case.same(leaves(got.value), parts, label)
    elif outside == 0 and not label.endswith("coupled"):
        raise Mismatch(f"{label}: {got.describe()} of independent samples") from got.error


@form(1, plain=False)
def batch_jacobian(case: Case) -> None:
    _compare(case, case.f, "batch_jacobian")


@form(1, plain=False)
def batch_jacobian_there_and_back(case: Case) -> None:
    names = sorted(ROUND_TRIPS)
    way = names[case.program.seed // 5 % len(names)]

    def f(*xs: torch.Tensor) -> torch.Tensor:
        y = leaves(case.f(*xs))[0]
        return ROUND_TRIPS[way](y) * leaves(case.f(*xs))[-1].flatten(1).sum(1).reshape(-1, *(1,) * (y.dim() - 1))

    _compare(case, f, f"batch_jacobian, {way}")


@form(1, plain=False)
def batch_jacobian_coupled(case: Case) -> None:
    names = sorted(COUPLINGS)
    way = names[case.program.seed // 5 % len(names)]
    _compare(case, lambda *xs: COUPLINGS[way](leaves(case.f(*xs))[0]), f"batch_jacobian, {way}, coupled")


@form(2, plain=False)
def batch_jacobian_twice(case: Case) -> None:
    from forms import differentiated_again

    leaf = case.leaf()
    if case.program.repeated:
        return
    theirs = Outcome.of(lambda: torch.autograd.functional.jacobian(case.f, leaf, create_graph=True))
    if theirs.error is not None:
        return
    parts, outside = _blocks(case, leaves(theirs.value), leaves(case.f(*leaf)))
    if outside:
        return
    ours = leaves(wengert.batch_jacobian(case.f, leaf, create_graph=True))
    case.same(ours, parts, "batch_jacobian create_graph")
    live = [(a, b) for a, b in zip(ours, parts) if a.requires_grad and b.requires_grad]  # PyTorch has no such function
    differentiated_again(case, [a for a, _ in live], [b for _, b in live], leaf, "batch_jacobian create_graph")


@form(1, batched=False)
def batch_jacobian_of_a_mapped_program(case: Case) -> None:
    if case.program.repeated or any(x.numel() == 0 for x in case.batch):
        return
    mapped = torch.func.vmap(case.f)
    first = Outcome.of(lambda: mapped(*case.batch))
    if first.error is not None:
        return
    whole = Outcome.of(lambda: leaves(torch.autograd.functional.jacobian(mapped, case.batch)))
    if whole.error is not None:
        return
    outer = Case.__new__(Case)
    outer.xs = case.batch
    parts, outside = _blocks(outer, whole.value, leaves(first.value))
    if outside == 0:
        same_calls(case.tol, lambda: leaves(wengert.batch_jacobian(mapped, case.batch)), lambda: parts, "batch_jacobian of vmap")
