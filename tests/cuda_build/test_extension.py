"""The extension as it was linked: it loads without a GPU, and PyTorch knows its CUDA kernels."""

import os
import subprocess
import sys

import pytest
import torch
from wengert import _C


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
