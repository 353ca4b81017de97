"""Sweeps torch's operator database: our Jacobian (and Hessian) of every operator against torch.autograd.functional.

Run as a program it handles a slice of the database and prints one JSON line per operator as it goes, so that a crash
or a hang in one operator hides no other: the driver reads what was printed and starts again behind the culprit.

    python tests/opdb/sweep.py --index 0 --count 4 [--full] [--only NAME] [--verbose]
"""

# ruff: noqa: B023 - every function made in a loop is called within the same iteration

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import wengert

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support.check import DEVICE
from support.compare import Outcome, Tolerance, assert_same, same_error
from support.native import Calls
from torch.autograd import functional as torch_functional

SAMPLES, ELEMENTS, LOOKED_AT, OUTPUTS = 6, 64, 120, 700
HESSIAN_ELEMENTS = 12
LARGEST_JACOBIAN = 2**24  # elements (128 MiB), of which both sides and the comparison hold several copies
SECOND_ELEMENTS = 50  # where a Jacobian is differentiated once more
TOLERANCE = Tolerance(rtol=1e-7, atol=1e-9)
# torch's own backward is only single precision here (the derivative in the weights of a covariance).
LOOSE = {"cov": Tolerance(rtol=1e-5, atol=2e-5)}

# Results are unspecified memory or drawn anew on every call: there is nothing to compare.
UNDEFINED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_", "resize_as_"}


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
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures


def database() -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if torch.float64 in op.supported_dtypes(DEVICE.type)]


def op_name(op: Any) -> str:
    return op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for v in tree.values():
            yield from tensors_of(v)
    elif isinstance(tree, (tuple, list)):
        for v in tree:
            yield from tensors_of(v)


def rebuild(tree: Any, replacement: dict[int, torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return replacement.get(id(tree), tree)
    if isinstance(tree, dict):
        return {k: rebuild(v, replacement) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [rebuild(v, replacement) for v in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


def usable(t: torch.Tensor) -> bool:
    return t.requires_grad and t.is_floating_point() and t.layout is torch.strided


def as_function(op: Any, sample: Any) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    """The operator as a function of its differentiable floating inputs alone."""
    whole = (sample.input, sample.args, sample.kwargs)
    inputs = list({id(t): t for t in tensors_of(whole) if usable(t)}.values())

    def f(*xs: torch.Tensor) -> Any:
        torch.manual_seed(0)
        x, args, kwargs = rebuild(whole, {id(t): v for t, v in zip(inputs, xs)})
        out = op(x, *args, **kwargs)
        if sample.output_process_fn_grad is not None:
            out = sample.output_process_fn_grad(out)
        found = (t for t in tensors_of(out) if t.requires_grad and t.layout is torch.strided)
        # A complex output counts as its pair of real parts: torch has no Jacobian of the other kind.
        kept = tuple(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found)
        if not kept:
            raise NoOutput
        return kept

    return f, tuple(t.detach() for t in inputs)


class NoOutput(Exception):
    """No differentiable floating output: not a case for a Jacobian."""


def chosen_samples(op: Any, full: bool) -> list[Any]:
    torch.manual_seed(0)
    samples = op.sample_inputs(str(DEVICE), torch.float64, requires_grad=True)
    if full:
        return list(samples)

    def size(sample: Any) -> int:
        return sum(t.numel() for t in tensors_of((sample.input, sample.args, sample.kwargs)) if usable(t))

    sized = [(size(s), s) for s in itertools.islice(samples, LOOKED_AT)]
    small = [s for n, s in sized if 0 < n <= ELEMENTS]
    if small:
        step = max(1, len(small) // SAMPLES)
        return small[::step][:SAMPLES]
    # An operator without a small sample is looked at on its two smallest.
    rest = sorted((n, k) for k, (n, _) in enumerate(sized) if n > 0)
    return [sized[k][1] for _, k in rest[:2]]


def scalar_of(f: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    def g(*xs: torch.Tensor) -> torch.Tensor:
        terms = []
        for y in f(*xs):
            k = torch.arange(y.numel(), dtype=torch.float64).reshape(y.shape)
            terms.append((y.double() * torch.cos(1.7 * k + 0.3)).sum())
        return sum(terms[1:], start=terms[0])

    return g


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


def differentiated(jacobian: Callable[..., Any], f: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> Any:
    """The gradient of a weighted sum of a Jacobian taken with create_graph, and which blocks require grad and lead where."""
    xs = tuple(x.clone().requires_grad_() for x in inputs)
    blocks = tuple(tensors_of(jacobian(f, xs, create_graph=True)))
    total = scalar_of(lambda: blocks)()
    sums = torch.autograd.grad(total, xs, retain_graph=True, materialize_grads=True) if total.requires_grad else map(torch.zeros_like, xs)
    return tuple(sums), torch.tensor([history(block, xs) for block in blocks], dtype=torch.float64)


def history(block: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> list[bool]:
    if not block.requires_grad:
        return [False] * (1 + len(inputs))
    gradients = torch.autograd.grad(block.sum(), inputs, retain_graph=True, allow_unused=True)
    return [True, *(g is not None for g in gradients)]


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
        calls = Calls.now() - before
        report.native += calls.native
        report.opaque += bool(calls.native and calls.nodes)
        report.fallback += calls.fallback.total()
        for reason, count in calls.fallback.items():
            report.reasons[reason] = report.reasons.get(reason, 0) + count
    if expected.error is not None:
        if got.error is not None and same_error(got.error, expected.error):
            report.refused += 1
        elif got.error is None:
            report.failures.append(f"{label}: returned where torch {expected.describe()}")
        else:
            report.failures.append(f"{label}: {got.describe()} where torch {expected.describe()}")
        return
    if got.error is not None:
        tail = traceback.extract_tb(got.error.__traceback__)[-1]
        report.failures.append(f"{label}: {got.describe()} (at {pathlib.Path(tail.filename).name}:{tail.lineno})")
        return
    try:
        tol = LOOSE.get(report.op, TOLERANCE)
        if Outcome.of(lambda: assert_same(got.value, expected.value, label, tol)).error is not None:
            assert_same(got.value, mend(got.value, expected.value), label, tol)
        report.agreed += 1
    except AssertionError as error:
        report.failures.append(" ".join(str(error).split())[:400])


def sweep_op(op: Any, full: bool) -> OpReport:
    report = OpReport(op_name(op))
    begin = time.perf_counter()
    if op.name in UNDEFINED:
        report.skipped = "result is unspecified memory"
        return report
    if not op.supports_autograd:
        report.skipped = "torch has no derivative"
        return report
    for k, sample in enumerate(chosen_samples(op, full)):
        f, inputs = as_function(op, sample)
        if not inputs:
            continue
        first = Outcome.of(lambda: f(*(x.clone().requires_grad_() for x in inputs)))
        if first.error is not None:
            continue
        rows, elements = sum(y.numel() for y in first.value), sum(x.numel() for x in inputs)
        if rows * elements > LARGEST_JACOBIAN:
            report.large += 1
            continue
        if not full and rows > OUTPUTS:
            continue
        compare(
            report,
            f"sample {k}",
            lambda: wengert.jacobian(f, inputs),
            lambda: torch_functional.jacobian(f, inputs),
            lambda ours, ref: without_spread_nan(ours, ref, f, inputs),
        )
        if op.supports_gradgrad and elements <= (ELEMENTS if full else HESSIAN_ELEMENTS) and (full or k < 2):
            g = scalar_of(f)
            compare(
                report,
                f"sample {k} hessian",
                lambda: wengert.hessian(g, inputs),
                lambda: torch_functional.hessian(g, inputs),
                lambda ours, ref: where_undefined(ours, ref, g(*(x.clone().requires_grad_() for x in inputs))),
            )
        if op.supports_gradgrad and k < 2 and elements <= SECOND_ELEMENTS and rows <= SECOND_ELEMENTS:
            reference = Outcome.of(lambda: differentiated(torch_functional.jacobian, f, inputs))
            if reference.error is None:  # torch lacks some derivatives of derivatives
                compare(
                    report,
                    f"sample {k} create_graph",
                    lambda: differentiated(wengert.jacobian, f, inputs),
                    lambda: reference.value,
                )
    if not report.samples:
        report.skipped = "no sample with differentiable floating inputs and outputs of this size"
    report.seconds = time.perf_counter() - begin
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", type=int, default=0, help="which slice")
    parser.add_argument("--count", type=int, default=1, help="of how many")
    parser.add_argument("--start", type=int, default=0, help="skip so many operators of the slice")
    parser.add_argument("--full", action="store_true", help="every sample of every size")
    parser.add_argument("--only", help="operators whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="print failures readably")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if DEVICE.type != "cpu":
        torch.set_default_device(DEVICE)
    ops = [op for op in database() if not args.only or args.only in op_name(op)][args.index :: args.count]
    for op in ops[args.start :]:
        print(json.dumps({"begin": op_name(op)}), flush=True)
        outcome = Outcome.of(lambda op=op: sweep_op(op, args.full))
        report = outcome.value or OpReport(op_name(op), failures=[f"the sweep itself {outcome.describe()}"])
        print(json.dumps(dataclasses.asdict(report)), flush=True)
        if args.verbose:
            for line in report.failures:
                print(f"  {report.op}: {line}")


if __name__ == "__main__":
    main()
