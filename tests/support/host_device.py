"""The CPU in the place of a device that launches kernels: the reference evaluates nests, and what was asked for is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from wengert import _C, reference
from wengert.reference.fused import DTYPES

from support.ptx_device import memory_at


def view(address: int, dtype: str, strides: Sequence[int], extents: Sequence[int]) -> Tensor:
    kind = DTYPES[dtype]
    if 0 in extents:
        return torch.empty(tuple(extents), dtype=kind)
    reach = sum((extent - 1) * stride for extent, stride in zip(extents, strides))
    assert all(stride >= 0 for stride in strides), "these tests have no reversed windows"
    flat = torch.from_numpy(np.asarray(memory_at(address, (reach + 1) * kind.itemsize))).view(kind)
    return flat.as_strided(tuple(extents), tuple(strides))


@contextlib.contextmanager
def launching_device() -> Iterator[list[str]]:
    """Gives the texts of the programs that were evaluated.  The library's own kernels must not be needed."""
    texts: list[str] = []

    def evaluate(text: str, extents: list[int], operands: list[tuple], outputs: list[tuple]) -> None:
        texts.append(text)
        inputs = [view(*window, extents) for window in operands]
        results = reference.evaluate(inputs, text)
        for (address, dtype, strides, accumulate), result in zip(outputs, results, strict=True):
            sizes = [extent if size == extent else 1 for size, extent in zip(result.shape, extents)]
            target = view(address, dtype, [s if size > 1 else 0 for s, size in zip(strides, sizes)], sizes)
            target.copy_(target + result if accumulate else result.expand(sizes))

    def launch(plan: dict, memory: list) -> None:
        raise AssertionError(f"{plan['entry']} was launched")

    _C.evaluate_with(evaluate, launch)
    try:
        yield texts
    finally:
        _C.evaluate_with(None)
