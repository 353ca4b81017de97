"""The executor against numpy: arithmetic of every type, cooperation of threads under all orders, and every kind of fault."""

import math
import pathlib
import shutil
import struct
import subprocess

import numpy as np
import ptx
import pytest
import torch

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


# Single instructions, written by hand

_WIDTHS = {"pred": 32, "u8": 8, "s8": 8, "f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32x2": 64}


def _width(ptx_type):
    return _WIDTHS.get(ptx_type) or int(ptx_type[1:])


def instruction(text, result, sources):
    """Returns a module whose kernel "one" applies an instruction to arrays: operands are named d, a, b, c; e is scratch."""
    names = "abc"[: len(sources)]
    registers = [f".reg .b{max(_width(t), 16)} {name};" for name, t in zip("d" + names, [result, *sources])]
    parameters = ", ".join(f".param .u64 p{name}" for name in "d" + names)
    loads = []
    for name, ptx_type in zip(names, sources):
        size = _width(ptx_type)
        loads.append(f"ld.param.u64 %q, [p{name}]; mad.wide.u32 %q, %i, {size // 8}, %q; ld.global.b{size} {name}, [%q];")
    size = _width(result)
    return f"""
.version 9.0
.target sm_90
.address_size 64
.visible .entry one({parameters}) {{
  .reg .b64 %q; .reg .b32 %i; .reg .b64 e; .reg .pred p; .reg .pred q; {" ".join(registers)}
  mov.u32 %i, %tid.x;
  {" ".join(loads)}
  {text};
  ld.param.u64 %q, [pd]; mad.wide.u32 %q, %i, {size // 8}, %q; st.global.b{size} [%q], d;
  ret;
}}"""


def compute(text, dtype, *sources, types):
    """Applies an instruction to every element; `types` are the PTX types of result and sources."""
    output = np.zeros(len(sources[0]), dtype)
    run("one", output, *sources, block=len(output), text=instruction(text, types[0], types[1:]))
    return output


_INTEGERS = {"u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "s16": np.int16, "s32": np.int32, "s64": np.int64}


def _integers(dtype, count=96):
    """Random values of all magnitudes, with the corners."""
    info = np.iinfo(dtype)
    corners = [0, 1, 2, info.max, info.max - 1, info.min, info.min + 1]
    drawn = [int.from_bytes(_RNG.bytes(8), "little") >> int(_RNG.integers(0, 64)) for _ in range(count - len(corners))]
    values = np.array([(value - info.min) % 2**info.bits + info.min for value in corners + drawn], dtype)
    return _RNG.permutation(values)


def _wrap(value, dtype):
    info = np.iinfo(dtype)
    return (value - info.min) % 2**info.bits + info.min


def _truncated(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


_INTEGER_CASES = {
    "add": lambda a, b, bits: a + b,
    "sub": lambda a, b, bits: a - b,
    "mul.lo": lambda a, b, bits: a * b,
    "mul.hi": lambda a, b, bits: (a * b) >> bits,
    "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b),
    "div": lambda a, b, bits: _truncated(a, b) if b else -1,
    "rem": lambda a, b, bits: a - b * _truncated(a, b) if b else a,
}


@pytest.mark.parametrize("ptx_type", _INTEGERS)
@pytest.mark.parametrize("operation", _INTEGER_CASES)
def test_integer_arithmetic(operation, ptx_type):
    dtype = _INTEGERS[ptx_type]
    a, b = _integers(dtype), _integers(dtype)
    got = compute(f"{operation}.{ptx_type} d, a, b", dtype, a, b, types=(ptx_type,) * 3)
    bits = np.iinfo(dtype).bits
    assert got.tolist() == [_wrap(_INTEGER_CASES[operation](int(x), int(y), bits), dtype) for x, y in zip(a, b)]


@pytest.mark.parametrize("ptx_type", ["u32", "u64", "s32", "s64"])
def test_shifts_and_bit_fields(ptx_type):
    dtype = _INTEGERS[ptx_type]
    bits = np.iinfo(dtype).bits
    a, b = _integers(dtype), _integers(dtype)
    position, length = [_RNG.integers(0, bits + 8, len(a)).astype(np.uint32) for _ in range(2)]
    shifted = compute(f"shr.{ptx_type} d, a, b", dtype, a, position, types=(ptx_type, ptx_type, "u32"))
    assert shifted.tolist() == [int(x) >> min(int(n), bits) if x < 0 or n < bits else 0 for x, n in zip(a, position)]
    left = compute(f"shl.b{bits} d, a, b", dtype, a, position, types=(ptx_type, ptx_type, "u32"))
    assert left.tolist() == [_wrap(int(x) << int(n), dtype) for x, n in zip(a, position)]

    def field(x, start, size):
        if size == 0:
            return 0
        x, signed = int(x) % 2**bits, ptx_type[0] == "s"
        last = min(start + size - 1, bits - 1)
        value = (x >> start) % 2 ** min(size, max(bits - start, 0))
        taken = max(min(size, bits - start), 0)
        return _wrap(value - (2**taken if signed and (x >> last) & 1 else 0), dtype)

    extracted = compute(f"bfe.{ptx_type} d, a, b, c", dtype, a, position, length, types=(ptx_type, ptx_type, "u32", "u32"))
    assert extracted.tolist() == [field(x, int(s), int(n)) for x, s, n in zip(a, position, length)]
    inserted = compute(f"bfi.b{bits} d, a, b, 5, 9", dtype, a, b, types=(ptx_type,) * 3)
    mask = (2**9 - 1) << 5
    assert inserted.tolist() == [_wrap((int(y) & ~mask) | ((int(x) << 5) & mask), dtype) for x, y in zip(a, b)]


def test_bit_counting_and_bytes():
    a, b, c = (_integers(np.uint32) for _ in range(3))
    for text, expected in {
        "popc.b32 d, a": [int(x).bit_count() for x in a],
        "clz.b32 d, a": [32 - int(x).bit_length() for x in a],
        "brev.b32 d, a": [int(f"{x:032b}"[::-1], 2) for x in a],
        "bfind.u32 d, a": [(int(x).bit_length() - 1) % 2**32 for x in a],
        "lop3.b32 d, a, b, c, 0xE8": ((a & b) | (a & c) | (b & c)).tolist(),
        "prmt.b32 d, a, b, 0x5140": [
            int.from_bytes(bytes([x & 255, y & 255, (x >> 8) & 255, (y >> 8) & 255]), "little") for x, y in zip(a.tolist(), b.tolist())
        ],
        "shf.l.wrap.b32 d, a, b, 40": [((y << 32 | x) << 8 >> 32) % 2**32 for x, y in zip(a.tolist(), b.tolist())],
        "shf.r.clamp.b32 d, a, b, 40": b.tolist(),
        "mad.lo.u32 d, a, b, c": [(x * y + z) % 2**32 for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())],
        "not.b32 d, a": (~a).tolist(),
        "sad.u32 d, a, b, c": [(abs(x - y) + z) % 2**32 for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())],
        "dp4a.u32.u32 d, a, b, c": [
            (sum(p * q for p, q in zip(x.tobytes(), y.tobytes())) + int(z)) % 2**32 for x, y, z in zip(a, b, c)
        ],
    }.items():
        assert compute(text, np.uint32, a, b, c, types=("u32",) * 4).tolist() == expected, text


def test_carries_make_wide_sums():
    a, b = _integers(np.uint64), _integers(np.uint64)
    text = """{ .reg .b32 al; .reg .b32 ah; .reg .b32 bl; .reg .b32 bh; mov.b64 {al, ah}, a; mov.b64 {bl, bh}, b;
      OP.cc.u32 al, al, bl; OPc.u32 ah, ah, bh; mov.b64 d, {al, ah}; }"""
    for operation, expected in (("add", a + b), ("sub", a - b)):
        got = compute(text.replace("OP", operation) + "  mov.b64 e, d", np.uint64, a, b, types=("u64",) * 3)
        assert np.array_equal(got, expected)
    text = """{ .reg .b32 l; .reg .b32 h; mad.lo.cc.u32 l, a, b, c; madc.hi.u32 h, a, b, 0; mov.b64 d, {l, h}; } mov.b64 e, d"""
    x, y, z = (_integers(np.uint32) for _ in range(3))
    got = compute(text, np.uint64, x, y, z, types=("u64", "u32", "u32", "u32"))
    assert np.array_equal(got, x.astype(np.uint64) * y + z)


def _floats(dtype, count=128):
    """Values of all magnitudes of a format, with subnormals, zeros, infinities and NaN."""
    bits = _RNG.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), count, np.uint64)
    values = bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
    values[:7] = [0, -0.0, 1, np.inf, -np.inf, np.nan, np.finfo(dtype).max]
    values[7:64] = _RNG.standard_normal(57)
    return _RNG.permutation(values)


def _same(got, expected):
    """Asserts equal values, signs of zeros included; all NaN are equal."""
    got, expected = np.asarray(got), np.asarray(expected)
    wrong = ~((got == expected) & (np.signbit(got) == np.signbit(expected)) | (np.isnan(got) & np.isnan(expected)))
    assert not wrong.any(), (np.flatnonzero(wrong)[:5], got[wrong][:5], expected[wrong][:5])


@pytest.mark.parametrize("ptx_type, dtype", [("f32", f32), ("f64", f64), ("f16", np.float16)])
def test_float_arithmetic(ptx_type, dtype):
    a, b = _floats(dtype), _floats(dtype)
    types = (ptx_type,) * 3
    with np.errstate(all="ignore"):
        _same(compute(f"add.{ptx_type} d, a, b", dtype, a, b, types=types), a + b)
        _same(compute(f"sub.{ptx_type} d, a, b", dtype, a, b, types=types), a - b)
        _same(compute(f"mul.{ptx_type} d, a, b", dtype, a, b, types=types), a * b)
        _same(compute(f"neg.{ptx_type} d, a", dtype, a, b, types=types), -a)
        if ptx_type != "f16":
            _same(compute(f"div.rn.{ptx_type} d, a, b", dtype, a, b, types=types), a / b)
            _same(compute(f"sqrt.rn.{ptx_type} d, a", dtype, a, b, types=types), np.sqrt(a))
        nonzero = a != b  # numpy does not order zeros
        _same(compute(f"min.{ptx_type} d, a, b", dtype, a, b, types=types)[nonzero], np.fmin(a, b)[nonzero])
        _same(compute(f"max.NaN.{ptx_type} d, a, b", dtype, a, b, types=types)[nonzero], np.maximum(a, b)[nonzero])


def test_fma_rounds_once():
    a = (1 + _RNG.integers(1, 2**23, 128) * 2.0**-23).astype(f32)
    b = (1 + _RNG.integers(1, 2**23, 128) * 2.0**-23).astype(f32)
    c = -(a * b)
    got = compute("fma.rn.f32 d, a, b, c", f32, a, b, c, types=("f32",) * 4)
    assert np.array_equal(got, (a.astype(f64) * b + c).astype(f32))  # the error of the product, exactly
    assert np.count_nonzero(got) > 64
    # Halves: exact in integers of 2^-48, then rounded by Python.
    x, y, z = (_RNG.standard_normal(128).astype(np.float16) for _ in range(3))
    got = compute("fma.rn.f16 d, a, b, c", np.float16, x, y, z, types=("f16",) * 4)
    exact = [int(float(p) * 2**24) * int(float(q) * 2**24) + (int(float(r) * 2**24) << 24) for p, q, r in zip(x, y, z)]
    _same(got, [_round_integer(value, 10, -14) for value in exact])


def _round_integer(value, mantissa_bits, lowest_exponent):
    """Rounds value * 2^-48 to a binary format, to nearest even, in integer arithmetic."""
    magnitude = abs(value)
    exponent = max(magnitude.bit_length() - 1 - 48, lowest_exponent)
    unit = 1 << (exponent - mantissa_bits + 48)
    quotient, rest = divmod(magnitude, unit)
    quotient += rest * 2 > unit or (rest * 2 == unit and quotient % 2 == 1)
    return math.copysign(quotient * unit * 2.0**-48, value)


@pytest.mark.parametrize("mode, step", [("rz", None), ("rm", -math.inf), ("rp", math.inf)])
def test_rounding_modes(mode, step):
    a, b = _RNG.standard_normal(128).astype(f32), _RNG.standard_normal(128).astype(f32)
    exact = a.astype(f64) * b
    nearest = exact.astype(f32)
    target = np.zeros_like(a) if step is None else f32(step)
    beyond = np.abs(nearest) > np.abs(exact) if step is None else (nearest > exact if step < 0 else nearest < exact)
    expected = np.where(beyond, np.nextafter(nearest, target), nearest)
    _same(compute(f"mul.{mode}.f32 d, a, b", f32, a, b, types=("f32",) * 3), expected)
    assert beyond.any()


def test_flushing_and_saturation():
    a = np.array([1e-40, -1e-40, 0.5, -2, 3, np.nan, np.inf, 1e-20], f32)
    one, tiny = np.ones_like(a), np.full_like(a, 1e-20)
    flushed = compute("mul.ftz.f32 d, a, b", f32, a, one, types=("f32",) * 3)
    _same(flushed, [0.0, -0.0, 0.5, -2, 3, np.nan, np.inf, f32(1e-20)])
    assert compute("mul.ftz.f32 d, a, b", f32, a, tiny, types=("f32",) * 3)[7] == 0
    _same(compute("mul.sat.f32 d, a, b", f32, a, one, types=("f32",) * 3), [a[0], 0, 0.5, 0, 1, 0, 1, a[7]])


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma"])
def test_bfloat_arithmetic(operation):
    """Against float64 rounded once: inputs of similar size make the float64 results exact."""
    a, b, c = (torch.from_numpy(_RNG.standard_normal(128)).bfloat16() for _ in range(3))
    exact = {"add": lambda x, y, z: x + y, "sub": lambda x, y, z: x - y, "mul": lambda x, y, z: x * y, "fma": lambda x, y, z: x * y + z}
    expected = exact[operation](a.double(), b.double(), c.double())
    output = torch.zeros_like(a)
    operands = "d, a, b, c" if operation == "fma" else "d, a, b"
    run("one", output, a, b, c, text=instruction(f"{operation}.rn.bf16 {operands}", "bf16", ["bf16"] * 3))
    half_unit = np.ldexp(1.0, np.frexp(output.double().numpy())[1] - 9)
    assert (np.abs(output.double().numpy() - expected.numpy()) <= half_unit).all()


def test_packed_halves():
    a, b = _floats(np.float16, 256), _floats(np.float16, 256)
    with np.errstate(all="ignore"):
        for operation, expected in (("add", a + b), ("mul", a * b)):
            got = compute(f"{operation}.f16x2 d, a, b", np.uint32, a.view(np.uint32), b.view(np.uint32), types=("f16x2",) * 3)
            _same(got.view(np.float16), expected)
    a, b = _floats(f32, 256), _floats(f32, 256)
    with np.errstate(all="ignore"):
        got = compute("add.rn.f32x2 d, a, b", np.uint64, a.view(np.uint64), b.view(np.uint64), types=("f32x2",) * 3)
        _same(got.view(f32), a + b)


def test_conversions():
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e10, -1e10, np.nan, np.inf, -np.inf, 255.7, 3e-40], f32)
    for mode, function in {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.items():
        expected = np.nan_to_num(np.clip(function(values.astype(f64)), -(2**31), 2**31 - 1), nan=0).astype(i32)
        assert np.array_equal(compute(f"cvt.{mode}.s32.f32 d, a", i32, values, types=("s32", "f32")), expected)
        _same(compute(f"cvt.{mode}.f32.f32 d, a", f32, values, types=("f32", "f32")), function(values))
    integers = _integers(np.int64)
    _same(compute("cvt.rn.f32.s64 d, a", f32, integers, types=("f32", "s64")), integers.astype(f32))
    assert np.array_equal(compute("cvt.s64.s16 d, a", i64, integers.astype(np.int16), types=("s64", "s16")), integers.astype(np.int16))
    clamped = compute("cvt.sat.s16.s64 d, a", np.int16, integers, types=("s16", "s64"))
    assert np.array_equal(clamped, np.clip(integers, -(2**15), 2**15 - 1))
    doubles = np.concatenate([_floats(f64), _RNG.standard_normal(64), _RNG.standard_normal(64) * 2.0**-15])
    with np.errstate(all="ignore"):
        _same(compute("cvt.rn.f32.f64 d, a", f32, doubles, types=("f32", "f64")), doubles.astype(f32))
        _same(compute("cvt.rn.f16.f64 d, a", np.float16, doubles, types=("f16", "f64")), doubles.astype(np.float16))
    halves = np.arange(0, 2**16, 67, dtype=np.uint16).view(np.float16)
    _same(compute("cvt.f32.f16 d, a", f32, halves, types=("f32", "f16")), halves.astype(f32))
    singles = torch.from_numpy(_floats(f32))
    output = torch.zeros(128, dtype=torch.bfloat16)
    run("one", output, singles, text=instruction("cvt.rn.bf16.f32 d, a", "bf16", ["f32"]))
    _same(output.double().numpy(), singles.bfloat16().double().numpy())


@pytest.mark.parametrize("operation, function", [("lt", np.less), ("ne", np.not_equal), ("geu", None), ("num", None)])
def test_comparisons(operation, function):
    a, b = _floats(f32), _floats(f32)
    b[::3] = a[::3]
    unordered = np.isnan(a) | np.isnan(b)
    expected = {"geu": (a >= b) | unordered, "num": ~unordered}.get(operation)
    expected = function(a, b) & ~unordered if function else expected
    text = f"setp.{operation}.f32 p, a, b; selp.b32 d, 1, 0, p"
    assert np.array_equal(compute(text, i32, a, b, types=("s32", "f32", "f32")), expected)
    text = f"setp.ne.b32 q, a, 0; setp.{operation}.and.f32 p|q, a, b, !q; @p mov.b32 d, 1; @!p mov.b32 d, 0; @q mov.b32 d, 2"
    zero = a.view(i32) == 0
    assert np.array_equal(compute(text, i32, a, b, types=("s32", "f32", "f32")), np.where(zero, 2 - expected.astype(int), 0))
    got = compute(f"set.{operation}.u32.f32 d, a, b", i32, a, b, types=("u32", "f32", "f32"))
    assert np.array_equal(got, -expected.astype(i32))


# Kernels compiled by nvcc

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
    _same(output, x * y)
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


def test_unsupported_instruction():
    text = instruction("setp.eq.b32 p, a, 7; @p add.rn.fancy.f32 d, a, a; @!p mov.b32 d, a", "u32", ["u32"])
    (reason,) = ptx.unsupported(text, "one")
    assert "add.rn.fancy.f32: modifier .fancy" in reason
    x = np.arange(4, dtype=np.uint32)
    run("one", np.zeros(4, np.uint32), x, block=4, text=text)  # not reached
    message = fault("one", np.zeros(8, np.uint32), np.arange(8, dtype=np.uint32), block=8, text=text)
    assert "unsupported PTX" in message and "thread (7, 0, 0)" in message


def test_trap():
    text = instruction("setp.eq.b32 p, a, 3; @p trap; mov.b32 d, a", "u32", ["u32"])
    assert "trap" in fault("one", np.zeros(4, np.uint32), np.arange(4, dtype=np.uint32), block=4, text=text)


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
