"""Segment sums against index_add in double precision, and bit for bit against the documented order of addition."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor
from wengert import _C

NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


def segments_of(index: Tensor, size: int, dense: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions sorted by target, the segments' starts, and their targets: all of `size`, or (None given) those that occur."""
    order = torch.sort(index, stable=True).indices
    if dense:
        return order, torch.searchsorted(index[order], torch.arange(size + 1)), None
    targets, counts = torch.unique(index, return_counts=True)
    return order, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]), targets


def plan(out: Tensor, values: Tensor, order: Tensor, starts: Tensor, targets: Tensor | None, accumulate: bool) -> dict | None:
    """out[target, ...] (+)= sum of values[position, ...]"""
    return _C.cuda.plan_segment_sum(
        dtype=NAMES[out.dtype],
        values=values.data_ptr(),
        position_stride=values.stride(0),
        order=order.data_ptr(),
        positions=order.numel(),
        starts=starts.data_ptr(),
        targets=0 if targets is None else targets.data_ptr(),
        segments=starts.numel() - 1,
        out=out.data_ptr(),
        target_stride=out.stride(0),
        inner=list(values.shape[1:]),
        value_strides=list(values.stride()[1:]),
        out_strides=list(out.stride()[1:]),
        accumulate=accumulate,
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of a dtype are carried in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lanes(inner: int, positions: int, segments: int) -> tuple[int, int]:
    """Inner lanes and position lanes, as NOTE [Shape of a segment sum] has them."""
    across = min(32, 1 << max(inner - 1, 0).bit_length())
    along = 1
    while across * along < 256 and 8 * along <= positions / max(segments, 1):
        along *= 2
    return across, along


def in_order(values: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """The sums of all segments, added in the order that the kernel documents."""
    rows = values.reshape(values.shape[0], math.prod(values.shape[1:])).to(wide(values.dtype))[order].numpy()
    across, along = lanes(rows.shape[1], len(order), len(starts) - 1)
    sums = np.zeros((len(starts) - 1, along, rows.shape[1]), rows.dtype)
    for s in range(len(starts) - 1):
        segment = rows[starts[s] : starts[s + 1]]
        for p in range(len(segment)):
            sums[s, p % along] += segment[p]
    within = min(along, 32 // across)  # position lanes in a warp: a butterfly, then warp by warp
    sums = sums.reshape(len(sums), along // within, within, rows.shape[1])
    while sums.shape[2] > 1:
        sums = sums[:, :, 0::2] + sums[:, :, 1::2]
    total = sums[:, 0, 0]
    for warp in range(1, along // within):
        total = total + sums[:, warp, 0]
    return torch.from_numpy(total).view(len(total), *values.shape[1:])


def check(execute, values: Tensor, index: Tensor, size: int, dense=True, accumulate=False, out=None, orders=(0, 1, 2)) -> dict:
    order, starts, targets = segments_of(index, size, dense)
    if out is None:
        out = torch.randn(size, *values.shape[1:]).to(values.dtype)
    before = out.clone()
    sums = in_order(values, order, starts)
    expected = before.clone()
    rows = slice(None) if targets is None else targets
    expected[rows] = ((before[rows].to(wide(values.dtype)) if accumulate else 0) + sums).to(values.dtype)
    exact = torch.zeros(out.shape, dtype=torch.float64).index_add_(0, index, values.double())
    exact = exact + before.double() if accumulate else exact
    torch.testing.assert_close(expected[rows].double(), exact[rows], rtol=2e-2, atol=2e-2 if values.dtype.itemsize == 2 else 1e-4)
    for thread_order in orders:
        out.copy_(before)
        launch = plan(out, values, order, starts, targets, accumulate)
        memory = [out, values, order, starts] + ([] if targets is None else [targets])
        execute("segment_sum", launch, memory, thread_order, seed=3)
        assert torch.equal(out, expected)
    return launch


INNER = [(), (1,), (2,), (3,), (8,), (31,), (32,), (33,), (70,), (4, 5)]


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("inner", INNER, ids=str)
def test_shapes(execute, inner, dtype):
    for positions, size in ((1, 1), (5, 9), (200, 7), (100, 1)):
        values, index = torch.randn(positions, *inner).to(dtype), torch.randint(size, (positions,))
        check(execute, values, index, size, orders=(2,))
        check(execute, values, index, size, dense=False, accumulate=True, orders=(1,))


@pytest.mark.parametrize("inner", [(), (3,), (40,)], ids=str)
def test_orders_of_threads(execute, inner):
    """Long segments: lanes of all warps of a block meet in shared memory."""
    for positions, size in ((3000, 1), (1500, 3), (64, 64)):
        check(execute, torch.randn(positions, *inner), torch.randint(size, (positions,)), size)


@pytest.mark.parametrize("inner, positions, group", [
    (1, 70, (1, 1)), (1, 80, (1, 2)), (1, 10**6, (1, 256)), (4, 5000, (4, 64)), (8, 320, (8, 8)), (32, 10, (32, 1)),
    (99, 10**6, (32, 8)),
])  # fmt: skip
def test_groups_follow_from_extents(inner, positions, group):
    """10 segments: the grid shows how many of them share a block of 256 threads, and how many tiles a row has."""
    launch = large(10, [inner], positions)
    assert lanes(inner, positions, 10) == group
    assert launch["grid"][0] == -(-10 // (256 // (group[0] * group[1]))) * -(-inner // group[0])


def test_some_segments_are_empty_and_one_is_long(execute):
    index = torch.cat([torch.full((500,), 3), torch.tensor([0, 7, 7])])
    for accumulate in (False, True):
        check(execute, torch.randn(503, 2), index, 9, accumulate=accumulate)
    check(execute, torch.randn(503, 2), index, 9, dense=False)


def test_equal_targets_add_in_the_order_of_positions(execute):
    """1 is lost beside 1e8 unless the two large values have met before it."""
    for values, total in (([1.0, 1e8, -1e8, 1.0], 1.0), ([1e8, -1e8, 1.0, 1.0], 2.0)):
        values, out = torch.tensor(values), torch.empty(1)
        order, starts = torch.arange(4), torch.tensor([0, 4])
        execute("segment_sum", plan(out, values, order, starts, None, False), [out, values, order, starts], order=1)
        assert out.item() == total


def test_strides(execute):
    """Values that repeat or lie transposed, and outputs that are windows of larger arrays."""
    index = torch.randint(6, (50,))
    check(execute, torch.randn(7, 50).t(), index, 6)
    check(execute, torch.randn(1, 7).expand(50, 7), index, 6)
    check(execute, torch.randn(50, 1, 1).expand(50, 3, 4), index, 6)
    check(execute, torch.randn(2, 3, 50, 5).permute(2, 1, 3, 0), index, 6)
    window = torch.randn(6, 9, 40)[:, 1:8:2, 3:]
    check(execute, torch.randn(50, 4, 37), index, 6, out=window, accumulate=True)
    transposed = torch.randn(4, 6).t()
    check(execute, torch.randn(50, 4), index, 6, out=transposed)


def test_zero_size(execute):
    none = torch.zeros(0, dtype=torch.int64)
    check(execute, torch.randn(0, 3), none, 5)
    check(execute, torch.randn(0, 3), none, 5, accumulate=True)
    assert check(execute, torch.randn(0, 3), none, 0)["grid"][0] == 0
    launch = check(execute, torch.randn(4, 0), torch.tensor([0, 1, 1, 2]), 3)
    assert launch["grid"][0] == launch["bytes_read"] == launch["bytes_written"] == 0


@pytest.mark.parametrize("accumulate", [False, True])
def test_bytes_are_the_minimum(accumulate):
    """Each value, position and segment read once, each target written once (and read once where it is added to)."""
    positions, size, inner = 1000, 50, 24
    values, out = torch.randn(positions, inner), torch.zeros(size, inner)
    order, starts, _ = segments_of(torch.randint(size, (positions,)), size, True)
    launch = plan(out, values, order, starts, None, accumulate)
    minimum = 4 * positions * inner + 8 * positions + 8 * (size + 1) + 4 * size * inner * (1 + accumulate)
    assert (launch["bytes_read"] + launch["bytes_written"]) / minimum == 1.0


def large(segments: int, inner: list[int], positions: int = 10**9) -> dict | None:
    """A plan whose arrays do not exist."""
    return _C.cuda.plan_segment_sum(
        dtype="f32", values=0, position_stride=math.prod(inner), order=0, positions=positions, starts=0, targets=0,
        segments=segments, out=0, target_stride=math.prod(inner), inner=inner, value_strides=[1] * len(inner),
        out_strides=[1] * len(inner), accumulate=False,
    )  # fmt: skip


def test_large_plans():
    assert large(10**9, [64])["grid"] == (10**9 // 8 * 2, 1, 1)
    assert large(10**9, [64])["bytes_written"] == 256 * 10**9
    assert large(2**33, [1], 2**33)["grid"] == (2**33 // 256, 1, 1)
    assert large(2**34, [64]) is None, "more blocks than a grid has"
    assert large(4, [2**31]) is None, "rows longer than 32-bit positions reach"
    assert large(4, [2, 3, 2, 3, 2]) is None, "five loops"
    with pytest.raises(ValueError, match="differ in number"):
        _C.cuda.plan_segment_sum(
            dtype="f32", values=0, position_stride=1, order=0, positions=1, starts=0, targets=0, segments=1, out=0,
            target_stride=1, inner=[2], value_strides=[], out_strides=[1], accumulate=False,
        )  # fmt: skip


def test_no_atomics(ptx_of):
    assert not re.search(r"\b(atom|red)\.", ptx_of("segment_sum"))
