"""Generated CUDA kernels, executed from their PTX: every primitive, layout and storage type, against the CPU kernel and torch."""

import pytest
import torch
from support import ptx_device
from support.primitives import (
    ARGUMENTS,
    DTYPES,
    LONG_SUMS,
    PACKS,
    M,
    N,
    agree,
    broadcast,
    contiguous,
    long_program,
    many_operands,
    program,
    strided,
)
from wengert import reference


def test_every_primitive_is_packed():
    assert set(ARGUMENTS) == set(reference.PRIMITIVES)


@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: f"{pack[0]}-{pack[-1]}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, strided, broadcast], ids=lambda layout: layout.__name__)
def test_primitives(pack, dtype, layout):
    operands = layout(DTYPES[dtype])
    text = program(pack, dtype)
    evaluation = ptx_device.evaluate(text, operands)
    assert len(evaluation.plan["launches"]) == 1
    agree(evaluation.results, operands, text, dtype)


@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: f"{pack[0]}-{pack[-1]}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_primitives(pack, dtype):
    operands = contiguous(DTYPES[dtype])
    text = program(pack, dtype, [" sum=0", " sum=1"])
    runs = [ptx_device.evaluate(text, operands, order=order, seed=7).results for order in range(3)]
    agree(runs[0], operands, text, dtype, scale=N * M)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("sums", LONG_SUMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_operands(dtype, sums, transposed):
    operands, text = many_operands(DTYPES[dtype], transposed), long_program(dtype, sums)
    evaluation = ptx_device.evaluate(text, operands)
    source = evaluation.plan["launches"][0]["source"]
    assert "kStreamed = true" in source and "call_atan2" in source
    agree(evaluation.results, operands, text, dtype, scale=N * M)
