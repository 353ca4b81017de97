"""What the sweep found for an operator, and how results are compared."""

from __future__ import annotations

import dataclasses
import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import torch
from samples import NoOutput
from support.compare import Outcome, Tolerance, assert_same, leaves, same_error
from support.native import Calls

TOLERANCE = Tolerance(rtol=1e-7, atol=1e-9)
# torch's own backward is only single precision here (the derivative in the weights of a covariance),
# where terms some thousands large cancel.
LOOSE = {"cov": Tolerance(rtol=1e-5, atol=5e-4)}


@dataclasses.dataclass
class OpReport:
    """What the sweep found for one operator."""

    op: str
    samples: int = 0
    agreed: int = 0
    refused: int = 0  # torch raised, and so did we, alike
    large: int = 0  # left out: a Jacobian beyond LARGEST_JACOBIAN
    native: int = 0  # calls the engine answered
    opaque: int = 0  # of these, calls in which it had to call an autograd node
    fallback: int = 0
    seconds: float = 0.0
    skipped: str = ""
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)  # the first ones of each form
    failed: dict[str, int] = dataclasses.field(default_factory=dict)  # how many, by form

    @property
    def ok(self) -> bool:
        return not self.failures

    def fail(self, label: str, text: str) -> None:
        """Keeps few of many alike: an operator may have thousands of samples."""
        form = label.partition(": ")[2]
        self.failed[form] = self.failed.get(form, 0) + 1
        if self.failed[form] <= 2:
            self.failures.append(" ".join(text.split())[:400])

    def count(self, calls: Calls) -> None:
        self.native += calls.native
        self.opaque += bool(calls.native and calls.nodes)
        self.fallback += calls.fallback.total()
        for reason, count in calls.fallback.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count


def without_spread_nan(ours: Any, ref: Any, f: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> Any:
    """torch's Jacobian with our entries where torch has nan and ours is confirmed by a difference quotient.

    A pass with a one-hot cotangent multiplies other outputs' infinite partials by zero; where such a nan is summed
    into an axis that several outputs share, torch loses finite entries too. Ours are right, not merely zero.
    """
    return tuple(
        tuple(_confirmed(a, b, lambda *xs, i=i: f(*xs)[i], inputs, k) for k, (a, b) in enumerate(zip(ours[i], row)))
        for i, row in enumerate(ref)
    )


def _confirmed(
    ours: torch.Tensor, ref: torch.Tensor, f: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], k: int
) -> torch.Tensor:
    mended = ref.clone()
    x = inputs[k]
    for place in (ref.isnan() & ours.isfinite() & (ours != 0)).nonzero().tolist():
        row, column = tuple(place[: ref.dim() - x.dim()]), tuple(place[ref.dim() - x.dim() :])
        step = torch.zeros_like(x)
        step[column] = 1e-6 * max(1.0, float(x[column].abs()))
        high, low = (f(*inputs[:k], (x + sign * step).requires_grad_(), *inputs[k + 1 :])[row] for sign in (1, -1))
        quotient = (high - low).detach() / (2 * step[column])
        if torch.isclose(ours[tuple(place)], quotient, rtol=1e-5, atol=1e-7):
            mended[tuple(place)] = ours[tuple(place)]
    return mended


def where_undefined(ours: Any, ref: Any, value: torch.Tensor) -> Any:
    """torch's Hessian with our finite entries where torch has nan, of a function that is nan at this point.

    Elements that are nan make torch's derivatives of all elements nan; here elements that do not interact stay apart.
    """
    if not value.isnan():
        return ref
    return tuple(tuple(torch.where(b.isnan() & a.isfinite(), a, b) for a, b in zip(*rows)) for rows in zip(ours, ref))


def compare(
    report: OpReport,
    label: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    mend: Callable[[Any, Any], Any] = lambda ours, ref: ref,
) -> None:
    expected = Outcome.of(theirs)
    if isinstance(expected.error, NoOutput):
        return
    report.samples += 1
    before = Calls.now()
    got = Outcome.of(ours)
    if expected.error is None:
        report.count(Calls.now() - before)
    if expected.error is not None:
        if got.error is not None and same_error(got.error, expected.error):
            report.refused += 1
        elif got.error is None:
            report.fail(label, f"{label}: returned where torch {expected.describe()}")
        else:
            report.fail(label, f"{label}: {got.describe()} where torch {expected.describe()}")
        return
    if got.error is not None:
        tail = traceback.extract_tb(got.error.__traceback__)[-1]
        report.fail(label, f"{label}: {got.describe()} (at {pathlib.Path(tail.filename).name}:{tail.lineno})")
        return
    try:
        tol = LOOSE.get(report.op, TOLERANCE)
        if Outcome.of(lambda: assert_same(got.value, expected.value, label, tol)).error is not None:
            assert_same(got.value, mend(got.value, expected.value), label, tol)
        report.agreed += 1
    except AssertionError as error:
        report.fail(label, str(error))


def compare_either(
    report: OpReport, label: str, ours: Callable[[], Any], loop: Outcome, theirs: Callable[[], Any]
) -> None:
    """Against torch's row loop, a list of tensors; where torch's own form differs from its loop, either will do.

    What torch cannot transform ours may refuse too, in the same words, or answer with the loop's numbers.
    """
    report.samples += 1
    tol = LOOSE.get(report.op, TOLERANCE)
    before = Calls.now()
    got = Outcome.of(ours)
    calls = Calls.now() - before

    def agrees(ref: Outcome) -> bool:
        parts = leaves(got.value)
        return Outcome.of(lambda: assert_same(parts, finite_for_nan(parts, ref), label, tol)).error is None

    if got.error is None and loop.error is None and agrees(loop):
        report.agreed += 1
        report.count(calls)
        return
    peer = Outcome.of(theirs)
    if peer.error is None:
        report.count(calls)
        peer = Outcome(leaves(peer.value))
    if got.error is not None:
        if peer.error is not None and same_error(got.error, peer.error):
            report.refused += 1
        else:
            report.fail(label, f"{label}: {got.describe()} where torch {peer.describe()}")
        return
    if peer.error is None and agrees(peer):
        report.agreed += 1
        return
    reference = loop if loop.error is None else peer
    if reference.error is not None:
        report.fail(label, f"{label}: returned where torch {peer.describe()}")
        return
    try:
        assert_same(leaves(got.value), finite_for_nan(leaves(got.value), reference), label, tol)
    except AssertionError as error:
        report.fail(label, str(error))


def finite_for_nan(ours: list[torch.Tensor], ref: Outcome) -> list[torch.Tensor]:
    """A reference with our finite entries where it has nan: the functional form of the same sample has been confirmed."""
    return [
        torch.where(b.isnan() & a.isfinite(), a, b) if a.shape == b.shape and a.dtype == b.dtype else b
        for a, b in zip(ours, ref.value)
    ] + ref.value[len(ours) :]
