"""What PyTorch expects of an op on a GPU: streams, graphs, devices, no waiting; and what the engine launches there."""

import os
import subprocess
import sys

import pytest
import torch
import wengert
from support.launches import kernels_of
from support.long_programs import agree_relatively, product_of_sines, values
from torch import Tensor
from wengert import reference

SQUARE = "fused v1 rank=1 operands=1 compute=f32\nt0 = square a0\nout t0 f32\n"


def test_values_and_streams(gpu):
    x = torch.randn(1000, 37, device="cpu")
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


def test_operands_beyond_a_kernels_parameters_in_a_cuda_graph(gpu):
    """What is written to memory first is part of the graph, and nothing waits for it."""
    with torch.device("cpu"):
        text, given = product_of_sines(3000), values(3000, (64,))
    operands = [x.to(gpu) for x in given]
    torch.ops.wengert.fused(operands, text)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        (result,) = torch.ops.wengert.fused(operands, text)
    operands[1].mul_(0.5)
    graph.replay()
    expected = reference.evaluate([x.cpu() for x in operands], text)[0]
    agree_relatively(result.cpu(), expected)
    try:
        torch.cuda.set_sync_debug_mode("error")
        torch.ops.wengert.fused(operands, text)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = kernels_of(lambda: torch.ops.wengert.fused(operands, text))
    assert sorted(names) == ["wengert_map", "wengert_table", "wengert_table"]


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
    x = torch.randn(8, device="cpu")
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


# ------------------------------------------------------------------------------------------------------------------- the engine
def chain(x: Tensor, length: int) -> Tensor:
    for _ in range(length):
        x = x.cos()
    return x


def cart_pole(state: Tensor) -> Tensor:
    _, v, angle, spin = state.unbind(-1)
    sin, cos = angle.sin(), angle.cos()
    push = 0.05 * spin.square() * sin
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos.square()))
    return torch.stack([v, push - 0.05 * turn * cos, spin, turn], -1)


@pytest.mark.parametrize("length", [1, 6, 20, 60, 300])
def test_a_pointwise_jacobian_is_one_kernel_and_a_fill(gpu, length):
    x = torch.linspace(0.1, 0.9, 1000, device=gpu, requires_grad=True)
    y = chain(x, length)
    kernels = kernels_of(lambda: wengert.jacobian(y, x))
    assert len([k for k in kernels if "wengert" in k]) == 1
    assert len(kernels) <= 2


def test_the_gradient_of_a_chain_is_one_kernel(gpu):
    x = torch.linspace(0.1, 0.9, 1000, device=gpu, requires_grad=True)
    y = chain(x, 6)
    ct = torch.ones_like(y)
    assert kernels_of(lambda: wengert.grad(y, x, ct, retain_graph=True)) == ["wengert_map"]


def test_a_batched_cart_pole_jacobian_is_two_kernels_at_most(gpu):
    state = torch.rand(1000, 4, device=gpu, requires_grad=True)
    forward = kernels_of(lambda: cart_pole(state))
    kernels = kernels_of(lambda: wengert.batch_jacobian(cart_pole, state))
    assert len(kernels) - len(forward) <= 3, kernels  # and a fill
    assert len([k for k in kernels if "wengert" in k]) <= 2


MLP = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
CALLS = {
    "pointwise jacobian": (lambda x: wengert.jacobian(torch.tanh, x), (40,)),
    "gradient": (lambda x: wengert.grad(chain(x.requires_grad_(), 6).sum(), x), (40,)),
    "cart-pole": (lambda x: wengert.batch_jacobian(cart_pole, x), (50, 4)),
    "hessian": (lambda x: wengert.hessian(lambda x: (x[1:] - x[:-1].square()).square().sum(), x), (40,)),
    "dense net": (lambda x: wengert.batch_jacobian(MLP.to(x.device), x), (50, 8)),
    "stencil": (lambda x: wengert.jacobian(lambda x: x.roll(1) * x - x.roll(-1).sin(), x), (40,)),
    "softmax": (lambda x: wengert.jacobian(lambda x: x.softmax(-1), x), (5, 8)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_engine_does_not_wait(gpu, name):
    call, shape = CALLS[name]
    x = torch.rand(shape, device=gpu)
    call(x)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        result = call(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = call(x.detach().cpu())
    torch.testing.assert_close(result, expected, check_device=False)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "gradient"])
def test_the_engine_in_a_cuda_graph(gpu, name):
    call, shape = CALLS[name]
    x = torch.rand(shape, device=gpu)
    call(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(x)
    x.copy_(torch.rand(shape))
    graph.replay()
    torch.testing.assert_close(result, call(x))


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_every_time(gpu, name):
    call, shape = CALLS[name]
    x = torch.rand(shape, device=gpu)
    first = call(x)
    for _ in range(3):
        again = call(x)
        for a, b in zip(first if isinstance(first, tuple) else (first,), again if isinstance(again, tuple) else (again,)):
            assert torch.equal(a, b)


def test_another_stream_than_the_default(gpu):
    x = torch.rand(2000, device=gpu)
    expected = wengert.jacobian(torch.sin, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = wengert.jacobian(torch.sin, x)
    stream.synchronize()
    assert torch.equal(result, expected)
