"""The engine on the CUDA kernels' PTX: every nest of the zoo is planned, compiled and executed as on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
import wengert
from problems import LIBRARY
from support import ptx_device
from support.engine_zoo import CASES, PROBLEMS, check_case, check_problem
from support.zoo import Source


@pytest.fixture
def nests():
    ptx_device.nvrtc()
    with ptx_device.evaluating_nests() as launches:
        yield launches


# Second derivatives meet many more programs, each of which takes NVRTC a tenth of a second: one case has 331 of them.
MANY_PROGRAMS = {"dynamics-pendulum, two RK4 steps"}
SECOND = [name for name in CASES if name not in MANY_PROGRAMS or os.environ.get("WENGERT_PTX") == "all"]


@pytest.mark.parametrize("name", CASES)
def test_jacobians_of_the_zoo(name, nests):
    check_case(name, "jacobian")


@pytest.mark.parametrize("name", PROBLEMS)
def test_jacobians_of_the_benchmark_problems(name, nests):
    check_problem(name)


@pytest.mark.parametrize("name", SECOND)
def test_hessians_of_the_zoo(name, nests):
    check_case(name, "hessian")


# ---------------------------------------------------------------------------------------------------------------- launch counts
def chain(x, length):
    for _ in range(length):
        x = torch.sin(x) * 1.5 + 0.25
    return x


@pytest.mark.parametrize("length", (1, 2, 6, 20))
def test_pointwise_jacobian_is_one_launch(length, nests):
    x = torch.linspace(0.1, 1, 64, requires_grad=True)
    y = chain(x, length)
    nests.clear()
    wengert.jacobian(y, x)
    assert nests == [1]


def test_gradient_of_six_operations_is_one_launch(nests):
    fn, x = LIBRARY["chain"].build(Source(torch.float32), Source(torch.float32).positive, 256)
    x = x.requires_grad_()
    y = fn(x).sum()
    nests.clear()
    wengert.grad(y, x)
    assert nests == [1]


@pytest.mark.parametrize("form", ("batch_jacobian", "vmap"))
def test_batched_cartpole_jacobian_takes_two_launches_at_most(form, nests):
    fn, x = LIBRARY["cartpole"].build(Source(torch.float32), Source(torch.float32).positive, 64)
    transformed = wengert.func.vmap(wengert.func.jacrev(fn))
    nests.clear()
    wengert.batch_jacobian(fn, x) if form == "batch_jacobian" else transformed(x)
    assert 1 <= sum(nests) <= 2


def test_several_launches_are_counted(nests):
    """What the counts above rest on."""
    x = torch.rand(40, 30, requires_grad=True)
    y = (x.sin().sum(1).cos() * x[:, 0]).sum()
    nests.clear()
    wengert.grad(y, x)
    assert sum(nests) >= 2


FAILURES = {
    "compile": wengert._C.cuda.CompileError("NVRTC: error: no such thing"),
    "load": wengert._C.cuda.KernelUnavailable("cudaErrorNoKernelImageForDevice: no such thing"),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("static", [False, True], ids=["a nest's", "the library's"])
def test_falls_back_with_one_warning_where_there_is_no_kernel(kind, static):
    """In a process of its own: the warning is given once in each."""
    code = f"""
import warnings
import torch, wengert

def fail(*_):
    raise wengert._C.cuda.{type(FAILURES[kind]).__name__}({str(FAILURES[kind])!r})

x = torch.linspace(0.1, 1, 7, requires_grad=True)
y = 3 * x if {static} else x.sin() * x
wengert._C.evaluate_with(fail, fail if {static} else None)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    first, second = (wengert.jacobian(y, x) for _ in range(2))
    (g,) = wengert.grad(y.sum(), x, create_graph=True)
assert sum("no such thing" in str(warning.message) for warning in seen) == 1, [str(warning.message) for warning in seen]
(expected,) = torch.autograd.grad(y.sum(), x, create_graph=True)
for ours in (first, second, torch.diag(g)):
    torch.testing.assert_close(ours, torch.diag(expected))
assert set(wengert.stats().fallback["jacobian"]) == {{"a CUDA kernel that cannot be compiled, loaded or launched"}}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
