"""The timer on CUDA, against a fake clock: what is in a sample, what is counted, and what the figures are made of."""

import contextlib
import math
import os
import types

import device as device_module
import pytest
import torch
from device import Backend, CudaDevice, Device, DeviceError
from fake_cuda import COPY_BYTES, FLUSH, MIB, RECORD, FakeCuda, FakeDevice
from rows import Peer, Prepared, Row, compiled_peer, prepare
from timer import measure

ROW = ("row", None)
LIMITS = (0.01, 1e-6)  # seconds, tolerance


@pytest.fixture
def cuda():
    return FakeCuda()


@pytest.fixture
def device(cuda):
    return FakeDevice(cuda)


@pytest.mark.parametrize("host, busy, expected", [(0.1, 0.02, 0.12), (0.001, 0.5, 0.501), (0.0, 0.0, RECORD)])
def test_a_sample_holds_the_hosts_and_the_devices_time_but_not_the_flush(cuda, device, host, busy, expected):
    """Were the device not drained first, a host slower than the flush would look faster by FLUSH."""
    assert FLUSH < 0.1

    def call():
        cuda.launch(host=host)
        cuda.launch(device=busy)

    for repeats in (1, 3):
        assert device.sample(call, repeats) == pytest.approx(expected)


def test_every_sampled_call_finds_the_l2_overwritten_and_the_device_idle(cuda, device):
    seen = []

    def call():
        seen.append((int(device._flushed.sum()), cuda.idle_at > cuda.now))
        device._flushed.fill_(1)

    device.sample(call, 4)
    assert seen == [(0, False)] * 4


def test_the_flush_covers_the_l2_however_large(cuda):
    cuda.get_device_properties = lambda device: types.SimpleNamespace(L2_cache_size=1000)
    assert FakeDevice(cuda)._flushed.numel() == 4000


def test_first_calls_are_timed_to_their_end(cuda, device):
    result, seconds = device.timed(lambda: cuda.launch(host=0.25, device=0.5) or "result")
    assert (result, seconds) == ("result", 0.75)


def test_copy_bandwidth_counts_reading_and_writing(device):
    assert device.copy_bandwidth == pytest.approx(2 * COPY_BYTES / RECORD)


def test_peak_memory_is_what_the_call_adds(cuda, device):
    cuda.allocated = 5 * MIB
    cuda.peak = 100 * MIB  # of something earlier
    assert device.peak_memory(lambda: cuda.launch(memory=3 * MIB)) == 3


def test_kernels_copies_and_fills_are_counted_apart_and_named_ranges_not_at_all(cuda, device):
    def call():
        for name in ("wengert_map", "Memset (Device)", "wengert_sum", "Memcpy DtoD (Device -> Device)"):
            cuda.launch(name, host=1.0, device=0.25)

    found = device.kernels(call)
    assert (found.launches, found.copies, found.seconds) == (2, 2, pytest.approx(1.0))


def test_the_real_profilers_events_have_what_is_read():
    with torch.profiler.profile(activities=list(Device.activities)) as profile:
        torch.ones(3).sin()
    (event,) = [e for e in profile.events() if e.name == "aten::sin"]
    assert event.device_type == torch.autograd.DeviceType.CPU and event.time_range.elapsed_us() > 0
    assert not event.is_user_annotation


def test_events_that_the_profiler_dropped_do_not_lower_the_count(cuda, device):
    dropped = iter([0, 2, 1, 0, 0])
    call = lambda: [cuda.launch() for _ in range(3 - next(dropped))]
    assert device.kernels(call).launches == 3


def test_a_profiler_that_sees_no_device_gives_no_count_rather_than_zero(cuda):
    blind = lambda activities: contextlib.nullcontext(types.SimpleNamespace(events=list))
    assert FakeDevice(cuda, profile=blind).kernels(cuda.launch) is None


def test_under_nsight_nothing_is_profiled(cuda):
    assert FakeDevice(cuda, seen_by_nsight=True).kernels(cuda.launch) is None
    assert cuda.profiles == 0


def test_spans_nest_and_close_when_a_call_raises(cuda, device):
    with pytest.raises(ZeroDivisionError), device.span("outer"), device.span("inner"):
        1 / 0  # noqa: B018
    assert cuda.ranges == [("outer",), ("outer", "inner")]
    assert cuda.open_ranges == []


def scripted(cuda, host, kernels=1, value=1.0):
    """A call that costs the host so much, launches so many kernels of a tenth of that, and returns ten numbers."""
    result = torch.full((10,), value)

    def call():
        cuda.launch(host=host)
        for _ in range(kernels - 1):
            cuda.launch()
        return result

    return call


def test_a_rows_figures(cuda, device):
    """40 bytes in, 40 out, in 9 ms plus the event's millisecond: 8000 B/s, of the copy's 2e9."""
    peers = [Peer("slow", scripted(cuda, 0.049, kernels=7)), Peer("fast", scripted(cuda, 0.019, kernels=4))]
    peers.append(Peer("for orientation", scripted(cuda, 0.004), counted=False))
    found = measure(*ROW, Prepared(scripted(cuda, 0.009, kernels=2), peers, input_bytes=40), device, *LIMITS)
    assert found.fastest == "fast"
    assert (found.ratio, found.low, found.high) == (pytest.approx(2), pytest.approx(2), pytest.approx(2))
    assert found.ours.seconds == pytest.approx(0.01)
    assert [p.seconds for p in found.peers] == [pytest.approx(0.05), pytest.approx(0.02), pytest.approx(0.005)]
    assert found.ours.kernels.launches == 2
    assert [p.kernels and p.kernels.launches for p in found.peers] == [None, 4, None]
    assert found.bytes == 80
    assert found.bandwidth == pytest.approx(8000)
    assert found.share_of_copy == pytest.approx(4e-6)


@pytest.mark.parametrize("input_bytes, reads, expected", [(None, False, None), (0, False, 40), (8, True, 88)])
def test_minimum_bytes(cuda, device, input_bytes, reads, expected):
    def call():
        result = scripted(cuda, 0.01)()
        return (result, result.sum()) if reads else result

    found = measure(*ROW, Prepared(call, [Peer("peer", call)], input_bytes, reads), device, *LIMITS)
    assert found.bytes == expected
    assert (found.bandwidth is None) == (found.share_of_copy is None) == (expected is None)


@pytest.mark.parametrize("wrong", [2.0, math.nan])
def test_a_wrong_peer_is_named_and_nothing_is_timed(cuda, device, wrong):
    peers = [Peer("right", scripted(cuda, 0.01)), Peer("wrong", scripted(cuda, 0.01, value=wrong))]
    with pytest.raises(AssertionError, match=r"^wengert differs from wrong by .*; nothing was timed$"):
        measure(*ROW, Prepared(scripted(cuda, 0.01), peers), device, *LIMITS)
    assert cuda.events_recorded == 0


def test_a_peer_that_cannot_run_is_noted_and_the_others_are_timed(cuda, device):
    def broken():
        raise NotImplementedError("no such kernel\nand a long story")

    peers = [Peer("broken", broken), Peer("peer", scripted(cuda, 0.01))]
    found = measure(*ROW, Prepared(scripted(cuda, 0.01), peers), device, *LIMITS)
    assert found.peers[0].note == "NotImplementedError: no such kernel"
    assert found.peers[0].seconds == math.inf
    with pytest.raises(RuntimeError, match="no peer ran: broken: NotImplementedError"):
        measure(*ROW, Prepared(scripted(cuda, 0.01), peers[:1]), device, *LIMITS)


def test_a_far_slower_peer_is_timed_once_and_a_far_faster_uncounted_one_excludes_nobody(cuda, device):
    peers = [Peer("peer", scripted(cuda, 0.999)), Peer("loop", scripted(cuda, 49.999))]
    peers.append(Peer("orientation", scripted(cuda, 0.009), counted=False))
    found = measure(*ROW, Prepared(scripted(cuda, 0.01), peers), device, *LIMITS)
    assert [p.note for p in found.peers] == ["", "timed once", ""]
    assert found.fastest == "peer"


def test_a_slow_first_call_does_not_make_a_peer_look_hopeless(cuda, device):
    costs = iter([0.9])
    slow_start = lambda: cuda.launch(host=next(costs, 0.0)) or torch.ones(10)
    peers = [Peer("peer", scripted(cuda, 0.001)), Peer("slow start", slow_start)]
    found = measure(*ROW, Prepared(scripted(cuda, 0.001), peers), device, *LIMITS)
    assert [p.note for p in found.peers] == ["", ""]
    assert found.fastest == "slow start"


def test_compiling_does_not_make_a_peer_look_hopeless(cuda, device, monkeypatch):
    def compiler(call):
        costs = iter([1000.0])
        return lambda *arguments: cuda.launch(host=next(costs, 0.0)) or call(*arguments)

    monkeypatch.setattr(torch, "compile", compiler)
    fast = compiled_peer("peer", lambda x: scripted(cuda, 0.004)() * x, 1.0)
    found = measure(*ROW, Prepared(scripted(cuda, 0.01), [Peer("peer", scripted(cuda, 0.01)), fast]), device, *LIMITS)
    assert (found.peers[1].name, found.peers[1].note) == ("compiled peer", "")
    assert found.peers[1].seconds == pytest.approx(0.005)


FORMS = [("functional", "pointwise", 12, 48), ("batch", "mlp", 4, 4 * (12 + 3 * 64 + 64 * 64 + 64)), ("grad", "chain", 12, 48)]


@pytest.mark.parametrize("form, problem, size, expected", FORMS)
def test_rows_state_the_bytes_they_read(form, problem, size, expected):
    assert prepare(Row(problem, size, form), torch.device("cpu")).input_bytes == expected
    assert prepare(Row("pointwise", 12, "graph"), torch.device("cpu")).input_bytes is None


def test_without_a_gpu_the_message_says_what_this_pytorch_is():
    cuda = FakeCuda()
    cuda.is_available = lambda: False
    with pytest.raises(DeviceError, match=f"torch {torch.__version__}".replace("+", r"\+")):
        CudaDevice(Backend(cuda=cuda))


@pytest.mark.parametrize(
    "script, expected", [("echo 580.65.06; echo 580.65.06", "580.65.06"), ("exit 9", "unknown (nvidia-smi: exit 9)")]
)
def test_the_drivers_version(tmp_path, monkeypatch, script, expected):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert device_module._driver() == expected
    monkeypatch.setenv("PATH", "")
    assert device_module._driver() == "unknown (no nvidia-smi)"


def test_the_processor_is_timed_by_its_own_clock():
    ticks = iter([1.0, 7.0])
    calls = []
    assert Device(clock=lambda: next(ticks)).sample(lambda: calls.append(1), 3) == 2.0
    assert len(calls) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    real = CudaDevice(Backend())
    x = torch.zeros(1 << 20, device="cuda")
    call = lambda: x.sin().cos()
    assert real.kernels(call).launches == 2
    assert 0 < real.kernels(call).seconds <= real.sample(call, 10)
    assert real.peak_memory(call) == pytest.approx(8, abs=4)
    assert real.copy_bandwidth > 1e9
