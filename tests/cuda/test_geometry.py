"""Generated CUDA kernels over all kinds of nests: any sums, strides, element types, sizes, and memory that is written to."""

import pytest
import torch
from support import ptx_device
from wengert import reference

fused = torch.ops.wengert.fused
DTYPES = reference.fused.DTYPES
BODY = "t0 = mul a0 a1\nt1 = add t0 0.5\n"
F64 = {"rtol": 1e-12, "atol": 1e-12}


def program(outputs, body=BODY, rank=2, operands=2, compute="f64"):
    return f"fused v1 rank={rank} operands={operands} compute={compute}\n{body}{outputs}"


def agree(operands, text, outputs=None, tolerance=F64, **options):
    evaluation = ptx_device.evaluate(text, operands, outputs, **options)
    for mine, cpu, twin in zip(evaluation.results, fused(operands, text), reference.evaluate(operands, text), strict=True):
        assert mine.shape == cpu.shape and mine.dtype == cpu.dtype
        torch.testing.assert_close(mine, cpu, equal_nan=True, **tolerance)
        torch.testing.assert_close(mine, twin, equal_nan=True, **tolerance)
    return evaluation


# ---------------------------------------------------------------------------------------------------------------------- extents
ALL_SUMS = program("out t1 f64\nout t1 f64 sum=0\nout t0 f64 sum=1\nout t1 f64 sum=0,1\n")


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (1, 513), (513, 1), (7, 255), (257, 3), (64, 32), (40, 33)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded", "overlapping", "misaligned"])
def test_layouts(shape, layout):
    n, m = shape
    dtype = torch.float64
    x = {
        "contiguous": lambda: torch.randn(n, m, dtype=dtype),
        "transposed": lambda: torch.randn(m, n, dtype=dtype).t(),
        "sliced": lambda: torch.randn(2 * n, 3 * m + 1, dtype=dtype)[::2, 1::3],
        "expanded": lambda: torch.randn(n, 1, dtype=dtype).expand(n, m),
        "overlapping": lambda: torch.randn(n + m, dtype=dtype).as_strided((n, m), (1, 1)),
        "misaligned": lambda: torch.randn(n * m + 1, dtype=dtype)[1:].view(n, m),
    }[layout]()
    agree([x, torch.randn(1, m, dtype=dtype)], ALL_SUMS)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (17, 1, 33, 2), (4, 5, 60, 3)], ids=str)
@pytest.mark.parametrize("axes", ["0", "1", "2", "3", "0,2", "1,3", "2,3", "0,1,2,3"])
def test_sums_over_any_axes(shape, axes):
    x = torch.randn(*shape, dtype=torch.float64)
    w = torch.randn(1, shape[1], 1, shape[3], dtype=torch.float64)
    text = program(f"out t1 f64 sum={axes}\nout t0 f64 sum={axes}\n", rank=4)
    assert len(agree([x, w], text).plan["launches"]) == 1
    agree([x.transpose(0, 3).contiguous().transpose(0, 3), w], text)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_empty_nests(shape):
    x = torch.zeros(shape, dtype=torch.float64)
    evaluation = agree([x, torch.zeros(1, shape[1], dtype=torch.float64)], ALL_SUMS)
    assert all(launch["entry"] == "wengert_map" for launch in evaluation.plan["launches"])
    # a sum over nothing adds nothing
    outputs = [torch.full_like(y, 3) for y in evaluation.results]
    kept = ptx_device.evaluate(ALL_SUMS, [x, torch.zeros(1, shape[1], dtype=torch.float64)], outputs, accumulate=True)
    assert kept.plan["launches"] == [] and all((y == 3).all() for y in kept.results)


def test_rank_zero_constants_and_unused_operands():
    x = torch.tensor(0.3, dtype=torch.float64)
    agree([x, torch.tensor(1)], program("out t0 f64\nout 2.5 f64\n", "t0 = exp a0\n", 0))
    agree([torch.ones(3, 1), torch.ones(1, 4)], program("out 2 f32\nout 1 f32 sum=0\nout zero f32\n", "", compute="f32"))
    agree([torch.ones(3, 4)] * 2, program("out -inf f32\nout inf f32\nout nan f32\nout -0.1 f32\n", "", compute="f32"))


def test_a_sum_over_single_iterations_is_a_map():
    evaluation = agree([torch.randn(5, 1, dtype=torch.float64)] * 2, program("out t1 f64 sum=1\nout t0 f64\n"))
    assert [launch["entry"] for launch in evaluation.plan["launches"]] == ["wengert_map"]


def test_many_loops():
    shape = (2, 3, 2, 3, 2, 3)
    x = torch.randn(shape, dtype=torch.float64).permute(4, 1, 2, 5, 0, 3)
    y = torch.randn(1, 3, 1, 3, 1, 3, dtype=torch.float64)
    agree([x, y], program("out t1 f64\nout t1 f64 sum=1,4\nout t0 f64 sum=5\n", rank=6))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_64_bit_indices(layout):
    x = torch.randn(37, 12, dtype=torch.float64)
    evaluation = agree([x if layout == "rows" else x.t(), torch.ones(1, 1, dtype=torch.float64)], ALL_SUMS, narrow_index=100)
    assert all("using Index = std::int64_t" in launch["source"] for launch in evaluation.plan["launches"])


# ------------------------------------------------------------------------------------------------------------------------- sums
TWO_STAGES = {"iterations_per_lane": 1}


@pytest.mark.parametrize(
    "shape, axes",
    [((8192,), "0"), ((8191,), "0"), ((2, 4096), "1"), ((4099, 3), "0"), ((3, 500, 4), "0,1"), ((2, 700, 3), "1")],
    ids=str,
)
@pytest.mark.parametrize("order", range(3))
def test_sums_that_span_blocks(shape, axes, order):
    x = torch.randn(*shape)
    text = program(f"out a0 f32 sum={axes}\nout t0 bf16 sum={axes}\n", "t0 = square a0\n", len(shape), 1, "f32")
    evaluation = agree([x], text, tolerance={"rtol": 1e-5, "atol": 1e-4}, order=order, **TWO_STAGES)
    first, second = evaluation.plan["launches"]
    assert first["grid"][1] > 1 and second["grid"][1] == 1 and evaluation.plan["workspace_bytes"] > 0
    again = ptx_device.evaluate(text, [x], order=(order + 1) % 3, seed=5, **TWO_STAGES)
    assert all(torch.equal(a, b) for a, b in zip(again.results, evaluation.results, strict=True))


def test_a_long_sum_spans_blocks_on_its_own():
    x = torch.rand(140_003)
    evaluation = agree([x], program("out a0 f32 sum=0\n", "", 1, 1, "f32"), tolerance={"rtol": 1e-6, "atol": 0})
    assert len(evaluation.plan["launches"]) == 2
    assert evaluation.plan["bytes"] < 1.01 * evaluation.plan["minimum_bytes"]


def test_float32_sums_are_carried_in_double():
    x = torch.cat([torch.tensor([2.0**25]), torch.ones(1000)])
    (total,) = ptx_device.evaluate(program("out a0 f32 sum=0\n", "", 1, 1, "f32"), [x]).results
    assert total.item() == 2.0**25 + 1000


@pytest.mark.parametrize("limits", [{}, TWO_STAGES], ids=["one", "two"])
@pytest.mark.parametrize("axes", ["0", "1", "0,1"])
@pytest.mark.parametrize("shape", [(70, 64), (131, 3), (3, 1025)], ids=str)
def test_values_beside_their_sums(shape, axes, limits):
    """One pass stores the values and sums them, whatever order the outputs have."""
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape[1], shape[0], dtype=torch.float64).t()
    text = program(f"out t0 f64\nout t1 f32 sum={axes}\nout t1 bf16\nout t0 f64 sum={axes}\n")
    runs = [agree([x, y], text, order=order, tolerance={"rtol": 1e-6, "atol": 1e-4}, **limits) for order in range(3)]
    assert runs[0].plan["launches"][0]["entry"] == "wengert_sum" and len(runs[0].plan["launches"]) <= 2
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run.results, runs[0].results, strict=True))


# ---------------------------------------------------------------------------------------------------------------- element types
@pytest.mark.parametrize("compute", ["f32", "f64"])
@pytest.mark.parametrize("wanted", sorted(DTYPES))
def test_element_types(wanted, compute):
    operands = [torch.randint(0, 2 if given == "b8" else 90, (5, 23)).to(DTYPES[given]) for given in sorted(DTYPES)]
    operands = [x + 0.37 if x.is_floating_point() else x for x in operands]
    body = "".join(f"t{k} = mul a{k} 1.25\n" for k in range(len(operands)))
    outputs = "".join(f"out t{k} {wanted}\n" for k in range(len(operands)))
    exact = {"rtol": 0, "atol": 0}
    agree(operands, program(outputs, body, operands=len(operands), compute=compute), tolerance=exact)


@pytest.mark.parametrize("sums", ["", " sum=0"], ids=["map", "sum"])
def test_scalars_of_the_host_travel_in_the_parameters(sums):
    """No kernel may read them from memory: the addresses are not among what it may touch."""
    scalars = [torch.tensor(3).to(DTYPES[name]) for name in sorted(DTYPES)]
    x, count = torch.randn(4, 16, dtype=torch.float64), len(scalars)
    body = "t0 = mul a0 a1\n" + "".join(f"t{k} = add t{k - 1} a{k + 1}\n" for k in range(1, count))
    text = program(f"out t{count - 1} f64{sums}\n", body, operands=count + 1)
    (y,) = ptx_device.new_outputs(text, [x])
    operands = [(x.data_ptr(), "f64", [16, 1])]
    operands += [(s.data_ptr(), ptx_device.NAMES[s.dtype], [0, 0], True) for s in scalars]
    plan = ptx_device.cuda.plan(text, [4, 16], operands, [(y.data_ptr(), "f64", list(y.stride()), False)])
    ptx_device.execute(plan, [x, y])
    (expected,) = reference.evaluate([x, *(s.view(1, 1) for s in scalars)], text)
    torch.testing.assert_close(y, expected, **F64)
    assert plan["bytes"] == plan["minimum_bytes"] == 8 * (x.numel() + y.numel())


@pytest.mark.parametrize("wanted", ["bf16", "f16"])
def test_rounding_to_16_bits(wanted):
    values = [torch.linspace(-70000, 70000, 2003), torch.logspace(-30, 5, 1003), torch.tensor([float("nan"), float("inf"), -0.0])]
    agree([torch.cat(values)], program(f"out a0 {wanted}\n", "", 1, 1, "f32"), tolerance={"rtol": 0, "atol": 0})
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(DTYPES[wanted])[::7]
    agree([everything], program("out a0 f32\n", "", 1, 1, "f32"), tolerance={"rtol": 0, "atol": 0})


def test_special_values():
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-310, 1e300, -1.5, 88.8, -104.0, 710.0])
    names = "exp expm1 log log1p sqrt rsqrt tanh sigmoid softsign relu sign erf sin reciprocal square logsigmoid".split()
    body = "".join(f"t{k} = {name} a0\n" for k, name in enumerate(names))
    for dtype in ("f32", "f64"):
        outputs = "".join(f"out t{k} {dtype}\n" for k in range(len(names)))
        x = special.to(DTYPES[dtype])
        agree([x], program(outputs, body, 1, 1, dtype), tolerance={"rtol": 1e-6 if dtype == "f32" else 1e-13, "atol": 1e-300})


# --------------------------------------------------------------------------------------------------------- memory written to
@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "i32"])
@pytest.mark.parametrize("limits", [{}, TWO_STAGES], ids=["one", "two"])
def test_accumulating(dtype, limits):
    x, y = torch.randint(1, 4, (50, 64)).double(), torch.full((1, 1), 2.0, dtype=torch.float64)
    text = program(f"out t0 {dtype}\nout t0 {dtype} sum=0\nout a0 {dtype} sum=0,1\n")
    before = [torch.full((50, 64), 5), torch.full((1, 64), 7), torch.full((1, 1), 9)]
    before = [b.to(DTYPES[dtype]) for b in before]
    after = ptx_device.evaluate(text, [x, y], [b.clone() for b in before], accumulate=True, **limits).results
    for result, start, added in zip(after, before, reference.evaluate([x, y], text), strict=True):
        torch.testing.assert_close(result.double(), start.double() + added.double(), rtol=2**-7 if dtype == "bf16" else 0, atol=0)


def test_outputs_are_windows():
    """Rows and columns of larger arrays, where nothing beside the window may change."""
    x = torch.randn(6, 8, dtype=torch.float64)
    text = program("out t0 f64\nout t0 f64 sum=0\nout t0 f64 sum=1\n", "t0 = neg a0\n", operands=1)
    whole = torch.full((20, 30), 77.0, dtype=torch.float64)
    outputs = [whole[1:13:2, 3:11], whole[14:15, 0:24:3], whole[7:19:2, 12:13]]
    results = ptx_device.evaluate(text, [x], outputs).results
    for mine, theirs in zip(results, fused([x], text), strict=True):
        torch.testing.assert_close(mine, theirs)
    touched = torch.zeros(20, 30, dtype=torch.bool)
    for window in (touched[1:13:2, 3:11], touched[14:15, 0:24:3], touched[7:19:2, 12:13]):
        window.fill_(True)
    assert (whole[~touched] == 77).all()


def test_transposed_outputs():
    x, y = torch.randn(24, 17, dtype=torch.float64), torch.randn(1, 17, dtype=torch.float64)
    output = torch.empty(17, 24, dtype=torch.float64).t()
    agree([x, y], program("out t1 f64\n"), [output])
