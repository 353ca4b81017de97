"""Kernels compiled by nvcc: mathematics, memory, cooperation of threads under all orders, and every kind of fault."""

import math
import pathlib
import shutil
import struct
import subprocess

import numpy as np
import pytest
import torch

import ptx

_FOLDER = pathlib.Path(__file__).parent
_KERNELS = (_FOLDER / "kernels.ptx").read_text()
_RNG = np.random.default_rng(0)
f32, f64, i32, i64 = np.float32, np.float64, np.int32, np.int64


def run(kernel, *args, grid=1, block=128, text=_KERNELS, **options):
    ptx.run(text, kernel, args, grid, block, **options)


def fault(kernel, *args, **options):
    """Returns the message of the fault that the kernel must end with."""
    with pytest.raises(ptx.PtxError) as caught:
        run(kernel, *args, **options)
    return str(caught.value)


# Mathematics and memory

_ERF = np.vectorize(math.erf)
_FUNCTIONS = {
    "sin": np.sin,
    "exp": np.exp,
    "log": lambda x: np.log(np.abs(x)),
    "tanh": np.tanh,
    "erf": _ERF,
    "power": lambda x: np.abs(x) ** 1.7,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "root": lambda x: 1 / np.sqrt(np.abs(x) + 1),
}


@pytest.mark.parametrize("kernel", [name for name in ptx.entries(_KERNELS) if name.rsplit("_", 1)[0] in _FUNCTIONS])
def test_mathematics(kernel):
    name, kind = kernel.rsplit("_", 1)
    dtype, tolerance = (f32, 1e-6) if kind == "f32" else (f64, 1e-15)
    x = _RNG.uniform(-8, 8, 1000).astype(dtype)
    x = np.abs(x) if name == "log" else x
    output = np.zeros_like(x)
    run(kernel, i64(x.size), x, output, grid=8)
    np.testing.assert_allclose(output, _FUNCTIONS[name](x.astype(f64)), rtol=4 * tolerance, atol=tolerance)


def test_large_arguments_of_sine():
    """Their reduction takes local arrays, tables in constant memory and multiplications with carries."""
    for kernel, dtype, largest in (("sin_f32", f32, 1e38), ("sin_f64", f64, 1e300)):
        x = np.array([1e5, -3e6, 1e20, largest, np.inf, np.nan, -0.0], dtype)
        output = np.zeros_like(x)
        run(kernel, i64(x.size), x, output, block=32)
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(output, np.sin(x.astype(f64)), rtol=2e-7 if dtype is f32 else 1e-15)


def test_values_and_tensors_as_arguments():
    x, y = torch.randn(300), torch.randn(300)
    expected = 2.5 * x + y
    run("scaled_sum", i32(300), f32(2.5), x, y, grid=3)
    torch.testing.assert_close(y, expected)


def test_half_kernels():
    x, y = (_RNG.standard_normal(100).astype(np.float16) for _ in range(2))
    output = np.zeros_like(x)
    run("half_product", i32(100), x, y, output)
    assert np.array_equal(output, x * y)
    run("half_through_float", i32(100), x, output)
    np.testing.assert_allclose(output, np.exp(x.astype(f32)).astype(np.float16), rtol=1e-3)
    run("half_pairs", i32(50), x, y, output)
    np.testing.assert_allclose(output, x.astype(f64) * y + y, rtol=1e-3, atol=1e-3)
    b = torch.randn(100).bfloat16()
    result = torch.zeros_like(b)
    run("bfloat_through_float", i32(100), b, result)
    torch.testing.assert_close(result, b.float().exp().bfloat16(), rtol=0.01, atol=0)


def test_vector_accesses():
    x = _RNG.standard_normal((50, 4)).astype(f32)
    y = np.zeros_like(x)
    run("vectors_of_4", i32(50), x, y)
    assert np.array_equal(y, np.stack([x[:, 0] * 2, x[:, 1] + 1, -x[:, 2], x[:, 3] ** 2], 1))
    assert "ld.global.nc.v4" in _KERNELS and "st.global.v4" in _KERNELS
    pairs = _RNG.standard_normal((50, 2))
    swapped = np.zeros_like(pairs)
    run("vectors_of_2", i32(50), pairs, swapped)
    assert np.array_equal(swapped, pairs[:, ::-1])
    assert "misaligned access of 16 bytes" in fault("vectors_of_4", i32(3), x.reshape(-1)[1:], y)


def test_small_and_local_memory():
    x, mask = _RNG.integers(-128, 128, 100).astype(np.int8), _RNG.integers(0, 2, 100).astype(np.uint8)
    output = np.zeros(100, np.uint8)
    run("bytes", i32(100), x, mask, output)
    assert np.array_equal(output, np.where(mask, x.astype(int) * 3 + 1 & 255, 0))
    choice, picked = _RNG.integers(0, 100, 100).astype(i32), np.zeros(100, f32)
    run("local_array", i32(100), choice, picked)
    assert np.array_equal(picked, (choice & 7) * f32(1.5) + np.arange(100))


def test_module_variables_last():
    text = _KERNELS + "\n// a module of its own\n"
    output = np.zeros(8, f32)
    run("module_variables", i32(8), output, text=text)
    assert output.tolist() == [6, 7, 8, 9] * 2
    launches = ptx.global_array(text, "module_variables", "launches", i32)
    assert launches.tolist() == [6]
    launches[0] = 100
    run("module_variables", i32(8), output, text=text)
    assert output[0] == 101


def test_grids_of_three_dimensions():
    output = np.zeros((4, 6, 8), f32)
    run("three_dimensions", output, grid=(2, 3, 2), block=(4, 2, 2))
    z, y, x = np.mgrid[:4, :6, :8]
    assert np.array_equal(output, x + 100 * y + 10000 * z)


def test_struct_by_value_with_pointers():
    source = _RNG.standard_normal((4, 5, 6)).astype(f32)
    target = np.zeros((6, 5, 4), f32)
    steps = [stride // 4 for stride in (*source.strides, *target.T.strides)]
    nest = struct.pack("<2Q9qi4x", source.ctypes.data, target.ctypes.data, *source.shape, *steps, 3)
    run("strided_copy", i64(source.size), nest, block=32, grid=2, memory=(source, target))
    assert np.array_equal(target.T, source)
    assert "out-of-bounds read" in fault("strided_copy", i64(source.size), nest, memory=(target,))
    source.flags.writeable = target.flags.writeable = False
    assert "write to read-only memory" in fault("strided_copy", i64(source.size), nest, memory=(source, target))


def test_calls_and_jump_tables():
    x = _RNG.standard_normal(100).astype(f32)
    output = np.zeros_like(x)
    run("calls", i32(100), x, output)
    np.testing.assert_allclose(output, x**2 - 4 * x**2, rtol=1e-5, atol=1e-6)
    choice, i = (np.arange(100) % 7).astype(i32), np.arange(100.0)
    run("jump_table", i32(100), choice, output)
    cases = [np.sqrt(i), i * i, 1 / (i + 1), np.full(100, 7), i - 3, i % 5, np.full(100, -1)]
    np.testing.assert_allclose(output, np.choose(choice, cases), rtol=1e-6)


# Threads together

_ORDERS = pytest.mark.parametrize("order", [0, 1, 2])


@_ORDERS
def test_block_reductions(order):
    x = _RNG.standard_normal(1000).astype(f32)
    output = np.zeros(3, f32)
    run("block_sum", i64(1000), x, output, grid=3, block=160, order=order, seed=7)
    np.testing.assert_allclose(output.sum(dtype=f64), x.sum(dtype=f64), atol=1e-4)
    y, sums = _RNG.integers(0, 100, 512).astype(f64), np.zeros(2)
    run("synchronized_sum", y, sums, grid=2, block=256, shared_bytes=256 * 8, order=order)
    assert np.array_equal(sums, y.reshape(2, 256).sum(1))


def test_missing_synchronization_shows():
    y, expected = np.arange(64.0), np.arange(64.0).sum()
    found = []
    for order in (0, 1, 2):
        sums = np.zeros(1)
        run("unsynchronized_sum", y, sums, block=64, shared_bytes=64 * 8, order=order)
        found.append(sums[0] == expected)
    assert not all(found)


@_ORDERS
def test_warp_operations(order):
    x = _RNG.integers(-9, 10, 64).astype(i32)
    ballots, totals, sources = np.zeros(2, np.uint32), np.zeros(2, i32), np.zeros(64, i32)
    run("warp_operations", x, ballots, totals, sources, block=64, order=order)
    warps = x.reshape(2, 32)
    assert ballots.tolist() == [sum(1 << lane for lane in range(32) if warp[lane] > 0) for warp in warps]
    assert totals.tolist() == [int(warp.sum()) * 4 + 2 * bool((warp == 7).any()) + 1 for warp in warps]
    lane = np.arange(32)
    rotated, above = warps[:, lane // 8 * 8 + (lane + 5) % 8], warps[:, np.where(lane < 3, lane, lane - 3)]
    assert np.array_equal(sources.reshape(2, 32), rotated * 1000 + above)


@_ORDERS
def test_reducing_barriers(order):
    x, output = _RNG.integers(-5, 6, 96).astype(i32), np.zeros(96, i32)
    run("count_positive", x, output, block=96, order=order)
    assert (output == (x > 0).sum() * 4 + 1).all()


@_ORDERS
def test_atomics(order):
    bins, weight = _RNG.integers(0, 10, 500).astype(i32), _RNG.uniform(size=500).astype(f32)
    sums, precise, highest, turns = np.zeros(10, f32), np.zeros(10), np.full(10, -1, i32), np.zeros(1, np.uint32)
    run("histograms", i32(500), bins, weight, sums, precise, highest, turns, grid=4, order=order)
    expected = np.bincount(bins, weight.astype(f64), 10)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    np.testing.assert_allclose(precise, expected, rtol=1e-13)
    assert highest.tolist() == [np.flatnonzero(bins == b).max() for b in range(10)]
    assert turns[0] == 500 % 7
    total = np.zeros(1, f32)
    run("add_by_swapping", i32(200), np.arange(200, dtype=f32), total, grid=2, order=order)
    assert total[0] == 199 * 100
    half = np.zeros(1, np.float16)
    run("half_atomics", i32(60), np.full(60, 0.25, np.float16), half, order=order)
    assert half[0] == 15


# Faults


def test_out_of_bounds():
    x = np.zeros(64, f32)
    message = fault("write_at", x, i64(60), block=32)
    assert "out-of-bounds write of 4 bytes" in message and "offset 256" in message
    assert "thread (4, 0, 0)" in message and "`st.global" in message
    assert "thread (31, 0, 0)" in fault("write_at", x, i64(60), block=32, order=1)
    assert "out-of-bounds read" in fault("read_at", x, i64(-1), np.zeros(32, f32), block=32)
    view = np.zeros((4, 8), f32)[1:3]
    run("read_at", view, i64(15), np.zeros(1, f32), block=1)
    assert "out-of-bounds read" in fault("read_at", view, i64(16), np.zeros(1, f32), block=1)
    inside = np.zeros(96, f32)
    run("write_at", inside[:64], i64(60), block=32, check=False)
    assert inside[91] == 1


def test_misaligned_and_read_only():
    assert "misaligned access of 4 bytes" in fault("read_misaligned", np.zeros(8, f64), np.zeros(1, i32), block=1)
    x = np.zeros(64, f32)
    x.flags.writeable = False
    assert "write to read-only memory" in fault("write_at", x, i64(0), block=32)


def test_shared_overrun():
    output = np.zeros(32, f32)
    run("shared_overrun", output, i32(0), block=32)
    assert np.array_equal(output, 31 - np.arange(32))
    assert "out-of-bounds shared write of 4 bytes at 0x80" in fault("shared_overrun", output, i32(1), block=32)


def test_deadlocks_and_masks():
    output = np.zeros(64, i32)
    assert "deadlock" in fault("half_waits", output, block=64)
    assert "at different barriers" in fault("barriers_apart", output, block=64)
    assert "names lane 3, which has exited" in fault("exited_lane", output, block=32)
    assert "is not in the mask" in fault("missing_barrier", output, block=64)


def test_device_assert():
    run("failing_assert", np.zeros(32, i32), block=32)
    x = np.zeros(32, i32)
    x[5] = -1
    message = fault("failing_assert", x, block=32)
    assert "device assert failed: x[threadIdx.x] >= 0" in message and "thread (5, 0, 0)" in message


def test_wrong_arguments():
    x = np.zeros(4, f32)
    with pytest.raises(TypeError, match="takes 3 arguments, 2 given"):
        run("read_at", x, i64(0))
    with pytest.raises(TypeError, match="has 4 bytes, its parameter 8"):
        run("write_at", x, i32(0))
    with pytest.raises(TypeError, match="not int"):
        run("write_at", x, 0)
    with pytest.raises(KeyError):
        run("no_such_kernel")
    assert "threads in a block" in fault("write_at", x, i64(0), block=(32, 33))


def test_fresh_compilation_gives_the_same(tmp_path):
    """kernels.ptx is what kernels.cu compiles to: same kernels, same results."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("nvcc is not installed")
    target = tmp_path / "kernels.ptx"
    subprocess.run([nvcc, "-std=c++17", "-ptx", "-arch=compute_80", _FOLDER / "kernels.cu", "-o", target], check=True)
    text = target.read_text()
    assert sorted(ptx.entries(text)) == sorted(ptx.entries(_KERNELS))
    assert not [reason for kernel in ptx.entries(text) for reason in ptx.unsupported(text, kernel)]
    x = _RNG.standard_normal(300).astype(f32)
    for kernel in ("sin_f32", "power_f32", "sigmoid_f32"):
        outputs = np.zeros((2, 300), f32)
        run(kernel, i64(300), x, outputs[0], grid=3)
        run(kernel, i64(300), x, outputs[1], grid=3, text=text)
        np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-6)
    sums = np.zeros((2, 2), f32)
    run("block_sum", i64(300), x, sums[0], grid=2)
    run("block_sum", i64(300), x, sums[1], grid=2, text=text)
    assert np.array_equal(sums[0], sums[1])
