"""Derivatives of ordinary networks in nine forms, each against the fastest form that PyTorch has for the same result.

python benchmarks/run_networks.py                         a table: networks down, forms across, ratios of time
python benchmarks/run_networks.py --only cnn,gru --forms hvp,grad
python benchmarks/run_networks.py --device cuda
python benchmarks/run_networks.py --save                  writes benchmarks/results/networks-<device>.json and .md

    jacobian        of the output by one sample               wengert.jacobian
    hessian         of the loss by one sample                 wengert.hessian
    batch_jacobian  of every output by its own sample         wengert.batch_jacobian
    per_sample      gradient of each loss by the parameters   wengert.func.vmap(wengert.func.grad(loss))
    hvp, vhp        of the loss by the parameters             wengert.hvp, wengert.vhp
    grad            of the loss by the parameters             forward and wengert.grad
    create_graph    the same, to be differentiated            forward and wengert.grad(create_graph=True)
    penalty         gradient by the parameters of the squared norm of the gradient by the samples

Agreement is checked before anything is timed. Exit status: 0; 1 if a cell is broken or below `--least`; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import networks
import torch
import wengert
from device import Device, DeviceError, open_device
from networks import Network
from report import human, markdown_table, stem_of, text_table
from rows import Peer, Prepared, batched_peers
from timer import Result, measure
from torch.autograd import functional as torch_functional

RESULTS = pathlib.Path(__file__).parent / "results"
BATCH = 32


def _of_one_sample(name: str, n: Network) -> Prepared:
    if name == "jacobian":
        f = lambda s: n.forward(s[None])[0]
        transforms = ("jacrev", "jacfwd")
    else:
        f = lambda s: n.loss(n.forward(s[None]), n.target[:1])
        transforms = ("hessian",)
    x, ours, theirs = n.x[0], getattr(wengert, name), getattr(torch_functional, name)
    peers = [
        Peer("functional loop", lambda: theirs(f, x)),
        Peer("functional vectorised", lambda: theirs(f, x, vectorize=True)),
    ]
    for transform in transforms:
        run = getattr(torch.func, transform)(f)
        peers.append(Peer(f"func.{transform}", lambda run=run: run(x)))
    return Prepared(lambda: ours(f, x), peers)


def _jacobian(n: Network) -> Prepared:
    return _of_one_sample("jacobian", n)


def _hessian(n: Network) -> Prepared:
    return _of_one_sample("hessian", n)


def _batch_jacobian(n: Network) -> Prepared:
    single = lambda s: n.forward(s[None])[0]
    return Prepared(lambda: wengert.batch_jacobian(n.forward, n.x), batched_peers(n.forward, single, n.x, compiled=False))


def _per_sample(n: Network) -> Prepared:
    p = {name: t.detach() for name, t in n.parameters.items()}
    leaves = list(n.parameters.values())

    def loss(p: networks.Parameters, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return n.loss(n.call(p, s[None]), t[None])

    ours = wengert.func.vmap(wengert.func.grad(loss), (None, 0, 0))
    theirs = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def loop() -> list[torch.Tensor]:
        rows = [torch.autograd.grad(n.loss(n.forward(s[None]), t[None]), leaves) for s, t in zip(n.x, n.target)]
        return [torch.stack(column) for column in zip(*rows)]

    peers = [Peer("vmap(func.grad)", lambda: list(theirs(p, n.x, n.target).values())), Peer("a gradient each", loop)]
    return Prepared(lambda: list(ours(p, n.x, n.target).values()), peers)


def _product(name: str, n: Network) -> Prepared:
    names = list(n.parameters)
    at = tuple(t.detach() for t in n.parameters.values())
    v = tuple(torch.randn_like(t) for t in at)
    f = lambda *values: n.loss(n.call(dict(zip(names, values)), n.x), n.target)
    gradient = torch.func.grad(f, tuple(range(len(at))))
    ours = getattr(wengert, name)
    peers = [  # Hessians are symmetric
        Peer("functional.vhp", lambda: torch_functional.vhp(f, at, v)[1]),
        Peer("functional.hvp", lambda: torch_functional.hvp(f, at, v)[1]),
        Peer("func.jvp(grad)", lambda: torch.func.jvp(gradient, at, v)[1]),
        Peer("func.vjp(grad)", lambda: torch.func.vjp(gradient, *at)[1](v)),
    ]
    return Prepared(lambda: ours(f, at, v)[1], peers)


def _hvp(n: Network) -> Prepared:
    return _product("hvp", n)


def _vhp(n: Network) -> Prepared:
    return _product("vhp", n)


def _gradient(n: Network, create_graph: bool) -> Prepared:
    leaves = list(n.parameters.values())
    detached = {name: t.detach() for name, t in n.parameters.items()}
    loss = lambda: n.loss(n.forward(n.x), n.target)
    func_grad = torch.func.grad(lambda p: n.loss(n.call(p, n.x), n.target))
    peers = [Peer("autograd.grad", lambda: torch.autograd.grad(loss(), leaves, create_graph=create_graph))]
    if not create_graph:
        peers.append(Peer("func.grad", lambda: list(func_grad(detached).values())))
    return Prepared(lambda: wengert.grad(loss(), leaves, create_graph=create_graph), peers)


def _grad(n: Network) -> Prepared:
    return _gradient(n, create_graph=False)


def _create_graph(n: Network) -> Prepared:
    return _gradient(n, create_graph=True)


def _penalty(n: Network) -> Prepared:
    leaves = list(n.parameters.values())
    x = n.x.detach().clone().requires_grad_()

    def step(grad: Callable[..., Any]) -> Any:
        (slope,) = grad(n.forward(x).sum(), x, create_graph=True)
        found = grad(slope.square().sum(), leaves, allow_unused=True)
        return [x.new_zeros(()) if g is None else g for g in found]  # a last bias does not move the slope of anything

    return Prepared(lambda: step(wengert.grad), [Peer("autograd.grad", lambda: step(torch.autograd.grad))])


FORMS: dict[str, Callable[[Network], Prepared]] = {
    "jacobian": _jacobian,
    "hessian": _hessian,
    "batch_jacobian": _batch_jacobian,
    "per_sample": _per_sample,
    "hvp": _hvp,
    "vhp": _vhp,
    "grad": _grad,
    "create_graph": _create_graph,
    "penalty": _penalty,
}


def prepare(name: str, form: str, batch: int = BATCH, device: torch.device | str = "cpu") -> Prepared:
    return FORMS[form](networks.make(name, batch, device))


def runs(call: Callable[[], Any]) -> bool:
    try:
        call()
    except RuntimeError:
        return False
    return True


def run_cell(name: str, form: str, arguments: argparse.Namespace, device: Device) -> Result | None:
    """None where PyTorch has no such derivative.

    A cell below `--least` is measured twice more, for longer, and the middle one stands: one slow moment decides nothing.
    """
    label = f"{name}/{form}"
    prepared = prepare(name, form, device=device.tensors)
    if not any(runs(peer.call) for peer in prepared.peers):
        return None
    found = [measure(label, None, prepared, device, arguments.seconds, arguments.tolerance)]
    if found[0].ratio < arguments.least:
        found += [measure(label, None, prepared, device, 2 * arguments.seconds, arguments.tolerance) for _ in range(2)]
        found.sort(key=lambda r: r.ratio)
        found[1].repeated = True
    return found[len(found) // 2]


def matrix(results: list[Result], forms: list[str]) -> list[list[str]]:
    """Ratios by network and form, and the geometric mean of each form."""
    cells = {tuple(r.row.split("/")): r.ratio for r in results}
    names = list(dict.fromkeys(name for name, _ in cells))
    lines = [[name, *(f"{cells[name, f]:.2f}" if (name, f) in cells else "-" for f in forms)] for name in names]
    lines.append(["geometric mean", *(_mean([cells[n, f] for n in names if (n, f) in cells]) for f in forms)])
    return lines


def _mean(ratios: list[float]) -> str:
    return f"{math.exp(math.fsum(map(math.log, ratios)) / len(ratios)):.2f}" if ratios else "-"


def summary(results: list[Result], least: float) -> str:
    below = [f"{r.row} {r.ratio:.2f}" for r in sorted(results, key=lambda r: r.ratio) if r.ratio < least]
    return "\n".join(
        [
            f"{len(results) - len(below)} of {len(results)} cells at {least:g} times PyTorch's fastest form or more; "
            f"geometric mean {_mean([r.ratio for r in results])}",
            *(["below: " + ", ".join(below)] if below else []),
        ]
    )


def details(results: list[Result]) -> list[list[str]]:
    lines = []
    for r in results:
        best = next(p for p in r.peers if p.name == r.fastest)
        peaks = "/".join("-" if p is None else f"{p:.0f}" for p in (r.ours.peak_mib, best.peak_mib))
        interval = f"{r.low:.2f} to {r.high:.2f}"
        lines.append([r.row, human(r.ours.seconds), r.fastest, human(best.seconds), f"{r.ratio:.2f}", interval, peaks])
    return lines


DETAILS = ["network / form", "wengert", "fastest PyTorch", "time", "ratio", "95 % of median", "peak MiB"]


def save(folder: pathlib.Path, results: list[Result], broken: list[str], forms: list[str], device: Device, least: float) -> None:
    stamp = device.stamp()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"networks-{stem_of(device.name)}"
    record = {
        "environment": stamp | {"batch": BATCH},
        "cells": [
            {"cell": r.row, "seconds": r.ours.seconds, "ratio": r.ratio, "low": r.low, "high": r.high, "fastest": r.fastest}
            | {"peers": {p.name: p.seconds if math.isfinite(p.seconds) else p.note for p in r.peers}}
            for r in results
        ],
        "broken": broken,
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    parts = [
        f"# Ordinary networks on {stamp['cpu'] if device.name == 'cpu' else device.name}",
        f"Times of PyTorch's fastest form over wengert's, batches of {BATCH} samples, float32; a dash where PyTorch has no "
        "such derivative.",
        markdown_table(["network", *forms], matrix(results, forms)),
        summary(results, least),
        *(f"Broken: {line}" for line in broken),
        "## Times",
        markdown_table(DETAILS, details(results)),
        "## Where this was measured",
        markdown_table(["what", ""], [[k, str(v)] for k, v in stamp.items()]),
    ]
    stem.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    print(f"wrote {stem}.json and {stem}.md")


def chosen(parser: argparse.ArgumentParser, option: str, text: str | None, names: list[str]) -> list[str]:
    if text is None:
        return names
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part or not any(part in name for name in names):
            parser.error(f"{option}: no name contains {part!r}; there are {', '.join(names)}")
    return [name for name in names if any(part in name for part in parts)]


def every_cell(
    names: list[str], forms: list[str], run: Callable[[str, str], Any], text: Callable[[Any], str]
) -> tuple[list[Any], list[str]]:
    """What `run` returns for each network and form, but None, and what went wrong; as `text` on the way.

    An interrupt ends it with the cells there are.
    """
    results, broken = [], []
    for name in names:
        for form in forms:
            try:
                if (result := run(name, form)) is not None:
                    results.append(result)
                    print(text(result), file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                print("interrupted: the cells so far", file=sys.stderr)
                return results, broken
            except Exception as error:
                broken.append(f"{name}/{form}: {type(error).__name__}: {error}")
                print(f"BROKEN {broken[-1]}", file=sys.stderr, flush=True)
    return results, broken


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run_networks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="networks whose name contains this; several parts by commas")
    parser.add_argument("--forms", help="forms whose name contains this; several parts by commas")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on the rounds of one cell")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=2e-3, help="largest float32 difference, relative to the largest entry")
    parser.add_argument("--least", type=float, default=0.95, help="the ratio that every cell should reach")
    parser.add_argument("--save", metavar="DIR", type=pathlib.Path, nargs="?", const=RESULTS)
    arguments = parser.parse_args(argv)
    names = chosen(parser, "--only", arguments.only, list(networks.NETWORKS))
    forms = chosen(parser, "--forms", arguments.forms, list(FORMS))
    torch.set_num_threads(arguments.threads)
    try:
        device = open_device(arguments.device)
    except DeviceError as error:
        print(f"run_networks.py: {error}", file=sys.stderr)
        return 2
    run = lambda name, form: run_cell(name, form, arguments, device)
    results, broken = every_cell(names, forms, run, lambda r: f"{r.row}: {r.ratio:.2f}")
    print(text_table(["network", *forms], matrix(results, forms)))
    print(summary(results, arguments.least))
    for line in broken:
        print(f"BROKEN {line}")
    if arguments.save:
        save(arguments.save, results, broken, forms, device, arguments.least)
    return 1 if broken or any(r.ratio < arguments.least for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
