"""Launch plans: vector widths, index widths, traffic, sharing of kernels.  Nothing is executed, so sizes may be any."""

import pathlib
import re
import struct

import pytest
from support import ptx_device
from wengert import _C

cuda = _C.cuda
SIZES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "b8": 1}
BASE = 1 << 32  # an address aligned to everything


def contiguous(extents):
    strides = [1]
    for extent in reversed(extents[1:]):
        strides.insert(0, strides[0] * extent)
    return strides if extents else []


def plan(text, extents, operands, outputs, **limits):
    return cuda.plan(text, extents, operands, [(*output, False) for output in outputs], limits)


def flat(count, dtypes, offset=0, body="t0 = sin a0\n", **limits):
    """An elementwise program over contiguous arrays: operands of all types but the last, which is the output's."""
    *given, wanted = dtypes
    text = f"fused v1 rank=1 operands={len(given)} compute=f32\n{body}out t0 {wanted}\n"
    operands = [(BASE + offset * SIZES[dtype], dtype, [1]) for dtype in given]
    return plan(text, [count], operands, [(BASE << 1, wanted, [1])], **limits)


def constant(launch, name):
    return int(re.search(rf"{name} = (\d+);", launch["source"])[1])


# ------------------------------------------------------------------------------------------------------------------------ width
@pytest.mark.parametrize(
    "dtypes, width",
    [(("f32", "f32"), 4), (("f64", "f64"), 2), (("bf16", "bf16"), 8), (("f16", "f16"), 8), (("u8", "b8"), 16),
     (("bf16", "f32"), 4), (("b8", "f64"), 2)],
    ids=str,
)  # fmt: skip
def test_vectors_are_128_bits_of_the_widest_element(dtypes, width):
    (launch,) = flat(1 << 20, dtypes)["launches"]
    assert constant(launch, "kWidth") == width
    assert launch["grid"] == ((1 << 20) // width // 256, 1, 1) and launch["block"] == (256, 1, 1)


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_128_bit_instructions(dtype):
    ptx_device.nvrtc()
    (launch,) = flat(1 << 20, (dtype, dtype))["launches"]
    ptx = cuda.compile(launch["source"], ptx_device.ARCH, "ptx").decode()
    # 128 bits are four words or two doubles
    assert re.search(r"ld\.global(\.nc)?\.(v4\.[bu]32|v4\.f32|v2\.[bu]64|v2\.f64)", ptx)
    assert re.search(r"st\.global\.(v4\.[bu]32|v4\.f32|v2\.[bu]64|v2\.f64)", ptx)


@pytest.mark.parametrize("offset, width", [(0, 4), (1, 1), (2, 2), (3, 1), (4, 4)])
def test_misaligned_operands_narrow_the_vectors(offset, width):
    (launch,) = flat(1 << 20, ("f32", "f32"), offset)["launches"]
    assert constant(launch, "kWidth") == width


def test_rows_that_vectors_do_not_divide():
    text = "fused v1 rank=2 operands=2 compute=f32\nt0 = add a0 a1\nout t0 f32\n"
    for length, pitch, width in [(64, 64, 4), (64, 65, 1), (66, 68, 2), (63, 64, 1)]:
        operands = [(BASE, "f32", [pitch, 1]), (BASE, "f32", [1, 0])]
        (launch,) = plan(text, [50, length], operands, [(BASE, "f32", [length, 1])])["launches"]
        assert constant(launch, "kWidth") == width


@pytest.mark.parametrize("instructions, unroll", [(1, 4), (16, 4), (17, 2), (40, 1)])
def test_single_elements_come_in_fours_until_the_program_is_long(instructions, unroll):
    body = "t0 = sin a0\n" + "".join(f"t{k} = sin t{k - 1}\n" for k in range(1, instructions))
    text = f"fused v1 rank=1 operands=1 compute=f32\n{body}out t{instructions - 1} f32\n"
    (launch,) = plan(text, [1000], [(BASE, "f32", [2])], [(BASE, "f32", [1])])["launches"]
    assert constant(launch, "kUnroll") == unroll


# ---------------------------------------------------------------------------------------------------------------------- indices
def index_type(launch):
    return re.search(r"using Index = std::(\w+);", launch["source"])[1]


@pytest.mark.parametrize("count, wanted", [(1 << 30, "int32_t"), ((1 << 31) - (1 << 20), "int32_t"), (1 << 31, "int64_t"),
                                           ((1 << 33) + 5, "int64_t")])  # fmt: skip
def test_indices_are_as_wide_as_the_elements_need(count, wanted):
    (launch,) = flat(count, ("f32", "f32"))["launches"]
    assert index_type(launch) == wanted
    assert launch["grid"][0] * 256 * constant(launch, "kWidth") >= count


@pytest.mark.parametrize("strides, wanted", [([1], "int32_t"), ([1 << 20], "int32_t"), ([1 << 21], "int64_t")])
def test_indices_are_as_wide_as_the_offsets_need(strides, wanted):
    text = "fused v1 rank=1 operands=1 compute=f32\nout a0 f32\n"
    (launch,) = plan(text, [2000], [(BASE, "f32", strides)], [(BASE, "f32", [1])])["launches"]
    assert index_type(launch) == wanted


def test_sums_beyond_32_bits():
    text = "fused v1 rank=2 operands=1 compute=f32\nout a0 f32 sum=1\n"
    launches = plan(text, [3, 1 << 30], [(BASE, "f32", [1 << 30, 1])], [(BASE, "f32", [1, 0])])["launches"]
    assert [index_type(launch) for launch in launches] == ["int64_t", "int32_t"]


@pytest.mark.parametrize("divisor", [2, 3, 5, 7, 11, 641, 1000, 4095, 4096, 4097, 65537, 1234567, (1 << 29) + 3, 1 << 29])
def test_magic_division(divisor):
    text = "fused v1 rank=2 operands=1 compute=f32\nout a0 f32\n"
    operands, outputs = [(BASE, "f32", [0, 1])], [(BASE, "f32", [divisor + 1, 1])]
    (launch,) = plan(text, [3, divisor], operands, outputs)["launches"]
    elements, first, _, _, last, magic, shift = struct.unpack_from("<iiIIiII", launch["parameters"], 16)
    assert (elements, first, last) == (3 * divisor, 3, divisor)
    largest = (1 << 31) - 1
    multiples = (0, 1, 2, 3, 4, largest // divisor - 1, largest // divisor)
    samples = {k * divisor + near for k in multiples for near in range(-2, 3)}
    samples |= {(largest * k) // 1009 for k in range(1010)}
    for n in samples:
        if 0 <= n <= largest:
            assert ((n * magic >> 32) + n) >> shift == n // divisor


# ---------------------------------------------------------------------------------------------------------------------- traffic
GRADIENT = """fused v1 rank=2 operands=3 compute=f32
t0 = sin a0
t1 = mul t0 a1
t2 = exp t1
t3 = cos a0
t4 = mul t2 t3
t5 = mul t4 a2
out t5 f32
out t4 f32
"""


@pytest.mark.parametrize("third", [[512, 1], [0, 1], [1, 0], [0, 0]], ids=str)
def test_an_elementwise_chain_touches_memory_once(third):
    extents = [1000, 512]
    operands = [(BASE, "f32", [512, 1]), (BASE << 1, "f32", [512, 1]), (BASE << 2, "f32", third)]
    made = plan(GRADIENT, extents, operands, [(BASE << 3, "f32", [512, 1]), (BASE << 4, "f32", [512, 1])])
    assert len(made["launches"]) == 1
    assert made["bytes"] == made["minimum_bytes"]
    small = (1000 if third[0] else 1) * (512 if third[1] else 1)
    assert made["bytes"] == 4 * (4 * 1000 * 512 + small)


@pytest.mark.parametrize("axes", ["0", "1", "0,1"])
def test_values_and_their_sum_are_one_pass(axes):
    """A layer's backward: the cotangent of its pre-activation and, summed over the batch, of its bias."""
    text = f"fused v1 rank=2 operands=2 compute=f32\nt0 = mul a0 a1\nout t0 f32\nout t0 f32 sum={axes}\n"
    kept = {"0": [0, 1], "1": [1, 0], "0,1": [0, 0]}[axes]
    operands = [(BASE, "f32", [4096, 1]), (BASE << 1, "f32", [4096, 1])]
    made = plan(text, [4096, 4096], operands, [(BASE << 2, "f32", [4096, 1]), (BASE << 3, "f32", kept)])
    assert [launch["entry"] for launch in made["launches"]].count("wengert_map") == 0
    assert constant(made["launches"][0], "kWidth") == 4
    assert made["bytes"] < 1.02 * made["minimum_bytes"]


def test_overlapping_windows_are_counted_once():
    text = "fused v1 rank=2 operands=1 compute=f32\nout a0 f32\n"
    made = plan(text, [100, 50], [(BASE, "f32", [1, 1])], [(BASE << 1, "f32", [50, 1])])
    assert made["bytes"] == made["minimum_bytes"] == 4 * (149 + 5000)


@pytest.mark.parametrize(
    "extents, axes",
    [([1 << 24], "0"), ([64, 1 << 18], "1"), ([1 << 18, 64], "0"), ([1 << 18, 3], "0"), ([1 << 16, 256], "1"),
     ([256, 1 << 16], "0"), ([100, 700, 30], "0,2")],
    ids=str,
)  # fmt: skip
def test_sums_fill_the_device_and_touch_memory_once(extents, axes):
    reduced = {int(axis) for axis in axes.split(",")}
    kept = [1 if k in reduced else extent for k, extent in enumerate(extents)]
    text = f"fused v1 rank={len(extents)} operands=1 compute=f32\nt0 = square a0\nout t0 f32 sum={axes}\n"
    made = plan(text, extents, [(BASE, "f32", contiguous(extents))], [(BASE << 1, "f32", contiguous(kept))])
    first = made["launches"][0]
    assert first["grid"][0] * first["grid"][1] >= 132
    assert made["bytes"] < 1.02 * made["minimum_bytes"]


def test_short_sums_are_one_launch():
    for extents, axis in [([1000, 64], 1), ([64, 1000], 0), ([10000], 0), ([1 << 20, 16], 1)]:
        kept = [1 if k == axis else extent for k, extent in enumerate(extents)]
        text = f"fused v1 rank={len(extents)} operands=1 compute=f32\nout a0 f32 sum={axis}\n"
        made = plan(text, extents, [(BASE, "f32", contiguous(extents))], [(BASE, "f32", contiguous(kept))])
        assert len(made["launches"]) == 1 and made["workspace_bytes"] == 0


# ---------------------------------------------------------------------------------------------------------------- text of kernels
def test_kernels_are_shared_by_sizes_and_addresses():
    one, two = flat(1000, ("f32", "f32"))["launches"][0], flat(999999, ("f32", "f32"), 4)["launches"][0]
    assert one["kernel"] == two["kernel"] and one["source"] == two["source"]
    assert flat(1000, ("f32", "bf16"))["launches"][0]["kernel"] != one["kernel"]


def test_embedded_headers_are_the_files():
    csrc = pathlib.Path(__file__).parents[2] / "csrc"
    embedded = {name: text for name, text in cuda.headers().items() if "/" in name}
    assert "fused/primitive_ops.h" in embedded
    for name, text in embedded.items():
        assert text == (csrc / name).read_text()


def test_formulas_are_not_copied():
    """A generated kernel names primitives; what they compute stands in the table alone."""
    (launch,) = flat(8, ("f32", "f32"), body="t0 = gelu_tanh a0\n")["launches"]
    assert "Op<Prim::gelu_tanh>::value(a[0])" in launch["source"] and "tanh(" not in launch["source"].replace("gelu_tanh", "")


# ----------------------------------------------------------------------------------------------------------------------- refusals
def test_what_no_kernel_can_take_is_an_error():
    count = 3000
    body = "".join(f"t{k} = add a0 {k}\n" for k in range(count)) + "".join(f"out t{k} f32\n" for k in range(count))
    with pytest.raises(ValueError, match="too many outputs"):
        plan("fused v1 rank=1 operands=1 compute=f32\n" + body, [64], [(BASE, "f32", [1])], [(BASE, "f32", [1])] * count)


def test_views_must_fit_the_program():
    text = "fused v1 rank=1 operands=1 compute=f32\nout a0 f32\n"
    operand, output = (BASE, "f32", [1]), (BASE, "f32", [1])
    for extents, operands, outputs in [([], [operand], [output]), ([4], [], [output]), ([4], [operand], []),
                                       ([4], [(BASE, "f32", [])], [output])]:  # fmt: skip
        with pytest.raises(ValueError, match="disagree"):
            plan(text, extents, operands, outputs)
    with pytest.raises(ValueError, match="unknown limit 'speed'"):
        plan(text, [4], [operand], [output], speed=1)
    with pytest.raises(ValueError, match="unknown dtype 'c64'"):
        plan(text, [4], [(BASE, "c64", [1])], [output])
