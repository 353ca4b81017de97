"""What a run leaves behind: the table, the record (JSON), the page (Markdown) and the plot."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

from slopes import Slope
from timer import Result, Timing

LEGEND = """\
Agreement of all peers was checked before anything was timed. Times are medians of paired rounds; the ratio is fastest peer /
wengert, with the 95 % interval of its median. Peak memory is given as wengert/peer."""
CUDA_LEGEND = """
Each call is timed by CUDA events on a drained device whose L2 was overwritten, so a time holds the host's part as well; `kernels`
is the time for which the device itself was busy with wengert's call. Launches are kernels per call, + copies and fills, given as
wengert / peer. GB/s is the least number of bytes any method must read and write (inputs and result) over wengert's time; the last
column is its share of what a device-to-device copy reached in the same run."""


@dataclasses.dataclass
class Run:
    """Everything one run of the benchmark found. `stamp` is what the figures depend on."""

    stamp: dict[str, Any]
    results: list[Result]
    slopes: list[Slope]
    broken: list[str]

    def record(self) -> dict[str, Any]:
        return {
            "environment": self.stamp,
            "rows": [_row_record(r) for r in self.results],
            "slopes": [dataclasses.asdict(s) for s in self.slopes],
            "broken": self.broken,
        }

    def write_json(self, path: pathlib.Path) -> None:
        path.write_text(json.dumps(self.record(), indent=1, allow_nan=False) + "\n")

    def write_page(self, path: pathlib.Path) -> None:
        on_device = any(r.copy_bandwidth for r in self.results)
        parts = [
            f"# Benchmark on {self.stamp['device']}",
            LEGEND + (CUDA_LEGEND if on_device else ""),
            table(self.results, markdown=True, floors=False),
            "\n".join(f"- {line}" for line in slope_lines(self.slopes)),
            "\n".join(f"- broken: {line}" for line in self.broken),
            "## Every peer\n\nThe ratio goes by those that count; the others (compiled, other libraries) are for orientation.",
            peers_table(self.results),
            "## Where this was measured",
            "\n".join(["| what | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in self.stamp.items())]),
        ]
        path.write_text("\n\n".join(part for part in parts if part) + "\n")

    def save(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes the record and the page under the device's name."""
        stem = stem_of(self.stamp["device"])
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
        self.write_json(paths[0])
        self.write_page(paths[1])
        return paths


def stem_of(device: str) -> str:
    """The name of a device as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _row_record(r: Result) -> dict[str, Any]:
    record = dataclasses.asdict(r)
    for peer in record["peers"]:
        if not math.isfinite(peer["seconds"]):
            peer["seconds"] = None  # it did not run; JSON has no infinity
    return record | {"passes": r.passes, "bandwidth": r.bandwidth, "share_of_copy": r.share_of_copy}


def human(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * scale:  # less would be rounded to 1000 of the next unit
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _launches(timing: Timing) -> str:
    k = timing.kernels
    if k is None:
        return "n/a"
    return f"{k.launches}+{k.copies}" if k.copies else str(k.launches)


def _device_cells(r: Result, best: Timing) -> list[str]:
    return [
        f"{_launches(r.ours)} / {_launches(best)}",
        "n/a" if r.ours.kernels is None else human(r.ours.kernels.seconds),
        "n/a" if r.bandwidth is None else f"{r.bandwidth / 1e9:.3g}",
        "n/a" if r.share_of_copy is None else f"{100 * r.share_of_copy:.2g} %",
    ]


def table(results: list[Result], markdown: bool, floors: bool) -> str:
    header = ["problem / form", "wengert", "fastest PyTorch", "time", "ratio", "95 % of median", "peak MiB", "difference"]
    on_device = any(r.copy_bandwidth for r in results)
    if on_device:
        header += ["launches", "kernels", "GB/s", "of copy"]
    if floors:
        header += ["floor", ""]
    lines = []
    for r in results:
        best = next(p for p in r.peers if p.name == r.fastest)
        peaks = "/".join("-" if p is None else f"{p:.0f}" for p in (r.ours.peak_mib, best.peak_mib))
        line = [r.row, human(r.ours.seconds), r.fastest, human(best.seconds), f"{r.ratio:.2f}x", f"{r.low:.2f} to {r.high:.2f}"]
        line += [peaks, f"{best.difference:.0e}"]
        if on_device:
            line += _device_cells(r, best)
        if floors:
            line += ["" if r.floor is None else f"{r.floor:g}x", "pass" if r.passes else "FAIL"]
        lines.append(line)
    return markdown_table(header, lines) if markdown else text_table(header, lines)


def peers_table(results: list[Result]) -> str:
    header = ["problem / form", "peer", "counts", "time", "difference", "note"]
    lines = []
    for r in results:
        for p in r.peers:
            difference = "" if p.difference is None else f"{p.difference:.0e}"
            lines.append([r.row, p.name, "yes" if p.counted else "no", human(p.seconds), difference, p.note.replace("|", "/")])
    return markdown_table(header, lines)


def text_table(header: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[k]) for line in [header, *lines]) for k in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in [header, *lines])


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


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
