"""How time and peak memory of the networks' derivatives grow with the batch, and with the rows of a Jacobian.

python benchmarks/run_growth.py                         a line for each network and form
python benchmarks/run_growth.py --only cnn,gru --forms hvp,parameters
python benchmarks/run_growth.py --save                  writes benchmarks/results/growth-<device>.md

The forms of run_networks.py that have a batch, and `parameters`: the Jacobian of all outputs of the batch by all parameters,
whose rows grow with it.  Against that of PyTorch's forms which is the fastest at the largest batch; agreement is checked at the
smallest and there.
A growth of p says that time grows with the batch to the power p, from the second size to the third.
Exit status: 0; 1 if a line is broken; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sys

import networks
import torch
import wengert
from device import Call, Device, open_device
from report import human, markdown_table, text_table
from rows import Peer, Prepared
from run_networks import FORMS, RESULTS, chosen, every_cell, runs
from timer import HOPELESS, Timing, agreement, race
from torch.autograd import functional as torch_functional

BATCHES = {form: (64, 256, 1024) for form in FORMS if form not in ("jacobian", "hessian")} | {"parameters": (4, 16, 64)}
MOST_ENTRIES = 2**26  # of a result: 256 MiB
HEADER = ["network / form", "wengert", "fastest PyTorch", "time", "ratio", "growth", "its growth", "peak MiB", "its peak"]


@dataclasses.dataclass
class Growth:
    """Seconds of one call at each batch, MiB that it adds at its peak at the largest; ours and the fastest peer's."""

    line: str
    seconds: list[float]
    peer: str
    peer_seconds: list[float]
    peak: float | None
    peer_peak: float | None
    batches: tuple[int, ...]

    def exponent(self, seconds: list[float]) -> float:
        return math.log(seconds[-1] / seconds[-2]) / math.log(self.batches[-1] / self.batches[-2])

    def cells(self) -> list[str]:
        peaks = ["-" if p is None else f"{p:.0f}" for p in (self.peak, self.peer_peak)]
        growths = [f"{self.exponent(s):.2f}" for s in (self.seconds, self.peer_seconds)]
        ratio = f"{self.peer_seconds[-1] / self.seconds[-1]:.2f}"
        return [self.line, human(self.seconds[-1]), self.peer, human(self.peer_seconds[-1]), ratio, *growths, *peaks]


def by_parameters(name: str, batch: int) -> Prepared | None:
    """None where the result would be too large."""
    n = networks.make(name, batch)
    names, at = list(n.parameters), tuple(t.detach() for t in n.parameters.values())
    f = lambda *values: n.call(dict(zip(names, values)), n.x).flatten()
    if f(*at).numel() * sum(t.numel() for t in at) > MOST_ENTRIES:
        return None
    transform = torch.func.jacrev(f, tuple(range(len(at))))
    peers = [
        Peer("functional vectorised", lambda: torch_functional.jacobian(f, at, vectorize=True)),
        Peer("functional loop", lambda: torch_functional.jacobian(f, at)),
        Peer("func.jacrev", lambda: transform(*at)),
    ]
    return Prepared(lambda: wengert.jacobian(f, at), peers)


def prepare(name: str, form: str, batch: int) -> Prepared | None:
    return by_parameters(name, batch) if form == "parameters" else FORMS[form](networks.make(name, batch))


def raced(ours: Call, peer: Call, device: Device, seconds: float) -> tuple[float, float]:
    """Median seconds of both, in interleaved rounds."""
    timings = [Timing(name, device.sample(call, 1)) for name, call in (("wengert", ours), ("peer", peer))]
    race(timings[0], ours, [(timings[1], peer)], device, seconds)
    return timings[0].seconds, timings[1].seconds


def growth(name: str, form: str, device: Device, seconds: float, tolerance: float) -> Growth | None:
    """None where PyTorch has no such derivative, or where it would be too large."""
    batches = BATCHES[form]
    label = f"{name}/{form}"
    if (largest := prepare(name, form, batches[-1])) is None:
        return None
    smallest = prepare(name, form, batches[0])
    if not any(runs(peer.call) for peer in smallest.peers):
        return None
    known = agreement(label, smallest, smallest.ours(), device, tolerance)
    near = {timing.name for timing, _ in known if timing.seconds < HOPELESS * min(t.seconds for t, _ in known)}
    largest.peers = [peer for peer in largest.peers if peer.name in near and peer.counted]  # others may need all memory there is
    field = agreement(label, largest, largest.ours(), device, tolerance)
    times = {timing.name: min(device.sample(call, 1) for _ in range(3)) for timing, call in field if call is not None}
    best = min(times, key=times.get)
    seconds_of = []
    for batch in batches:
        prepared = {batches[0]: smallest, batches[-1]: largest}.get(batch) or prepare(name, form, batch)
        peer = next(p.call for p in prepared.peers if p.name == best)
        for call in (prepared.ours, peer):
            call()
        seconds_of.append(raced(prepared.ours, peer, device, seconds))
    ours, theirs = map(list, zip(*seconds_of))
    peaks = [device.peak_memory(call) for call in (prepared.ours, peer)]
    return Growth(f"{name} / {form}", ours, best, theirs, *peaks, batches)


def summary(lines: list[Growth]) -> str:
    """What grows faster than PyTorch's does and than linearly, and what needs more memory."""
    faster = [g for g in lines if g.exponent(g.seconds) > max(1.1, g.exponent(g.peer_seconds) + 0.1)]
    # A mebibyte is the allocator's: what it keeps and gives back moves the figure by so much.
    larger = [g for g in lines if g.peak is not None and g.peer_peak is not None and g.peak > 1.1 * g.peer_peak + 1]
    slower = [g for g in lines if g.peer_seconds[-1] < 0.95 * g.seconds[-1]]
    return "\n".join(
        f"{what}: {len(some)} of {len(lines)}" + "".join(f"\n  {g.line} {text(g)}" for g in some)
        for what, some, text in (
            ("more than linear and than PyTorch's", faster, lambda g: f"{g.exponent(g.seconds):.2f}"),
            ("more than 1.1 times PyTorch's memory", larger, lambda g: f"{g.peak:.0f} for {g.peer_peak:.0f} MiB"),
            ("below 0.95 times PyTorch's speed at the largest", slower, lambda g: f"{g.peer_seconds[-1] / g.seconds[-1]:.2f}"),
        )
    )


def save(folder: pathlib.Path, lines: list[Growth], device: Device) -> None:
    stamp = device.stamp()
    path = folder / f"growth-{device.name}.md"
    sizes = "; ".join(f"{form} {', '.join(map(str, batches))}" for form, batches in BATCHES.items())
    parts = [
        f"# Growth with the batch on {stamp['cpu']}",
        f"Batches: {sizes}. Times and MiB are those of the largest; growth is the exponent of the batch from the second to it.",
        summary(lines).replace("\n  ", "\n- ").replace("\nmore", "\n\nmore").replace("\nbelow", "\n\nbelow"),
        markdown_table(HEADER, [g.cells() for g in lines]),
        markdown_table(["what", ""], [[k, str(v)] for k, v in stamp.items()]),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n")
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run_growth.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", help="networks whose name contains this; several parts by commas")
    parser.add_argument("--forms", help="forms whose name contains this; several parts by commas")
    parser.add_argument("--seconds", type=float, default=0.3, help="time to spend on the rounds of one size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=2e-3, help="largest float32 difference, relative to the largest entry")
    parser.add_argument("--save", metavar="DIR", type=pathlib.Path, nargs="?", const=RESULTS)
    arguments = parser.parse_args(argv)
    names = chosen(parser, "--only", arguments.only, list(networks.NETWORKS))
    forms = chosen(parser, "--forms", arguments.forms, list(BATCHES))
    torch.set_num_threads(arguments.threads)
    device = open_device("cpu")
    run = lambda name, form: growth(name, form, device, arguments.seconds, arguments.tolerance)
    lines, broken = every_cell(names, forms, run, lambda line: "  ".join(line.cells()))
    print(text_table(HEADER, [g.cells() for g in lines]))
    print(summary(lines))
    for line in broken:
        print(f"BROKEN {line}")
    if arguments.save:
        save(arguments.save, lines, device)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
