"""A stand-in for torch.cuda on CPU tensors: a host's clock, a device that works behind it, events, ranges and a profiler.

Time passes only where somebody spends it: a launch costs the host some time and keeps the device busy, recording an event
costs the host RECORD seconds, waiting brings the host to where the device is.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from typing import Any

import torch
from device import Backend, CudaDevice
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

RECORD = 1e-3
COPY_BYTES = 1_000_000  # hence a copy's bandwidth of 2 * COPY_BYTES / RECORD = 2 GB/s
FLUSH = 0.05  # seconds for which overwriting the L2 keeps the device busy
MIB = 1 << 20


class FakeCuda:
    def __init__(self) -> None:
        self.now = 0.0  # on the host
        self.idle_at = 0.0  # when the device has done what was queued
        self.launched: list[tuple[str, float]] = []
        self.allocated = self.peak = 0
        self.events_recorded = 0
        self.open_ranges: list[str] = []
        self.ranges: list[tuple[str, ...]] = []
        self.profiles = 0
        self.nvtx = types.SimpleNamespace(range_push=self._push, range_pop=lambda: self.open_ranges.pop())
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = float("nan")

            def record(self) -> None:
                cuda.events_recorded += 1
                cuda.now += RECORD
                self.at = max(cuda.now, cuda.idle_at)

            def synchronize(self) -> None:
                cuda.now = max(cuda.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        self.Event = Event

    def launch(self, name: str = "kernel", host: float = 0.0, device: float = 0.0, memory: int = 0) -> None:
        """What an operation does: costs the host, queues work, and holds `memory` bytes while it runs."""
        self.now += host
        self.idle_at = max(self.idle_at, self.now) + device
        self.launched.append((name, device))
        self.peak = max(self.peak, self.allocated + memory)

    def _push(self, name: str) -> None:
        self.open_ranges.append(name)
        self.ranges.append(tuple(self.open_ranges))

    def is_available(self) -> bool:
        return True

    def get_device_name(self, device: torch.device) -> str:
        return "Fake GPU (8 GB)"

    def get_device_properties(self, device: torch.device) -> Any:
        return types.SimpleNamespace(major=9, minor=0, multi_processor_count=4, total_memory=8 << 30, L2_cache_size=64)

    def synchronize(self, device: torch.device) -> None:
        self.now = max(self.now, self.idle_at)

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.allocated

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak


class FakeProfile:
    """Sees the fake launches between its beginning and its end; its trace holds their names and those of the ranges."""

    def __init__(self, cuda: FakeCuda, activities: list[ProfilerActivity]) -> None:
        assert ProfilerActivity.CUDA in activities
        self._cuda = cuda

    def __enter__(self) -> FakeProfile:
        self._cuda.profiles += 1
        self._first = (len(self._cuda.launched), len(self._cuda.ranges))
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._cuda.now >= self._cuda.idle_at, "the device is still busy with what is to be seen"
        self._launched = self._cuda.launched[self._first[0] :]
        self._ranges = self._cuda.ranges[self._first[1] :]

    def events(self) -> list[Any]:
        around = [
            _event("cudaLaunchKernel", 1.0, device_type=DeviceType.CPU),
            _event("named by a person", 1.0, is_user_annotation=True),
        ]
        return around + [_event(name, seconds) for name, seconds in self._launched]

    def export_chrome_trace(self, path: str) -> None:
        names = ["/".join(r) for r in self._ranges] + [name for name, _ in self._launched]
        with open(path, "w") as f:
            json.dump({"traceEvents": [{"name": name} for name in names]}, f)


def _event(name: str, seconds: float, device_type: DeviceType = DeviceType.CUDA, is_user_annotation: bool = False) -> Any:
    time_range = types.SimpleNamespace(elapsed_us=lambda: seconds * 1e6)
    return types.SimpleNamespace(
        name=name, device_type=device_type, is_user_annotation=is_user_annotation, time_range=time_range
    )


class FakeDevice(CudaDevice):
    """CudaDevice on the fake; overwriting the L2 keeps the fake device busy as well."""

    def __init__(self, cuda: FakeCuda, *, seen_by_nsight: bool = False, profile: Callable[..., Any] | None = None) -> None:
        backend = Backend(
            cuda=cuda,
            profile=profile or (lambda activities: FakeProfile(cuda, activities)),
            clock=lambda: cuda.now,
            tensors="cpu",
            flush_bytes=100,
            copy_bytes=COPY_BYTES,
            seen_by_nsight=seen_by_nsight,
        )
        super().__init__(backend)

    def flush(self) -> None:
        super().flush()
        self._cuda.launch("Memset", device=FLUSH)
