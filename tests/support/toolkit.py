"""Programs of the CUDA toolkit, which tests use where it is installed."""

from __future__ import annotations

import os
import shutil
import sysconfig


def find_tool(name: str) -> str | None:
    """On the path, where CUDA_HOME or the toolkit's usual folder has it, or among what PyTorch's CUDA packages bring."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    triton = os.path.join(sysconfig.get_path("purelib"), "triton/backends/nvidia/bin")
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join([f"{home}/bin", triton]))
