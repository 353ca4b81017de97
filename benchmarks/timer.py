"""One timer for everything: agreement first, then interleaved paired rounds, medians, an interval, memory and launches."""

from __future__ import annotations

import dataclasses
import gc
import math
from typing import Any

import numpy as np
import torch
from device import Call, Device, Kernels
from rows import Prepared

HOPELESS = 25.0  # a peer this many times slower than the fastest is timed once
SECOND_LOOK = 1.0  # a first call shorter than this says nothing of a peer; a longer one may


@dataclasses.dataclass
class Timing:
    """Median seconds of one call, and how it was found."""

    name: str
    seconds: float
    counted: bool = True
    peak_mib: float | None = None
    kernels: Kernels | None = None
    difference: float | None = None
    note: str = ""


@dataclasses.dataclass
class Result:
    """One row measured. `ratio` is the median over rounds of fastest peer / ours; low and high bound it.

    `bytes` is the least that any method must read and write; `copy_bandwidth` what the device's own copy reaches.
    """

    row: str
    floor: float | None
    ours: Timing
    peers: list[Timing]
    fastest: str
    ratio: float
    low: float
    high: float
    rounds: int
    bytes: int | None = None
    copy_bandwidth: float | None = None
    repeated: bool = False

    @property
    def passes(self) -> bool:
        return self.low >= 0.95 if self.floor is None else self.ratio >= self.floor and self.low >= 0.95

    @property
    def bandwidth(self) -> float | None:
        """Necessary bytes a second of our call."""
        return None if self.bytes is None else self.bytes / self.ours.seconds

    @property
    def share_of_copy(self) -> float | None:
        return None if self.bandwidth is None or self.copy_bandwidth is None else self.bandwidth / self.copy_bandwidth


def leaves(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree.detach()]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (tuple, list)):
        return [t for part in tree for t in leaves(part)]
    return [torch.from_numpy(np.array(tree))]  # an array of another library


def largest_difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference, relative to the largest entry; nan and shape mismatches count as infinite."""
    a, b = leaves(ours), leaves(theirs)
    if len(a) != len(b) or any(s.shape != t.shape for s, t in zip(a, b)):
        return math.inf
    worst = 0.0
    for s, t in zip(a, b):
        if s.numel():
            t = t.to(s.device)
            scale = max(1.0, float(t.abs().max()))
            gap = float((s - t).abs().max()) / scale
            worst = math.inf if math.isnan(gap) else max(worst, gap)
    return worst


def bootstrap(ratios: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median."""
    draws = np.random.RandomState(0).randint(0, len(ratios), (2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return float(low), float(high)


def minimum_bytes(prepared: Prepared, result: Any) -> int | None:
    """Every input read once, the result written once (and read again where the row does)."""
    if prepared.input_bytes is None:
        return None
    if prepared.reads_result:
        result = result[0]
    written = sum(t.numel() * t.element_size() for t in leaves(result))
    return prepared.input_bytes + written * (2 if prepared.reads_result else 1)


def agreement(name: str, prepared: Prepared, result: Any, device: Device, tolerance: float) -> list[tuple[Timing, Call | None]]:
    """Every peer run once: its first seconds and its difference from our result. A peer that cannot run gets no call.

    Raises AssertionError, naming every peer that differs, before anything is timed.
    """
    field: list[tuple[Timing, Call | None]] = []
    for peer in prepared.peers:
        timing = Timing(peer.name, math.inf, peer.counted)
        try:
            if peer.compiles:
                peer.call()  # so that compiling does not make it look hopeless
            found, timing.seconds = device.timed(peer.call)
        except Exception as error:
            timing.note = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
            field.append((timing, None))
            continue
        timing.difference = largest_difference(result, found)
        field.append((timing, peer.call))
    wrong = [f"{t.name} by {t.difference:.2e}" for t, call in field if call is not None and not t.difference <= tolerance]
    if wrong:
        raise AssertionError(f"wengert differs from {', '.join(wrong)}; nothing was timed")
    if not any(t.counted and call is not None for t, call in field):
        raise RuntimeError("no peer ran: " + "; ".join(f"{t.name}: {t.note}" for t, _ in field))
    return field


def measure(name: str, floor: float | None, prepared: Prepared, device: Device, seconds: float, tolerance: float) -> Result:
    ours = Timing("wengert", 0.0)
    result = prepared.ours()
    field = agreement(name, prepared, result, device, tolerance)
    size = minimum_bytes(prepared, result)
    del result
    timings = [t for t, _ in field]
    calls = [(t, call) for t, call in field if call is not None]
    ours.difference = next(t.difference for t, _ in calls if t.counted)
    ours.peak_mib = device.peak_memory(prepared.ours)
    ours.kernels = device.kernels(prepared.ours)
    ours.seconds = min(device.sample(prepared.ours, 1) for _ in range(3))
    first = min(t.seconds for t, _ in calls)
    for timing, call in calls:
        if timing.seconds <= max(SECOND_LOOK, 4 * HOPELESS * first):  # the first call of anything is slow
            timing.seconds = device.sample(call, 1)
    quickest = min(t.seconds for t, _ in calls if t.counted)
    racing = []
    for timing, call in calls:
        if timing.seconds > HOPELESS * quickest:
            timing.note = "timed once"
        else:
            timing.seconds = min(timing.seconds, device.sample(call, 1))
            racing.append((timing, call))
    rounds = race(ours, prepared.ours, racing, device, seconds)
    best, best_call = min(((t, call) for t, call in racing if t.counted), key=lambda pair: pair[0].seconds)
    best.peak_mib = device.peak_memory(best_call)
    best.kernels = device.kernels(best_call)
    ratios = rounds[best.name] / rounds[ours.name]
    low, high = bootstrap(ratios)
    middle = float(np.median(ratios))
    return Result(name, floor, ours, timings, best.name, middle, low, high, len(ratios), size, device.copy_bandwidth)


def race(
    ours: Timing, our_call: Call, racing: list[tuple[Timing, Call]], device: Device, seconds: float
) -> dict[str, np.ndarray]:
    """Interleaved rounds in alternating order; fills the medians and returns every sample by name."""
    field = [(ours, our_call), *racing]
    repeats = {t.name: max(1, min(1000, round(device.sample_seconds / max(t.seconds, 1e-7)))) for t, _ in field}
    cost = sum(repeats[t.name] * t.seconds for t, _ in field)
    count = max(5, min(100, round(seconds / max(cost, 1e-6))))
    samples: dict[str, list[float]] = {t.name: [] for t, _ in field}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(device.warm_up_calls):
            for _, call in field:
                call()
        for k in range(count):
            for timing, call in field if k % 2 else reversed(field):
                samples[timing.name].append(device.sample(call, repeats[timing.name]))
    finally:
        if collecting:
            gc.enable()
    for timing, _ in field:
        timing.seconds = float(np.median(samples[timing.name]))
    return {name: np.array(values) for name, values in samples.items()}
