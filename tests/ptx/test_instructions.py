"""Single instructions, written by hand, against numpy and Python's integers."""

import math

import numpy as np
import pytest
import torch

import ptx

_RNG = np.random.default_rng(0)
f32, f64, i32, i64 = np.float32, np.float64, np.int32, np.int64

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


def launch(text, output, *sources):
    """Runs the kernel of `instruction` with one thread per element."""
    ptx.run(text, "one", [output, *sources], 1, len(output))


def fault(text, *arrays):
    """Returns the message of the fault that the kernel must end with."""
    with pytest.raises(ptx.PtxError) as caught:
        launch(text, *arrays)
    return str(caught.value)


def compute(text, dtype, *sources, types):
    """Applies an instruction to every element; `types` are the PTX types of result and sources."""
    output = np.zeros(len(sources[0]), dtype)
    launch(instruction(text, types[0], types[1:]), output, *sources)
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
    pairs, triples = list(zip(a.tolist(), b.tolist())), list(zip(a.tolist(), b.tolist(), c.tolist()))
    for text, expected in {
        "popc.b32 d, a": [int(x).bit_count() for x in a],
        "clz.b32 d, a": [32 - int(x).bit_length() for x in a],
        "brev.b32 d, a": [int(f"{x:032b}"[::-1], 2) for x in a],
        "bfind.u32 d, a": [(int(x).bit_length() - 1) % 2**32 for x in a],
        "lop3.b32 d, a, b, c, 0xE8": ((a & b) | (a & c) | (b & c)).tolist(),
        "prmt.b32 d, a, b, 0x5140": [x & 255 | (y & 255) << 8 | (x & 0xFF00) << 8 | (y & 0xFF00) << 16 for x, y in pairs],
        "shf.l.wrap.b32 d, a, b, 40": [((y << 32 | x) << 8 >> 32) % 2**32 for x, y in pairs],
        "shf.r.clamp.b32 d, a, b, 40": b.tolist(),
        "mad.lo.u32 d, a, b, c": [(x * y + z) % 2**32 for x, y, z in triples],
        "not.b32 d, a": (~a).tolist(),
        "sad.u32 d, a, b, c": [(abs(x - y) + z) % 2**32 for x, y, z in triples],
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
    exact = {
        "add": lambda x, y, z: x + y,
        "sub": lambda x, y, z: x - y,
        "mul": lambda x, y, z: x * y,
        "fma": lambda x, y, z: x * y + z,
    }
    expected = exact[operation](a.double(), b.double(), c.double())
    output = torch.zeros_like(a)
    operands = "d, a, b, c" if operation == "fma" else "d, a, b"
    launch(instruction(f"{operation}.rn.bf16 {operands}", "bf16", ["bf16"] * 3), output, a, b, c)
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
    assert np.array_equal(
        compute("cvt.s64.s16 d, a", i64, integers.astype(np.int16), types=("s64", "s16")), integers.astype(np.int16)
    )
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
    launch(instruction("cvt.rn.bf16.f32 d, a", "bf16", ["f32"]), output, singles)
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


def test_unsupported_instruction():
    text = instruction("setp.eq.b32 p, a, 7; @p add.rn.fancy.f32 d, a, a; @!p mov.b32 d, a", "u32", ["u32"])
    (reason,) = ptx.unsupported(text, "one")
    assert "add.rn.fancy.f32: modifier .fancy" in reason
    x = np.arange(4, dtype=np.uint32)
    launch(text, np.zeros(4, np.uint32), x)  # not reached
    message = fault(text, np.zeros(8, np.uint32), np.arange(8, dtype=np.uint32))
    assert "unsupported PTX" in message and "thread (7, 0, 0)" in message


def test_traps_and_endless_loops():
    text = instruction("setp.eq.b32 p, a, 3; @p trap; mov.b32 d, a", "u32", ["u32"])
    assert "trap" in fault(text, np.zeros(4, np.uint32), np.arange(4, dtype=np.uint32))
    text = instruction("LOOP: setp.ne.b32 p, a, 1; @!p bra LOOP; mov.b32 d, a", "u32", ["u32"])
    message = fault(text, np.zeros(4, np.uint32), np.arange(4, dtype=np.uint32))
    assert "endless loop" in message and "thread (1, 0, 0)" in message


def test_launch_bounds():
    text = instruction("mov.b32 d, a", "u32", ["u32"]).replace(") {", ") .maxntid 2, 2, 1 {")
    launch(text, np.zeros(4, np.uint32), np.zeros(4, np.uint32))
    assert "launch bounds allow 4" in fault(text, np.zeros(5, np.uint32), np.zeros(5, np.uint32))


def test_packed_comparisons():
    a, b = _floats(np.float16, 256), _floats(np.float16, 256)
    both = (a.view(np.uint32), b.view(np.uint32))
    ones = compute("set.gt.f16x2.f16x2 d, a, b", np.uint32, *both, types=("u32", "f16x2", "f16x2"))
    assert np.array_equal(ones.view(np.float16), a > b)
    masks = compute("set.gt.u32.f16x2 d, a, b", np.uint32, *both, types=("u32", "f16x2", "f16x2"))
    assert np.array_equal(masks.view(np.uint16), np.where(a > b, 0xFFFF, 0))
    text = "setp.gt.f16x2 p|q, a, b; selp.b32 d, 1, 0, p; @q add.s32 d, d, 2"
    got = compute(text, np.uint32, *both, types=("u32", "f16x2", "f16x2"))
    assert np.array_equal(got, (a > b)[::2] + 2 * (a > b)[1::2])


def test_wide_vector_access():
    """A 256-bit load and store, as for compute capability 10."""
    wide = """{ .reg .b32 v<8>; .reg .b64 s; .reg .b64 t; ld.param.u64 s, [pa]; ld.param.u64 t, [pd];
      ld.global.v8.b32 {v0, v1, v2, v3, v4, v5, v6, v7}, [s];
      st.global.v8.b32 [t+32], {v7, v6, v5, v4, v3, v2, v1, v0}; } mov.b64 d, a"""
    text = instruction(wide, "u64", ["u64"])
    storage = np.zeros(256, np.uint8)
    start = -storage.ctypes.data % 32
    source, target = storage[start : start + 40].view(np.uint32), storage[start + 64 : start + 128].view(np.uint32)
    source[:8] = np.arange(8)
    ptx.run(text, "one", [target, source], 1, 1)
    assert target[8:].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    with pytest.raises(ptx.PtxError, match="misaligned access of 32 bytes"):
        ptx.run(text, "one", [target, source[2:]], 1, 1)
