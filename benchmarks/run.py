"""Runs the benchmark: agreement first, then paired times against the fastest peer.

python benchmarks/run.py                        every row, a table
python benchmarks/run.py --only rosenbrock      rows whose name contains this (several by commas)
python benchmarks/run.py --floors               pass or fail against the floors; exit status 1 if any fails
python benchmarks/run.py --markdown             the table of the README
python benchmarks/run.py --json out.json --plot out.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys

import torch
from rows import ROWS, Row, prepare, selected
from slopes import Slope, pointwise_slopes
from timer import Result, environment, measure


def human(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def run_row(row: Row, arguments: argparse.Namespace, device: torch.device) -> Result:
    """Measure; a row below its floor (or below 0.95) is measured once more and the better result stands."""
    prepared = prepare(row, device, compiled=arguments.compile)
    result = measure(row.name, row.floor, prepared, device, arguments.seconds, arguments.tolerance)
    if not result.passes:
        again = measure(row.name, row.floor, prepared, device, 2 * arguments.seconds, arguments.tolerance)
        if again.ratio > result.ratio:
            result = again
        result.repeated = True
    return result


def table(results: list[Result], markdown: bool, floors: bool) -> str:
    header = ["problem / form", "wengert", "fastest PyTorch", "time", "ratio", "95 % of median", "peak MiB", "difference"]
    if floors:
        header += ["floor", ""]
    lines = []
    for r in results:
        best = next(p for p in r.peers if p.name == r.fastest)
        peaks = "/".join("-" if p is None else f"{p:.0f}" for p in (r.ours.peak_mib, best.peak_mib))
        line = [r.row, human(r.ours.seconds), r.fastest, human(best.seconds), f"{r.ratio:.2f}x", f"{r.low:.2f} to {r.high:.2f}"]
        line += [peaks, f"{best.difference:.0e}"]
        if floors:
            line += ["" if r.floor is None else f"{r.floor:g}x", "pass" if r.passes else "FAIL"]
        lines.append(line)
    if markdown:
        return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])
    widths = [max(len(line[k]) for line in [header, *lines]) for k in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in [header, *lines])


def slope_lines(slopes: list[Slope]) -> list[str]:
    lines = []
    for s in slopes:
        times = ", ".join(f"{n}: {human(t)}" for n, t in zip(s.sizes, s.seconds))
        lines.append(f"pointwise Jacobian's arithmetic, {s.name}: cost ~ N^{s.exponent:.2f}  ({times})")
    return lines


def plot(results: list[Result], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = sorted(results, key=lambda r: r.ratio)
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(ordered) + 1.6), layout="constrained")
    at = range(len(ordered))
    axes.barh(at, [r.ratio for r in ordered], color=["#2a6f97" if r.ratio >= 1 else "#c1121f" for r in ordered], height=0.66)
    errors = [[r.ratio - r.low for r in ordered], [r.high - r.ratio for r in ordered]]
    axes.errorbar([r.ratio for r in ordered], at, xerr=errors, fmt="none", ecolor="#333333", elinewidth=1)
    floors = [(k, r.floor) for k, r in enumerate(ordered) if r.floor is not None]
    axes.scatter([f for _, f in floors], [k for k, _ in floors], marker="|", s=130, color="#f4a261", label="floor", zorder=3)
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set(xscale="log", yticks=list(at), yticklabels=[r.row for r in ordered])
    axes.set_xlabel("times faster than the fastest PyTorch form (log scale)")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if floors:
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="rows whose name contains this; several parts by commas")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on the rounds of one row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=2e-3, help="largest float32 difference, relative to the largest entry")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the torch.func peers (slow to start)")
    parser.add_argument("--no-slopes", action="store_true")
    parser.add_argument("--floors", action="store_true", help="pass or fail for every row")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--list", action="store_true", help="names of the rows")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = arguments_of(argv)
    if arguments.list:
        print("\n".join(row.name for row in ROWS))
        return 0
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    results, broken = [], []
    for row in selected(arguments.only):
        print(f"{row.name} ...", end="\r", file=sys.stderr, flush=True)
        try:
            results.append(run_row(row, arguments, device))
            print(f"{row.name}: {results[-1].ratio:.2f}x", file=sys.stderr, flush=True)
        except Exception as error:
            broken.append(f"{row.name}: {type(error).__name__}: {error}")
    print(" " * 60, end="\r", file=sys.stderr)
    slopes = [] if arguments.no_slopes or arguments.only else pointwise_slopes(device, arguments.seconds)
    stamp = environment(device)
    if results:
        print(table(results, arguments.markdown, arguments.floors))
    print("\n".join(["", *slope_lines(slopes), ", ".join(f"{k} {v}" for k, v in stamp.items())]))
    for line in broken:
        print(f"BROKEN {line}")
    if arguments.json:
        record = {
            "environment": stamp,
            "rows": [dataclasses.asdict(r) | {"passes": r.passes} for r in results],
            "slopes": [dataclasses.asdict(s) for s in slopes],
            "broken": broken,
        }
        pathlib.Path(arguments.json).write_text(json.dumps(record, indent=1))
    if arguments.plot and results:
        plot(results, arguments.plot)
    failed = [r.row for r in results if not r.passes]
    if arguments.floors:
        print(f"{len(results) - len(failed)} of {len(results)} rows pass" + (f"; below: {', '.join(failed)}" if failed else ""))
    return 1 if broken or (arguments.floors and failed) else 0


if __name__ == "__main__":
    sys.exit(main())
