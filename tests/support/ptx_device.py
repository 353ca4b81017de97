"""``wengert::fused`` by way of its CUDA kernels, without a GPU: plan, compile to PTX, execute the PTX on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from ptx import run
from torch import Tensor
from wengert import _C
from wengert._native import find_nvrtc
from wengert.reference import parse
from wengert.reference.fused import DTYPES

cuda = _C.cuda

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ARCH = 80  # the oldest architecture that is built for; its PTX runs on all later ones


@functools.cache
def nvrtc() -> str:
    path = find_nvrtc()
    if path is None:
        raise RuntimeError("nvidia-cuda-nvrtc is not installed; `pip install -r requirements.txt` brings it")
    cuda.set_nvrtc(path)
    return path


@dataclass
class Evaluation:
    results: list[Tensor]
    plan: dict
    ptx: list[str] = field(default_factory=list)  # of each launch


def window(view: Tensor) -> list[int]:
    """Strides as the op gives them: 0 along axes of size 1."""
    return [0 if size == 1 else stride for size, stride in zip(view.shape, view.stride())]


def make_plan(text: str, operands: Sequence[Tensor], outputs: Sequence[Tensor], accumulate: bool = False, **limits: int) -> dict:
    program = parse(text)
    extents = list(torch.broadcast_shapes((1,) * program.rank, *(operand.shape for operand in operands)))
    return cuda.plan(
        text,
        extents,
        [(x.data_ptr(), NAMES[x.dtype], window(x)) for x in operands],
        [(y.data_ptr(), NAMES[y.dtype], list(y.stride()), accumulate) for y in outputs],
        limits,
    )


def new_outputs(text: str, operands: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of the op's shapes, full of what no kernel of a test computes."""
    program = parse(text)
    shape = torch.broadcast_shapes((1,) * program.rank, *(operand.shape for operand in operands))
    sizes = [[1 if k in axes else size for k, size in enumerate(shape)] for _, _, axes in program.outputs]
    return [torch.full(size, 113, dtype=torch.uint8).to(dtype) for size, (_, dtype, _) in zip(sizes, program.outputs)]


def aligned(count: int, alignment: int = 256) -> Tensor:
    """Bytes of memory that hold no numbers: whatever is read before it is written is a nan."""
    memory = torch.full((count + alignment,), 255, dtype=torch.uint8)
    start = -memory.data_ptr() % alignment
    return memory[start : start + count]


def execute(plan: dict, memory: Sequence[Tensor | np.ndarray], order: int = 0, seed: int = 0) -> list[str]:
    """Runs the launches of a plan; `memory` is all that kernels may touch, beside the workspace."""
    nvrtc()
    workspace = aligned(plan["workspace_bytes"])
    texts = []
    for launch in plan["launches"]:
        parameters = bytearray(launch["parameters"])
        for position in launch["workspace_pointers"]:
            (offset,) = struct.unpack_from("<Q", parameters, position)
            struct.pack_into("<Q", parameters, position, workspace.data_ptr() + offset)
        texts.append(cuda.compile(launch["source"], ARCH, "ptx").decode())
        run(
            texts[-1],
            launch["entry"],
            [bytes(parameters)],
            launch["grid"],
            launch["block"],
            shared_bytes=launch["shared_bytes"],
            memory=[*memory, workspace],
            order=order,
            seed=seed,
        )
    return texts


def evaluate(
    text: str,
    operands: Sequence[Tensor],
    outputs: Sequence[Tensor] | None = None,
    *,
    accumulate: bool = False,
    order: int = 0,
    seed: int = 0,
    **limits: int,
) -> Evaluation:
    """The op's results, or `outputs` written to (added to, with accumulate)."""
    operands = [operand.detach() for operand in operands]
    results = list(outputs) if outputs is not None else new_outputs(text, operands)
    plan = make_plan(text, operands, results, accumulate, **limits)
    return Evaluation(results, plan, execute(plan, [*operands, *results], order, seed))


def memory_at(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))


def hull(address: int, dtype: str, strides: Sequence[int], extents: Sequence[int]) -> np.ndarray:
    """The memory from the first to the last element of a window: all that a kernel may touch there."""
    reach = [(extent - 1) * stride for extent, stride in zip(extents, strides)]
    low, high = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach)
    item = DTYPES[dtype].itemsize
    return memory_at(address + low * item, (high - low + 1) * item)


StaticLauncher = Callable[[dict, Sequence[np.ndarray]], None]


@contextlib.contextmanager
def evaluating_nests(launch_static: StaticLauncher | None = None) -> Iterator[list[int]]:
    """Within the block every nest on CPU memory is evaluated by its CUDA kernels; gives the number of launches of each.

    With `launch_static`, which executes a launch on the memory that it may touch, the engine also plans the kernels that nvcc
    compiles, as it does for a GPU.
    """
    launches: list[int] = []

    def evaluate_nest(text: str, extents: list[int], operands: list[tuple], outputs: list[tuple]) -> None:
        plan = cuda.plan(text, extents, operands, outputs)
        launches.append(len(plan["launches"]))
        if not plan["launches"]:
            return
        memory = [hull(*window, extents) for window in operands] if math.prod(extents) else []
        for (address, dtype, strides, _), (_, _, axes) in zip(outputs, parse(text).outputs):
            kept = [1 if k in axes else extent for k, extent in enumerate(extents)]
            if math.prod(kept):
                memory.append(hull(address, dtype, strides, kept))
        execute(plan, memory)

    def launch(plan: dict, touched: list[tuple[int, int]]) -> None:
        launch_static(plan, [memory_at(address, count) for address, count in touched if count])

    _C.evaluate_with(evaluate_nest, None if launch_static is None else launch)
    try:
        yield launches
    finally:
        _C.evaluate_with(None)
