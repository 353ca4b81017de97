"""Random nests through their CUDA kernels: extents, layouts, element types, sums and device limits drawn together."""

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import ptx_device

EXTENT = st.sampled_from([1, 2, 3, 4, 5, 8, 12, 16, 33, 64])
MOST = 3000  # elements of a nest: threads are executed one after the other
# how an operand lies in memory: broadcast axes, order of the axes, steps, and elements before the first
OPERAND = st.tuples(
    st.sampled_from(["f32", "f32", "f64", "bf16", "f16", "i32", "u8", "b8"]),
    st.integers(0, 15),
    st.permutations(range(4)),
    st.lists(st.integers(1, 3), min_size=4, max_size=4),
    st.integers(0, 5),
)
# element type, axes that are summed over, order of the axes in memory, elements before the first
OUTPUT = st.tuples(
    st.sampled_from(["f32", "f64", "bf16", "i32"]), st.integers(0, 15), st.permutations(range(4)), st.integers(0, 3)
)
IN_ORDER = [0, 1, 2, 3]
NEST = st.tuples(
    st.lists(EXTENT, min_size=0, max_size=4),
    st.lists(OPERAND, min_size=1, max_size=3),
    st.lists(OUTPUT, min_size=1, max_size=3),
    st.sampled_from(["f32", "f64"]),
    st.booleans(),
    st.sampled_from([{}, {"iterations_per_lane": 1}, {"multiprocessors": 1}, {"narrow_index": 50}]),
)


def laid_out(sizes, dtype, order, steps, offset):
    """An uninitialised view of these sizes whose axes lie in memory in the given order, outer to inner."""
    order = [axis for axis in order if axis < len(sizes)]
    spans = [sizes[axis] * steps[axis] for axis in order]
    memory = torch.zeros(math.prod(spans) + offset, dtype=ptx_device.DTYPES[dtype])[offset:].view(spans)
    view = memory.permute([order.index(axis) for axis in range(len(sizes))])
    return view[tuple(slice(None, None, step) for step in steps[: len(sizes)])]


def operand_of(extents, drawn, seed):
    dtype, broadcast, order, steps, offset = drawn
    sizes = [1 if broadcast >> axis & 1 else extent for axis, extent in enumerate(extents)]
    view = laid_out(sizes, dtype, order, steps, offset)
    values = torch.randint(-8, 9, sizes, generator=torch.Generator().manual_seed(seed))
    return view.copy_(values.abs() if dtype in ("u8", "b8") else values)  # small integers: every sum of them is exact


@settings(deadline=None)
@given(NEST)
@example(([8, 64], [("f32", 0, IN_ORDER, [1] * 4, 0)], [("f32", 0, IN_ORDER, 0), ("f32", 1, IN_ORDER, 0)], "f32", True, {}))
@example(  # a group of narrow elements beside one wide element
    ([4], [("f32", 0, IN_ORDER, [1] * 4, 0), ("f64", 1, IN_ORDER, [1] * 4, 0)], [("f32", 0, IN_ORDER, 0)], "f32", False, {})
)
def test_agrees_with_the_cpu_kernel(nest):
    extents, operands, outputs, compute, accumulate, limits = nest
    while math.prod(extents) > MOST:
        extents = [max(1, extent // 2) for extent in extents]
    views = [operand_of(extents, drawn, seed) for seed, drawn in enumerate(operands)]
    extents = list(torch.broadcast_shapes([1] * len(extents), *(view.shape for view in views)))
    lines = [f"fused v1 rank={len(extents)} operands={len(views)} compute={compute}"]
    lines += [f"t0 = mul a0 a{len(views) - 1}", "t1 = add t0 a0", f"t2 = maximum t1 a{len(views) // 2}"]
    targets = []
    for which, (dtype, reduced, order, offset) in enumerate(outputs):
        axes = [axis for axis in range(len(extents)) if reduced >> axis & 1]
        lines.append(f"out t{which} {dtype}" + (f" sum={','.join(map(str, axes))}" if axes else ""))
        sizes = [1 if axis in axes else extent for axis, extent in enumerate(extents)]
        targets.append(laid_out(sizes, dtype, order, [1 + which] * 4, offset).fill_(3))
    text = "\n".join(lines) + "\n"
    evaluation = ptx_device.evaluate(text, views, targets, accumulate=accumulate, order=len(extents) % 3, **limits)
    expected = torch.ops.wengert.fused(views, text)
    for mine, theirs in zip(evaluation.results, expected, strict=True):
        wanted = theirs.double() + (3 if accumulate else 0)
        # bf16 rounds the sum and the values it is made of
        torch.testing.assert_close(mine.double(), wanted, rtol=2**-7 if mine.dtype == torch.bfloat16 else 0, atol=0)
    assert evaluation.plan["bytes"] >= evaluation.plan["minimum_bytes"]
