"""Sweeps torch's operator database: every operator's derivatives in every form, against torch's row loop and torch's same form.

Run as a program it handles a slice of the database and prints one JSON line per operator as it goes, so that a crash
or a hang in one operator hides no other: the driver reads what was printed and starts again behind the culprit.

    python tests/opdb/sweep.py --index 0 --count 4 [--full] [--only NAME] [--verbose]
"""



from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
import wengert

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from agreement import OpReport, compare, compare_either, where_undefined, without_spread_nan
from samples import (
    ELEMENTS,
    UNDEFINED,
    as_function,
    chosen_samples,
    database,
    op_name,
    scalar_of,
    tensors_of,
)
from support.check import DEVICE
from support.compare import Outcome, given, leaves
from torch.autograd import functional as torch_functional
from transforms import sweep_transforms

OUTPUTS = 700
HESSIAN_ELEMENTS = 12
LARGEST_JACOBIAN = 2**24  # elements (128 MiB), of which both sides and the comparison hold several copies
SECOND_ELEMENTS = 50  # where a Jacobian is differentiated once more, or taken for a batch


def differentiated(derivative: Callable[..., Any], f: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> Any:
    """A derivative taken with create_graph: its parts, which require grad, and the gradient of a weighted sum with its None."""
    xs = tuple(x.clone().requires_grad_() for x in inputs)
    parts = list(tensors_of(derivative(f, xs, create_graph=True)))
    live = tuple(t for t in parts if t.requires_grad)
    gradient = torch.autograd.grad(scalar_of(lambda *_: live)(), xs, allow_unused=True) if live else ()
    return [t.detach() for t in parts], [t.requires_grad for t in parts], gradient


def sweep_op(op: Any, full: bool, share: int) -> OpReport:
    report = OpReport(op_name(op))
    begin = time.perf_counter()
    if op.name in UNDEFINED:
        report.skipped = "result is unspecified memory"
        return report
    if not op.supports_autograd:
        report.skipped = "torch has no derivative"
        return report
    for k, sample in enumerate(chosen_samples(op, full)):
        sweep_sample(report, op, sample, k, full, share)
    if not report.samples:
        report.skipped = "no sample with differentiable floating inputs and outputs of this size"
    report.seconds = time.perf_counter() - begin
    return report


def sweep_sample(report: OpReport, op: Any, sample: Any, k: int, full: bool, share: int) -> None:
    f, inputs = as_function(op, sample)
    if not inputs:
        return
    first = Outcome.of(lambda: f(*(x.clone().requires_grad_() for x in inputs)))
    if first.error is not None:
        return
    rows, elements = sum(y.numel() for y in first.value), sum(x.numel() for x in inputs)
    if rows * elements > LARGEST_JACOBIAN:
        report.large += 1
        return
    if not full and rows > OUTPUTS:
        return
    expected = Outcome.of(lambda: torch_functional.jacobian(f, inputs))

    def jacobian(label: str, ours: Callable[[], Any]) -> None:
        mend = lambda ours, ref: without_spread_nan(ours, ref, f, inputs)
        compare(report, f"sample {k}: {label}", ours, lambda: given(expected), mend)

    jacobian("jacobian", lambda: wengert.jacobian(f, inputs))
    small = rows <= SECOND_ELEMENTS and elements <= SECOND_ELEMENTS
    twice = op.supports_gradgrad and elements <= (ELEMENTS if full else HESSIAN_ELEMENTS) and (full or k < 2)
    g = scalar_of(f)
    if twice:
        compare(
            report,
            f"sample {k}: hessian",
            lambda: wengert.hessian(g, inputs),
            lambda: torch_functional.hessian(g, inputs),
            lambda ours, ref: where_undefined(ours, ref, g(*(x.clone().requires_grad_() for x in inputs))),
        )
    if small and (full or k < 2):
        if op.supports_gradgrad:
            again(report, f"sample {k}: create_graph", "jacobian", f, inputs)
        if twice and full and elements <= HESSIAN_ELEMENTS:
            again(report, f"sample {k}: hessian create_graph", "hessian", g, inputs)
    if expected.error is not None or not (full or (k == 0 and zlib.crc32(report.op.encode()) % share == 0)):
        return
    compare_either(
        report,
        f"sample {k}: vectorize",
        lambda: wengert.jacobian(f, inputs, vectorize=True),
        Outcome(leaves(expected.value)),
        lambda: torch_functional.jacobian(f, inputs, vectorize=True),
    )
    if small:
        sweep_transforms(report, f"sample {k}:", f, g, inputs, second=twice)


def again(report: OpReport, label: str, name: str, f: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> None:
    """The derivative of a derivative; torch lacks some of them."""
    reference = Outcome.of(lambda: differentiated(getattr(torch_functional, name), f, inputs))
    if reference.error is not None:
        return

    def mend(ours: Any, ref: Any) -> Any:
        # Where torch has nan, what the same derivative without a graph has, which is compared on its own.
        plain = list(tensors_of(getattr(wengert, name)(f, inputs)))
        parts = [
            torch.where(b.isnan() & torch.isclose(a, c), a, b) if a.shape == b.shape == c.shape else b
            for a, b, c in zip(ours[0], ref[0], plain)
        ]
        return parts, *ref[1:]

    compare(report, label, lambda: differentiated(getattr(wengert, name), f, inputs), lambda: reference.value, mend)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", type=int, default=0, help="which slice")
    parser.add_argument("--count", type=int, default=1, help="of how many")
    parser.add_argument("--start", type=int, default=0, help="skip so many operators of the slice")
    parser.add_argument("--full", action="store_true", help="every sample of every size")
    parser.add_argument("--share", type=int, default=8, help="of how many operators a short run takes one through all forms")
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
        outcome = Outcome.of(lambda op=op: sweep_op(op, args.full, args.share))
        report = outcome.value or OpReport(op_name(op), failures=[f"the sweep itself {outcome.describe()}"])
        print(json.dumps(dataclasses.asdict(report)), flush=True)
        if args.verbose:
            for line in report.failures:
                print(f"  {report.op}: {line}")


if __name__ == "__main__":
    main()
