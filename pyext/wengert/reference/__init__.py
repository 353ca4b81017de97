"""Plain-torch twins of wengert's kernels: slow, obvious, and the oracle the tests compare with."""

from .fused import PRIMITIVES, evaluate, parse

__all__ = ["PRIMITIVES", "evaluate", "parse"]
