"""What the timer asks of a device: a clock, memory, launches, traces, and a stamp of what the figures depend on.

NOTE [What a sample on CUDA is]
A sample answers: how long does a caller wait for one call on an idle device whose L2 holds none of the inputs? So each call
is timed by itself: the L2 is overwritten, the device drained, then an event, the call, an event. Without the drain the
host would queue work behind the overwriting, and a call bound by the host would look faster than it is, by about the time
of the overwriting. Kernel times, free of the host, come from the profiler, outside the timed rounds.

CudaDevice reaches CUDA only through a `Backend`. The tests give it one with a fake clock, fake events and CPU tensors, so
that the code below runs where there is no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

Call = Callable[[], Any]
PACKAGES = ("numpy", "triton", "jax", "nvidia-cuda-nvrtc", "nvidia-cublas", "nvidia-cuda-nvrtc-cu12", "nvidia-cublas-cu12")
KERNEL_RUNS = 5  # profiled calls of which the median is taken


class DeviceError(RuntimeError):
    """The device asked for cannot be used here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What one call queues on the device: kernels, copies and fills, and the seconds the device is busy with them."""

    launches: int
    copies: int
    seconds: float


class Device:
    """The processor itself, and what every other device shares with it."""

    name = "cpu"
    has_floors = True  # rows.py states its floors for the CPU
    sample_seconds = 0.004  # one timed sample repeats a call until it lasts about this long
    warm_up_calls = 0
    copy_bandwidth: float | None = None  # bytes a second, read plus written
    activities = (ProfilerActivity.CPU,)

    def __init__(self, tensors: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self.tensors = torch.device(tensors)
        self._clock = clock

    def synchronise(self) -> None:
        """Waits until the device has done everything asked of it so far."""

    def timed(self, call: Call) -> tuple[Any, float]:
        """The result of one call and its seconds on the host's clock; for first calls, where nothing is warm."""
        self.synchronise()
        begin = self._clock()
        result = call()
        self.synchronise()
        return result, self._clock() - begin

    def sample(self, call: Call, repeats: int) -> float:
        """Seconds of one call, averaged over the repeats."""
        begin = self._clock()
        for _ in range(repeats):
            call()
        return (self._clock() - begin) / repeats

    def peak_memory(self, call: Call) -> float | None:
        """MiB that a call adds at its peak: here of the resident set, where Linux tells."""
        try:
            gc.collect()
            _trim()
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")  # resets the high-water mark of the resident set
            before = _status_mib("VmRSS")
            result = call()
            peak = _status_mib("VmHWM")
            del result
        except OSError:
            return None
        return max(0.0, peak - before)

    def kernels(self, call: Call) -> Kernels | None:
        """What a call launches; None where nothing is launched or launches cannot be seen."""
        return None

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A named range in whichever profiler is looking."""
        with torch.profiler.record_function(name):
            yield

    @contextlib.contextmanager
    def trace(self, path: pathlib.Path) -> Iterator[None]:
        """Writes what happens inside as a chrome trace."""
        with self._profile(activities=list(self.activities)) as seen:
            yield
            self.synchronise()
        seen.export_chrome_trace(str(path))

    @property
    def _profile(self) -> Callable[..., Any]:
        return torch.profiler.profile

    def stamp(self) -> dict[str, Any]:
        """What a figure depends on besides the code."""
        import wengert

        cpu = platform.processor()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo") as f:
                cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu)
        return {
            "wengert": wengert.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": cpu,
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            "device": self.name,
        } | _versions()


@dataclasses.dataclass(frozen=True)
class Backend:
    """Everything CudaDevice needs of PyTorch and of the machine."""

    cuda: Any = torch.cuda
    profile: Callable[..., Any] = torch.profiler.profile
    clock: Callable[[], float] = time.perf_counter
    tensors: str = "cuda"
    flush_bytes: int = 256 << 20  # at least; four times the L2 where that is more
    copy_bytes: int = 512 << 20
    seen_by_nsight: bool = False  # another tool holds the profiling interface: no launch counts, no traces


class CudaDevice(Device):
    has_floors = False
    sample_seconds = 0.0005  # events tell half a microsecond
    warm_up_calls = 5
    activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)

    def __init__(self, backend: Backend) -> None:
        if not backend.cuda.is_available():
            built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build for the CPU only"
            raise DeviceError(f"--device cuda needs a GPU that PyTorch can use: torch {torch.__version__} {built} and sees none")
        super().__init__(backend.tensors, backend.clock)
        self._backend = backend
        self._cuda = backend.cuda
        self._properties = self._cuda.get_device_properties(self.tensors)
        self.name = self._cuda.get_device_name(self.tensors)
        size = max(backend.flush_bytes, 4 * self._properties.L2_cache_size)
        self._flushed = torch.empty(size, dtype=torch.uint8, device=self.tensors)
        self._begin, self._end = (self._cuda.Event(enable_timing=True) for _ in range(2))

    def flush(self) -> None:
        self._flushed.zero_()

    def synchronise(self) -> None:
        self._cuda.synchronize(self.tensors)

    def sample(self, call: Call, repeats: int) -> float:
        """See NOTE [What a sample on CUDA is]."""
        milliseconds = 0.0
        for _ in range(repeats):
            self.flush()
            self.synchronise()
            self._begin.record()
            call()
            self._end.record()
            self._end.synchronize()
            milliseconds += self._begin.elapsed_time(self._end)
        return milliseconds / repeats / 1e3

    def peak_memory(self, call: Call) -> float | None:
        """MiB that a call adds at its peak, by the count of the caching allocator."""
        gc.collect()
        self._cuda.reset_peak_memory_stats(self.tensors)
        before = self._cuda.memory_allocated(self.tensors)
        result = call()
        self.synchronise()
        del result
        return (self._cuda.max_memory_allocated(self.tensors) - before) / 2**20

    @functools.cached_property
    def copy_bandwidth(self) -> float | None:
        """Of a device-to-device copy far larger than the L2, timed as every call is."""
        source = torch.zeros(self._backend.copy_bytes, dtype=torch.uint8, device=self.tensors)
        target = torch.empty_like(source)
        copy = lambda: target.copy_(source)
        for _ in range(self.warm_up_calls):
            copy()
        return 2 * source.numel() / statistics.median(self.sample(copy, 1) for _ in range(11))

    def kernels(self, call: Call) -> Kernels | None:
        """None where the profiler is denied the device's events, as it is to users without the permission in some set-ups."""
        if not self._sees_kernels:
            return None
        runs = [self._seen(call) for _ in range(KERNEL_RUNS)]
        most = max(runs, key=lambda r: r.launches + r.copies)  # a full buffer drops events, it never adds any
        return dataclasses.replace(most, seconds=statistics.median(r.seconds for r in runs))

    @functools.cached_property
    def _sees_kernels(self) -> bool:
        if self._backend.seen_by_nsight:
            return False
        seen = self._seen(self.flush)
        return seen.launches + seen.copies > 0

    def _seen(self, call: Call) -> Kernels:
        self.flush()
        self.synchronise()
        with self._profile(activities=list(self.activities)) as profile:
            call()
            self.synchronise()
        work = device_work(profile)
        launches = sum(not is_copy(e) for e in work)
        return Kernels(launches, len(work) - launches, sum(e.time_range.elapsed_us() for e in work) * 1e-6)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        self._cuda.nvtx.range_push(name)
        try:
            with super().span(name):
                yield
        finally:
            self._cuda.nvtx.range_pop()

    @property
    def _profile(self) -> Callable[..., Any]:
        return self._backend.profile

    def stamp(self) -> dict[str, Any]:
        p = self._properties
        return super().stamp() | {
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory GiB": round(p.total_memory / 2**30, 1),
            "L2 MiB": round(p.L2_cache_size / 2**20, 1),
            "CUDA": torch.version.cuda,
            "driver": _driver(),
            "copy GB/s": round(self.copy_bandwidth / 1e9, 1),
        }


def open_device(name: str, *, seen_by_nsight: bool = False) -> Device:
    """'cpu' or 'cuda'; raises DeviceError where there is no such device."""
    return Device() if name == "cpu" else CudaDevice(Backend(seen_by_nsight=seen_by_nsight))


def device_work(profile: Any) -> list[Any]:
    """The events of a profile that are work of the device: kernels, copies and fills.

    Ranges that a person or a compiler named stand among the device's events too, around the kernels.
    """
    return [e for e in profile.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]


def is_copy(event: Any) -> bool:
    """Whether work of the device is a copy or a fill, by the name that CUPTI gives it."""
    return event.name.startswith(("Memcpy", "Memset"))


def _trim() -> None:
    """Hands back what the allocator keeps, which would serve the next call without a trace in the resident set."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _status_mib(field: str) -> float:
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    raise OSError(field)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _driver() -> str:
    """The driver's version; PyTorch tells only the CUDA version that the driver supports."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (no nvidia-smi)"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.split("\n")[0].strip() if answer.returncode == 0 else f"unknown (nvidia-smi: exit {answer.returncode})"
