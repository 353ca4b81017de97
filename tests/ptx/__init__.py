"""Runs the PTX of CUDA kernels on the CPU, to test their results where there is no GPU."""

from .execute import entries, global_array, run, unsupported
from .parse import PtxError, Unsupported

__all__ = ["PtxError", "Unsupported", "entries", "global_array", "run", "unsupported"]
