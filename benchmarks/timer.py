"""One timer for everything: agreement first, then interleaved paired rounds, medians, an interval, peak memory."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rows import Peer, Prepared

Call = Callable[[], Any]
SAMPLE_SECONDS = 0.004  # one timed sample repeats a call until it lasts about this long
HOPELESS = 25.0  # a peer this many times slower than the fastest is timed once


@dataclasses.dataclass
class Timing:
    """Median seconds of one call, and how it was found."""

    name: str
    seconds: float
    counted: bool = True
    peak_mib: float | None = None
    difference: float | None = None
    note: str = ""


@dataclasses.dataclass
class Result:
    """One row measured. `ratio` is the median over rounds of fastest peer / ours; low and high bound it."""

    row: str
    floor: float | None
    ours: Timing
    peers: list[Timing]
    fastest: str
    ratio: float
    low: float
    high: float
    rounds: int
    repeated: bool = False

    @property
    def passes(self) -> bool:
        return self.low >= 0.95 if self.floor is None else self.ratio >= self.floor and self.low >= 0.95


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def leaves(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
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


def once(call: Call, device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - begin


def sample(call: Call, repeats: int, device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - begin) / repeats


def peak_memory(call: Call, device: torch.device) -> float | None:
    """MiB a call adds at its peak: the allocator's count on CUDA, the resident set on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        gc.collect()
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # resets the high-water mark of the resident set
        before = _status_mib("VmRSS")
        result = call()
        peak = _status_mib("VmHWM")
        del result
    except OSError:
        return None
    return max(0.0, peak - before)


def _status_mib(field: str) -> float:
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    raise OSError(field)


def bootstrap(ratios: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median."""
    draws = np.random.RandomState(0).randint(0, len(ratios), (2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return float(low), float(high)


def measure(name: str, floor: float | None, prepared: Prepared, device: torch.device, seconds: float, tolerance: float) -> Result:
    reference = None
    timings: list[Timing] = []
    calls: list[tuple[Timing, Call]] = []
    ours = Timing("wengert", 0.0)
    result = prepared.ours()
    for peer in prepared.peers:
        timing = Timing(peer.name, math.inf, peer.counted)
        timings.append(timing)
        begin = time.perf_counter()
        try:
            found = peer.call()
        except Exception as error:
            timing.note = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
            continue
        synchronise(device)
        timing.seconds = time.perf_counter() - begin
        timing.difference = largest_difference(result, found)
        if peer.counted and reference is None:
            reference = timing.difference
        if not timing.difference <= tolerance:
            raise AssertionError(f"{name}: wengert and {peer.name} differ by {timing.difference:.2e}")
        calls.append((timing, peer.call))
    del result
    ours.peak_mib = peak_memory(prepared.ours, device)
    ours.difference = reference
    ours.seconds = min(once(prepared.ours, device) for _ in range(3))
    first = min(t.seconds for t, _ in calls)
    for timing, call in calls:
        if timing.seconds <= 4 * HOPELESS * first:  # the first call of anything is slow; beyond this it does not matter
            timing.seconds = once(call, device)
    quickest = min(t.seconds for t, _ in calls)
    racing = []
    for timing, call in calls:
        if timing.seconds > HOPELESS * quickest:
            timing.note = "timed once"
        else:
            timing.seconds = min(timing.seconds, once(call, device))
            racing.append((timing, call))
    rounds = race(ours, prepared.ours, racing, device, seconds)
    best = min((t for t, _ in racing if t.counted), key=lambda t: t.seconds)
    best.peak_mib = peak_memory(next(call for t, call in racing if t is best), device)
    ratios = rounds[best.name] / rounds[ours.name]
    low, high = bootstrap(ratios)
    return Result(name, floor, ours, timings, best.name, float(np.median(ratios)), low, high, len(ratios))


def race(
    ours: Timing, our_call: Call, racing: list[tuple[Timing, Call]], device: torch.device, seconds: float
) -> dict[str, np.ndarray]:
    """Interleaved rounds in alternating order; fills the medians and returns every sample by name."""
    field = [(ours, our_call), *racing]
    repeats = {t.name: max(1, min(1000, round(SAMPLE_SECONDS / max(t.seconds, 1e-7)))) for t, _ in field}
    cost = sum(repeats[t.name] * t.seconds for t, _ in field)
    count = max(5, min(100, round(seconds / max(cost, 1e-6))))
    samples: dict[str, list[float]] = {t.name: [] for t, _ in field}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for k in range(count):
            for timing, call in field if k % 2 else reversed(field):
                samples[timing.name].append(sample(call, repeats[timing.name], device))
    finally:
        if collecting:
            gc.enable()
    for timing, _ in field:
        timing.seconds = float(np.median(samples[timing.name]))
    return {name: np.array(values) for name, values in samples.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    import platform

    import wengert

    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu)
    stamp = {
        "wengert": getattr(wengert, "__version__", "?"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    try:
        import jax

        stamp["jax"] = jax.__version__
    except ImportError:
        pass
    return stamp


__all__ = ["Peer", "Result", "Timing", "environment", "measure", "once", "race"]
