"""Batched products of small matrices against einsum in double precision, for any strides, with and without a fused scale."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor
from wengert import _C

NAMES = {torch.float32: "f32", torch.float64: "f64"}


def plan(out: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None) -> dict | None:
    """All tensors have the batch's axes in front; `scale` has k after them."""
    *batch, m, n = out.shape
    return _C.cuda.plan_small_matmul(
        dtype=NAMES[out.dtype],
        batch=batch,
        m=m,
        n=n,
        k=a.shape[-1],
        a=a.data_ptr(),
        a_strides=list(a.stride()),
        b=b.data_ptr(),
        b_strides=list(b.stride()),
        scale=0 if scale is None else scale.data_ptr(),
        scale_strides=[] if scale is None else list(scale.stride()),
        out=out.data_ptr(),
        out_strides=list(out.stride()),
    )


def check(execute, a: Tensor, b: Tensor, scale: Tensor | None = None, out: Tensor | None = None, orders=(0, 1, 2)) -> dict:
    shape = [*a.shape[:-1], b.shape[-1]]
    out = torch.empty(shape, dtype=a.dtype) if out is None else out
    factor = torch.ones(()) if scale is None else scale.unsqueeze(-2)
    expected = (a.double() * factor.double()) @ b.double()
    magnitude = (a.double() * factor.double()).abs() @ b.double().abs()
    results = []
    for order in orders:
        out.fill_(torch.nan)
        launch = plan(out, a, b, scale)
        execute("small_matmul", launch, [x for x in (a, b, scale, out) if x is not None], order, seed=5)
        assert ((out.double() - expected).abs() <= 40 * torch.finfo(a.dtype).eps * magnitude).all()
        results.append(out.clone())
    assert all(torch.equal(result, results[0]) for result in results)
    return launch


SIDES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32]


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("m", SIDES)
def test_sides(execute, m, dtype):
    for n, k in itertools.product((1, 3, 8, 32), (1, 2, 7, 32)):
        check(execute, torch.randn(3, m, k, dtype=dtype), torch.randn(3, k, n, dtype=dtype), orders=(2,))
    for n in SIDES:
        check(execute, torch.randn(2, m, 5, dtype=dtype), torch.randn(2, 5, n, dtype=dtype), orders=(1,))


@pytest.mark.parametrize("batch", [1, 2, 15, 16, 17, 127, 128, 129, 200])
def test_batches(execute, batch):
    for m, n, k in ((4, 4, 4), (1, 1, 9), (3, 5, 2)):
        check(execute, torch.randn(batch, m, k), torch.randn(batch, k, n), torch.randn(batch, k))


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("shared", ["", "a", "b", "ab", "s", "as", "bs", "abs"])
def test_shared_matrices_and_scales(execute, shared, dtype):
    batch = 37

    def given(name, *shape):
        return torch.randn(1 if name in shared else batch, *shape, dtype=dtype).expand(batch, *shape)

    a, b, scale = given("a", 5, 6), given("b", 6, 7), given("s", 6)
    check(execute, a, b)
    check(execute, a, b, scale)
    check(execute, a, b, scale[:, :1].expand(-1, 6))


def test_strides(execute):
    a, b, scale = torch.randn(6, 9, 4).permute(1, 2, 0), torch.randn(5, 9, 6).permute(1, 2, 0), torch.randn(6, 9).t()
    check(execute, a, b, scale, out=torch.empty(4, 5, 9).permute(2, 0, 1))
    check(execute, a, b, scale, out=torch.empty(9, 7, 20)[:, 1:5, 2:12:2])
    check(execute, torch.randn(9, 1, 6).expand(9, 4, 6), torch.randn(9, 6, 1).expand(9, 6, 5), scale)
    reversed_rows = torch.randn(3, 4, 4)
    check(execute, reversed_rows.transpose(1, 2), reversed_rows)


def test_several_batch_loops(execute):
    a, b = torch.randn(2, 1, 3, 4, 6), torch.randn(1, 5, 3, 6, 2)
    check(execute, a.expand(2, 5, 3, 4, 6), b.expand(2, 5, 3, 6, 2), torch.randn(2, 5, 1, 6).expand(2, 5, 3, 6))
    check(execute, torch.randn(4, 6), torch.randn(6, 2))
    four = torch.randn(2, 2, 2, 2, 3, 3).permute(3, 2, 1, 0, 4, 5)
    check(execute, four, torch.randn(2, 2, 2, 2, 3, 3))
    contiguous = torch.randn(2, 2, 2, 2, 2, 2, 3, 3)
    check(execute, contiguous, contiguous)


def test_zero_size(execute):
    for batch, m, n, k in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)):
        launch = check(execute, torch.randn(batch, m, k), torch.randn(batch, k, n))
        assert launch["grid"][0] == launch["bytes_read"] == launch["bytes_written"] == 0
    check(execute, torch.randn(2, 3, 0), torch.randn(2, 0, 4), torch.randn(2, 0))


def test_rounding_does_not_depend_on_the_batch(execute):
    a, b, scale = torch.randn(150, 6, 9), torch.randn(150, 9, 7), torch.randn(150, 9)
    whole, single = torch.empty(150, 6, 7), torch.empty(1, 6, 7)
    execute("small_matmul", plan(whole, a, b, scale), [a, b, scale, whole])
    for i in (0, 1, 77, 149):
        one = [x[i : i + 1] for x in (a, b, scale)]
        execute("small_matmul", plan(single, *one), [*one, single])
        assert torch.equal(single[0], whole[i])


def test_nothing_leaks_between_products(execute):
    """An infinity stays in its own product, and in its own row, column and k."""
    a, b = torch.randn(40, 3, 5), torch.randn(40, 5, 3)
    a[7, 1, 2] = torch.inf
    out = torch.empty(40, 3, 3)
    execute("small_matmul", plan(out, a, b), [a, b, out])
    finite = torch.ones(40, 3, 3, dtype=torch.bool)
    finite[7, 1] = False
    assert torch.equal(out.isfinite(), finite)


def test_what_the_kernel_does_not_take():
    def of(batch, m, n, k, dtype="f32", strides=None):
        rank = len(batch)
        return _C.cuda.plan_small_matmul(
            dtype=dtype, batch=batch, m=m, n=n, k=k, a=0, a_strides=[1] * (rank + 2), b=0, b_strides=[2] * (rank + 2), out=0,
            out_strides=strides or [3] * (rank + 2),
        )  # fmt: skip

    assert of([4], 32, 32, 32) is not None
    assert of([4], 33, 1, 1) is of([4], 1, 33, 1) is of([4], 1, 1, 33) is None
    assert of([2] * 4, 3, 3, 3) is not None and of([2] * 5, 3, 3, 3) is None
    with pytest.raises(ValueError, match="f32 and f64 only"):
        of([4], 3, 3, 3, "bf16")
    with pytest.raises(ValueError, match="do not match"):
        of([4], 3, 3, 3, strides=[1, 1])


def test_bytes_are_the_minimum():
    """Shared matrices are counted once, and so is what a stride of 0 repeats."""
    a, b, scale, out = torch.randn(100, 5, 6), torch.randn(6, 7).expand(100, 6, 7), torch.randn(100, 6), torch.empty(100, 5, 7)
    launch = plan(out, a, b, scale)
    assert launch["bytes_read"] == 4 * (100 * 5 * 6 + 6 * 7 + 100 * 6)
    assert launch["bytes_written"] == 4 * 100 * 5 * 7


def test_large_plans():
    """Offsets beyond 2^31 elements need no other kernel: those of the batch are 64-bit always."""
    batch = 2**31
    launch = _C.cuda.plan_small_matmul(
        dtype="f64",
        batch=[batch],
        m=4,
        n=4,
        k=4,
        a=0,
        a_strides=[16, 4, 1],
        b=0,
        b_strides=[0, 4, 1],
        out=0,
        out_strides=[16, 4, 1],
    )
    assert launch["grid"] == (batch // 32, 1, 1) and launch["bytes_written"] == 128 * batch
    sides = itertools.product((1, 4, 32), repeat=3)
    for m, n, k in sides:
        launch = plan(torch.empty(500, m, n), torch.empty(500, m, k), torch.empty(500, k, n))
        assert launch["shared_bytes"] + 4096 <= 48 * 1024, "what needs no opt-in"
        assert launch["block"] == (128, 1, 1) and launch["grid"][0] >= 500 / 128


def test_multiplications_read_vectors(ptx_of):
    text = ptx_of("small_matmul")
    for entry, width in (("small_matmul_f32_8", "v4.f32"), ("small_matmul_f64_8", "v2.f64")):
        body = text[text.index(f".entry {entry}(") :].split("\n}", 1)[0]
        assert re.search(rf"ld\.shared\.{re.escape(width)}", body)
