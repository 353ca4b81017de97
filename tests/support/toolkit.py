"""Programs of the CUDA toolkit, which tests use where it is installed."""

from __future__ import annotations

import os
import shutil


def find_tool(name: str) -> str | None:
    """On the path, else where CUDA_HOME or the toolkit's usual folder has it."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")
