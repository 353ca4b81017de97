"""Runs the benchmark: agreement first, then paired times against the fastest peer.

python benchmarks/run.py                        every row, a table
python benchmarks/run.py --only rosenbrock      rows whose name contains this (several by commas)
python benchmarks/run.py --floors               pass or fail against the floors; exit status 1 if any fails
python benchmarks/run.py --markdown             the table of the README
python benchmarks/run.py --json out.json --plot out.png

On a GPU (the floors are stated for the CPU; there a row passes when it is no slower than PyTorch):

python benchmarks/run.py --device cuda --compile --save          writes benchmarks/results/<device>.json and .md
python benchmarks/run.py --device cuda --only mlp --profile out  chrome traces, one a row, and NVTX ranges
nsys profile python benchmarks/run.py --device cuda --only mlp --nvtx

Exit status: 0; 1 if a row is broken or, with --floors, below its floor; 2 for wrong arguments or a missing device.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys

import torch
from device import Device, DeviceError, open_device
from report import Run, plot, slope_lines, table
from rows import ROWS, Prepared, Row, prepare, selected
from slopes import pointwise_slopes
from timer import Result, measure

RESULTS = pathlib.Path(__file__).parent / "results"
PROFILED_CALLS = 3


def run_row(row: Row, arguments: argparse.Namespace, device: Device) -> Result:
    """Measure; a row below its floor (or below 0.95) is measured once more and the better result stands."""
    prepared = prepare(row, device.tensors, compiled=arguments.compile)
    floor = row.floor if device.has_floors else None
    result = measure(row.name, floor, prepared, device, arguments.seconds, arguments.tolerance)
    if not result.passes:
        again = measure(row.name, floor, prepared, device, 2 * arguments.seconds, arguments.tolerance)
        if again.ratio > result.ratio:
            result = again
        result.repeated = True
    if arguments.profile is not None or arguments.nvtx:
        profile_row(row, prepared, result, device, arguments.profile)
    return result


def profile_row(row: Row, prepared: Prepared, result: Result, device: Device, folder: pathlib.Path | None) -> None:
    """A few calls of every side that raced, in named ranges, apart from what is timed; with a folder, a trace of them."""
    label = row.name.replace("/", ".")  # a slash separates nested ranges in Nsight's filters, and folders on disk
    raced = {t.name for t in result.peers if not t.note}
    calls = [("wengert", prepared.ours), *((p.name, p.call) for p in prepared.peers if p.name in raced)]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(device.trace(folder / f"{label}.json"))
        stack.enter_context(device.span(label))
        for name, call in calls:
            with device.span(name):
                for _ in range(PROFILED_CALLS):
                    call()
                device.synchronise()


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="rows whose name contains this; several parts by commas")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on the rounds of one row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=2e-3, help="largest float32 difference, relative to the largest entry")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the torch.func peers (slow to start)")
    parser.add_argument("--no-slopes", action="store_true")
    parser.add_argument("--floors", action="store_true", help="pass or fail for every row")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path)
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--save", metavar="DIR", type=pathlib.Path, nargs="?", const=RESULTS, help="JSON and Markdown, stamped")
    parser.add_argument("--profile", metavar="DIR", type=pathlib.Path, help="a chrome trace and named ranges for every row")
    parser.add_argument("--nvtx", action="store_true", help="named ranges only, for a run under Nsight; launches are not counted")
    parser.add_argument("--list", action="store_true", help="names of the rows")
    arguments = parser.parse_args(argv)
    if arguments.nvtx and (arguments.device != "cuda" or arguments.profile is not None):
        parser.error("--nvtx needs --device cuda and excludes --profile: only one tool at a time can profile the device")
    if arguments.only and arguments.save == RESULTS:
        parser.error("--save of a selection of rows needs a folder: the results kept beside this script are of all rows")
    try:
        arguments.rows = selected(arguments.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = arguments_of(argv)
    if arguments.list:
        print("\n".join(row.name for row in ROWS))
        return 0
    torch.set_num_threads(arguments.threads)
    try:
        device = open_device(arguments.device, seen_by_nsight=arguments.nvtx)
    except DeviceError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    results, broken = [], []
    for row in arguments.rows:
        print(f"{row.name} ...", end="\r", file=sys.stderr, flush=True)
        try:
            results.append(run_row(row, arguments, device))
            print(f"{row.name}: {results[-1].ratio:.2f}x", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("interrupted: the rows so far", file=sys.stderr)
            break
        except Exception as error:
            broken.append(f"{row.name}: {type(error).__name__}: {error}")
            print(f"BROKEN {broken[-1]}", file=sys.stderr, flush=True)
    print(" " * 60, end="\r", file=sys.stderr)
    slopes = [] if arguments.no_slopes or arguments.only else pointwise_slopes(device, arguments.seconds)
    run = Run(device.stamp(), results, slopes, broken)
    if results:
        print(table(results, arguments.markdown, arguments.floors))
    print("\n".join(["", *slope_lines(slopes), ", ".join(f"{k} {v}" for k, v in run.stamp.items())]))
    for line in broken:
        print(f"BROKEN {line}")
    if arguments.json:
        run.write_json(arguments.json)
    if arguments.save:
        print("wrote " + " and ".join(map(str, run.save(arguments.save))))
    if arguments.plot and results:
        plot(results, arguments.plot)
    failed = [r.row for r in results if not r.passes]
    if arguments.floors:
        print(f"{len(results) - len(failed)} of {len(results)} rows pass" + (f"; below: {', '.join(failed)}" if failed else ""))
    return 1 if broken or (arguments.floors and failed) else 0


if __name__ == "__main__":
    sys.exit(main())
