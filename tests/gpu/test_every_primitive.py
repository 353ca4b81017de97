"""Generated kernels on a GPU, whose elementary functions and divisions are its own: every primitive, layout and storage type."""

import itertools

import pytest
import torch
from support.long_programs import agree_relatively, product_of_sines, random_program, values
from support.primitives import (
    DTYPES,
    LONG_SUMS,
    PACKS,
    M,
    N,
    agree,
    broadcast,
    close,
    contiguous,
    long_program,
    many_operands,
    program,
    strided,
)
from wengert import reference

fused = torch.ops.wengert.fused


def on(gpu, operands):
    """Copies with the same strides."""
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=gpu).copy_(x) for x in operands]


def back(results):
    return [result.cpu() for result in results]


@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: f"{pack[0]}-{pack[-1]}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, strided, broadcast], ids=lambda layout: layout.__name__)
def test_primitives(gpu, pack, dtype, layout):
    with torch.device("cpu"):
        operands, text = layout(DTYPES[dtype]), program(pack, dtype)
        agree(back(fused(on(gpu, operands), text)), operands, text, dtype)


@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: f"{pack[0]}-{pack[-1]}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_primitives(gpu, pack, dtype):
    with torch.device("cpu"):
        operands, text = contiguous(DTYPES[dtype]), program(pack, dtype, [" sum=0", " sum=1"])
        agree(back(fused(on(gpu, operands), text)), operands, text, dtype, scale=N * M)


@pytest.mark.parametrize("seed", range(24))
def test_long_programs(gpu, seed):
    """Loops over what repeats, and functions of a stretch each."""
    with torch.device("cpu"):
        text, operands = random_program(seed)
        for mine, twin in zip(back(fused(on(gpu, operands), text)), reference.evaluate(operands, text), strict=True):
            agree_relatively(mine, twin)


@pytest.mark.parametrize("sums", ["", " sum=0", " sum=1"])
def test_operands_beyond_a_kernels_parameters(gpu, sums):
    with torch.device("cpu"):
        text, operands = product_of_sines(6000, rank=2).rstrip("\n") + sums + "\n", values(6000, (33, 5))
        (mine,), (twin,) = back(fused(on(gpu, operands), text)), reference.evaluate(operands, text)
        agree_relatively(mine, twin)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("sums", LONG_SUMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_operands(gpu, dtype, sums, transposed):
    with torch.device("cpu"):
        operands, text = many_operands(DTYPES[dtype], transposed), long_program(dtype, sums)
        agree(back(fused(on(gpu, operands), text)), operands, text, dtype, scale=N * M)


SIZES = [(1, 1), (3, 5), (1, 100_003), (100_003, 1), (257, 1025), (5000, 7), (7, 5000), (2, 3_000_001)]
AXES = ["0", "1", "0,1"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, axes", list(itertools.product(SIZES, AXES)), ids=str)
def test_sums_of_every_shape(gpu, size, axes, dtype):
    """Rows and columns, within a block and over several: the sum and, from the same pass, its terms."""
    with torch.device("cpu"):
        x, y = torch.randn(size).to(DTYPES[dtype]), torch.randn(size).to(DTYPES[dtype])
    compute = "f64" if dtype == "f64" else "f32"
    text = f"fused v1 rank=2 operands=2 compute={compute}\nt0 = mul a0 a1\nout t0 {dtype} sum={axes}\nout t0 {dtype}\n"
    wanted = x.double() * y.double()
    for a, b in ([x, y], [x.t().contiguous().t(), y]):
        total, terms = back(fused([a.to(gpu), b.to(gpu)], text))
        tolerance = {"f32": 1e-6, "f64": 1e-12, "bf16": 2**-8, "f16": 2**-11}[dtype]
        close(terms.double(), wanted, tolerance)
        axis = [int(k) for k in axes.split(",")]
        bound = wanted.abs().sum(axis, keepdim=True)
        error = (total.double() - wanted.sum(axis, keepdim=True)).abs()
        assert (error <= tolerance * (bound + 1) + tolerance * wanted.sum(axis, keepdim=True).abs()).all()


def test_more_elements_than_32_bits_count(gpu):
    count = 2**31 + 4096
    x = torch.zeros(count, dtype=torch.int8, device=gpu)
    x[-1], x[2**31 - 1] = 7, 5
    (y,) = fused([x], "fused v1 rank=1 operands=1 compute=f64\nt0 = add a0 a0\nout t0 i8\n")
    assert y[-1] == 14 and y[2**31 - 1] == 10 and int(y[: 2**31 - 1].abs().max()) == 0
    del y
    (total,) = fused([x], "fused v1 rank=1 operands=1 compute=f64\nout a0 f64 sum=0\n")
    assert total.item() == 12
