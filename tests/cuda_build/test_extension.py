"""The extension as it was linked: it loads without a GPU, and PyTorch knows its CUDA kernels."""

import os
import subprocess
import sys

import pytest
import torch
import wengert
from wengert import _C

SQUARE = "fused v1 rank=1 operands=1 compute=f32\nt0 = square a0\nout t0 f32\n"


def test_the_op_has_a_kernel_for_cuda(cuda_build):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("wengert::fused", "CUDA")
    assert _C.can_evaluate("cuda")


def test_a_build_for_the_cpu_has_none():
    from wengert import _build_info

    if _build_info.CUDA:
        pytest.skip("wengert was built with CUDA")
    assert not _C.can_evaluate("cuda")


def test_importing_touches_no_gpu(cuda_build):
    """A process that only imports wengert may still fork and set the visible devices."""
    code = "import torch, wengert; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.stdout == "False\n", done.stderr


def test_the_compiler_of_pytorchs_dependencies_is_found(cuda_build):
    """As the first launch of a process does, without anybody having said where it is."""
    code = "from wengert import _C; print(len(_C.cuda.compile('extern \"C\" __global__ void k() {}', 80, 'cubin')) > 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.stdout == "True\n", done.stderr


# --------------------------------------------------------------------------------------------------------------------- with a GPU
def test_values_and_streams(gpu):
    x = torch.randn(1000, 37)
    two = SQUARE.replace("rank=1", "rank=2")
    (expected,) = torch.ops.wengert.fused([x], two)
    (here,) = torch.ops.wengert.fused([x.to(gpu)], two)
    torch.testing.assert_close(here.cpu(), expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        (there,) = torch.ops.wengert.fused([x.to(gpu).t()], two)
    stream.synchronize()
    torch.testing.assert_close(there.cpu(), expected.t())


def test_a_launch_does_not_wait(gpu):
    x = torch.randn(4096, 513, device=gpu)
    text = "fused v1 rank=2 operands=1 compute=f32\nt0 = square a0\nout t0 f32 sum=0,1\nout t0 f32 sum=1\n"
    torch.ops.wengert.fused([x], text)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        torch.ops.wengert.fused([x], text)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graphs(gpu):
    x = torch.zeros(4096, 513, device=gpu)
    text = "fused v1 rank=2 operands=1 compute=f32\nt0 = square a0\nout t0 f32 sum=0,1\nout t0 f32\n"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # compiles and loads while it captures
        total, values = torch.ops.wengert.fused([x], text)
    x.copy_(torch.randn(4096, 513))
    graph.replay()
    torch.testing.assert_close(values, x.square())
    torch.testing.assert_close(total[0, 0], x.square().sum())


def test_several_devices(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x = torch.randn(1000, device="cuda:1")
    with torch.cuda.device(0):
        (y,) = torch.ops.wengert.fused([x], SQUARE)
        assert torch.cuda.current_device() == 0
    assert y.device == x.device
    torch.testing.assert_close(y, x.square())
    with pytest.raises(ValueError, match="operand 1 is on cuda:0, operand 0 on cuda:1; all have to be on one device"):
        torch.ops.wengert.fused([x, x.to("cuda:0")], SQUARE.replace("operands=1", "operands=2"))


def test_mixed_devices_are_refused(gpu):
    x = torch.randn(8)
    with pytest.raises(ValueError, match="all have to be on one device"):
        torch.ops.wengert.fused([x, x.to(gpu)], SQUARE.replace("operands=1", "operands=2"))


def test_without_a_compiler_pytorch_answers_with_one_warning(gpu):
    """The op says what is missing; a derivative is PyTorch's own."""
    code = f"""
import torch, wengert
from wengert import _C
_C.cuda.set_nvrtc("/nowhere/libnvrtc.so")
x = torch.randn(8, device="cuda", requires_grad=True)
try:
    torch.ops.wengert.fused([x.detach()], {SQUARE!r})
except RuntimeError as error:
    assert "NVRTC" in str(error), error
else:
    raise AssertionError("no error")
for _ in range(2):
    torch.testing.assert_close(wengert.jacobian(x.square(), x), torch.diag(2 * x.detach()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("leaves the work to PyTorch") == 1


def test_native_on_the_gpu(gpu):
    x = torch.randn(64, device=gpu, requires_grad=True)
    wengert.reset_stats()
    wengert.jacobian(x.sin(), x)
    assert sum(wengert.stats().native.values()) == 1
