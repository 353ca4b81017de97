"""The engine on a device that launches the static kernels: what they compute, when they are launched, and what they spare."""

from __future__ import annotations

import itertools

import pytest
import torch
import wengert
from support.long_programs import agree_relatively
from torch import Tensor
from torch.nn import functional as F


def check_gradient(fn, *inputs: Tensor, cotangent=None, tolerance=None) -> None:
    y = fn(*inputs)
    ct = torch.randn_like(y) if cotangent is None else cotangent
    expected = torch.autograd.grad(y, inputs, ct, retain_graph=True)
    torch.testing.assert_close(wengert.grad(y, inputs, ct, retain_graph=True), expected, rtol=tolerance, atol=tolerance)


def check_jacobian(fn, *inputs: Tensor) -> None:
    expected = torch.autograd.functional.jacobian(fn, inputs)
    torch.testing.assert_close(tuple(wengert.jacobian(fn(*inputs), list(inputs))), expected)


def leaf(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


# ---------------------------------------------------------------------------------------------------------- sums at indices
INDEX = torch.tensor([3, 0, 3, 8, 3, 1])
GRID = torch.tensor([[3, 0, 3, 8], [1, 1, 10, 3]])


@pytest.mark.parametrize("index", [INDEX, GRID], ids=["vector", "matrix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_embedding_gradient_is_one_segment_sum_over_memory_that_nothing_filled(static_launches, index, dtype):
    weight = leaf(11, 6, dtype=dtype)
    check_gradient(lambda w: F.embedding(index, w), weight, tolerance=None if dtype.itemsize > 2 else 4e-2)
    assert static_launches.stems() == ["segment_sum"]
    assert sum(static_launches.nests) == 1, "negative positions"
    size, (launch,) = dtype.itemsize, static_launches
    assert launch["bytes_read"] == size * index.numel() * 6 + 8 * (index.numel() + 12), "reads no zeros"
    assert launch["bytes_written"] == size * 11 * 6


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_index_select(static_launches, axis):
    x = leaf(4, 4, 4)
    check_gradient(lambda x: x.index_select(axis, torch.tensor([1, 1, 3, 0, 1])), x)
    assert static_launches.stems() == ["segment_sum"]
    check_jacobian(lambda x: x.index_select(axis, torch.tensor([2, 0, 2])), x)
    assert static_launches.stems() == ["segment_sum"], "a row for each index"


GATHER = torch.tensor([[0, 2], [1, 1], [3, 0]])

INDEXED = {
    "gather": (lambda x: x.gather(1, GATHER), (3, 4)),
    "gather_rows": (lambda x: x.gather(0, GATHER), (4, 2)),
    "take_along_dim": (lambda x: torch.take_along_dim(x, GATHER, 1), (3, 4)),
    "embedding": (lambda w: F.embedding(GRID, w), (11, 3)),
    "item": (lambda x: x[INDEX], (9, 2)),
    "pairs": (lambda x: x[GATHER[:, 0], GATHER[:, 1]], (4, 4)),
    "index_put": (lambda x: torch.zeros(9, 2).index_put((INDEX,), x, accumulate=True), (6, 2)),
    "index_put_of_indexed": (lambda x: torch.zeros(9, 2).index_put((INDEX,), 2.5 * x[INDEX].sin(), accumulate=True), (9, 2)),
    "index_add": (lambda x: torch.zeros(9, 2).index_add(0, INDEX, x), (6, 2)),
    "scatter_add": (lambda x: torch.zeros(3, 5).scatter_add(1, GATHER, x), (3, 2)),
    "part_of_rows": (lambda w: F.embedding(GRID, w[:, :2]), (11, 5)),
    "int32": (lambda w: F.embedding(INDEX.int(), w), (9, 3)),
    "padded": (lambda w: F.embedding(INDEX, w, padding_idx=3), (9, 3)),
    "from_the_end": (lambda w: w[[-1, 0, -1]], (4, 3)),
    "rows_of_rows": (lambda w: w[1:6][torch.tensor([0, 0, 3])], (9, 3)),
    "twice": (lambda w: w[INDEX] * w[INDEX.flip(0)], (9, 3)),
}
# Their gradients read at positions; they put nothing.
READING = {"index_put", "index_add", "scatter_add"}


@pytest.mark.parametrize("name", INDEXED)
def test_indexed_gradients(static_launches, name):
    fn, shape = INDEXED[name]
    check_gradient(fn, leaf(*shape))
    assert ("segment_sum" in static_launches.stems()) == (name not in READING)


@pytest.mark.parametrize("name", INDEXED)
def test_indexed_jacobians(static_launches, name):
    """Each row has places of its own, so that nothing is summed, unless the rows are at indices themselves."""
    fn, shape = INDEXED[name]
    check_jacobian(fn, leaf(*shape))
    assert ("segment_sum" in static_launches.stems()) == (name == "index_put_of_indexed")


def test_same_bits_again_and_in_any_order_of_duplicates(static_launches):
    weight, ct = leaf(5, 3), torch.randn(400, 3)
    y = weight[torch.randint(5, (400,))]
    first, second = (wengert.grad(y, weight, ct, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and static_launches.stems() == ["segment_sum"] * 2


def test_rows_of_too_many_loops_are_summed_by_pytorch(static_launches):
    weight, index = leaf(4, 2, 3, 2, 3, 2), torch.tensor([1, 1, 3])
    ct = torch.randn(2, 3, 2, 3, 2, 3).permute(5, 4, 3, 2, 1, 0)
    assert ct.shape == (3, 2, 3, 2, 3, 2)
    spread = torch.randn(6, 6, 6, 6, 6, 6)[::2, ::3, ::2, ::3, ::2, ::3]
    for cotangent in (ct, spread):  # of which no two loops are one
        check_gradient(lambda w: w[index], weight, cotangent=cotangent)
    assert static_launches.stems() == []


def test_many_empty_short_segments_are_left_to_pytorch(static_launches):
    x = leaf(70_000)
    check_gradient(lambda x: x[torch.tensor([5, 69_999, 5])], x)
    assert static_launches.stems() == []


def test_rows_in_graphs_of_derivatives(static_launches):
    weight = leaf(9, 2)
    y = (weight[INDEX] ** 3).sum()
    (ours,) = wengert.grad(y, weight, create_graph=True)
    (theirs,) = torch.autograd.grad(y, weight, create_graph=True)
    torch.testing.assert_close(ours, theirs)
    second = [torch.autograd.grad(first.sin().sum(), weight, retain_graph=True) for first in (ours, theirs)]
    torch.testing.assert_close(*second)


ONE_A_ROW = {
    "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor([2, 0, 0, 1]), reduction="none"),
    "largest": lambda x: x.max(1).values * x[:, 0],
    "smallest": lambda x: x.min(0).values.exp(),
    "median": lambda x: x.median(1).values,
    "gather": lambda x: x.gather(1, torch.tensor([[2], [0], [0], [1]])).sin(),
    "pairs": lambda x: x[torch.arange(4), torch.tensor([2, 0, 0, 1])].square(),
}
# Positions from tensors, of which nothing is known.
UNKNOWN = {"pairs"}


@pytest.mark.parametrize("name", ONE_A_ROW)
def test_one_index_a_row_is_added_without_sorting(static_launches, name):
    fn, x = ONE_A_ROW[name], leaf(4, 3)
    check_gradient(fn, x)
    check_jacobian(fn, x)
    assert ("segment_sum" in static_launches.stems()) == (name in UNKNOWN)


# ------------------------------------------------------------------------------------------------------------- products
def mlp(*sizes: int, activation=torch.nn.Tanh, dtype=torch.float32) -> torch.nn.Sequential:
    layers = []
    for n, m in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(n, m, dtype=dtype), activation()]
    return torch.nn.Sequential(*layers[:-1])


def batch_jacobian(net, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(net))(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [torch.nn.Tanh, torch.nn.Sigmoid, torch.nn.Softplus])
def test_batched_jacobian_of_dense_layers_scales_in_the_product(static_launches, activation, dtype):
    net, x = mlp(3, 16, 16, 5, activation=activation, dtype=dtype), torch.randn(8, 3, dtype=dtype)
    torch.testing.assert_close(wengert.batch_jacobian(net, x), batch_jacobian(net, x))
    assert static_launches.stems() == ["small_matmul"]
    # The derivative of the activation once per sample, the product without a scaled copy of the last layer.
    y = net(x.requires_grad_())
    assert " * " in next(line for line in wengert._C.plan([y], [x], "vmap").splitlines() if line.startswith("matmul"))


def test_deeper_nets_scale_in_every_product(static_launches):
    net, x = mlp(4, 24, 24, 24, 6), torch.randn(6, 4)
    torch.testing.assert_close(wengert.batch_jacobian(net, x), batch_jacobian(net, x))
    assert static_launches.stems() == ["small_matmul"] * 2


def test_scaled_products_in_graphs_of_derivatives(static_launches):
    net, x = mlp(3, 16, 16, 5, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    ours = wengert.batch_jacobian(net, x, create_graph=True)
    theirs = torch.func.vmap(torch.func.jacrev(net))(x)
    torch.testing.assert_close(ours, theirs)
    weights = [x, *net.parameters()]
    for a, b in zip(*(torch.autograd.grad(j.square().sum(), weights, materialize_grads=True) for j in (ours, theirs))):
        torch.testing.assert_close(a, b)


def test_wide_layers_and_single_rows_are_the_librarys(static_launches):
    for net, batch in ((mlp(3, 40, 40, 5), 8), (mlp(3, 32, 32, 2), 20)):
        x = torch.randn(batch, 3)
        torch.testing.assert_close(wengert.batch_jacobian(net, x), batch_jacobian(net, x))
        y = net(x.requires_grad_())
        assert "matmul" in wengert._C.plan([y], [x], "vmap")
    assert static_launches.stems() == []


@pytest.mark.parametrize("create_graph", [False, True])
def test_scaled_products_over_several_loops_are_multiplied_by_pytorch(static_launches, create_graph):
    """The sum runs over two axes that lie in memory in no common order."""
    inner, outer = torch.randn(16, 16), torch.randn(4, 4, 5).permute(2, 1, 0)

    def fn(x):
        return ((x @ inner).tanh().view(*x.shape[:-1], 1, 4, 4) * outer).sum((-1, -2))

    x = torch.randn(8, 16, requires_grad=True)
    torch.testing.assert_close(wengert.batch_jacobian(fn, x, create_graph=create_graph), batch_jacobian(fn, x))
    assert " * " in next(line for line in wengert._C.plan([fn(x)], [x], "vmap").splitlines() if line.startswith("matmul"))
    assert static_launches.stems() == []


def test_tiny_nets_are_fused_nests(static_launches):
    net, x = mlp(3, 16, 16, 1), torch.randn(5, 3)
    torch.testing.assert_close(wengert.batch_jacobian(net, x), batch_jacobian(net, x))
    assert static_launches.stems() == [] and sum(static_launches.nests) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched_products(static_launches, dtype):
    a, b = leaf(20, 8, 9, dtype=dtype), leaf(20, 9, 7, dtype=dtype)
    check_gradient(torch.bmm, a, b)
    assert static_launches.stems() == ["small_matmul"] * 2
    static_launches.clear()
    check_gradient(lambda a, b: (a.transpose(1, 2) @ b)[:, 1::2], leaf(20, 9, 16, dtype=dtype), b)
    assert sorted(static_launches.stems()) == ["materialize", "small_matmul", "small_matmul"], "the skipped rows are zero"


def test_chain_of_batched_products(static_launches):
    a, b, c = leaf(12, 9, 9), leaf(12, 9, 9), leaf(12, 9, 9)
    check_gradient(lambda a, b, c: torch.bmm(torch.bmm(a, b).sin(), c), a, b, c)
    assert static_launches.stems() == ["small_matmul"] * 4


def test_one_product_and_large_sides_are_the_librarys(static_launches):
    check_gradient(torch.mm, leaf(30, 30), leaf(30, 30))
    check_gradient(torch.bmm, leaf(3, 33, 20), leaf(3, 20, 20))
    assert static_launches.stems() == []


def test_half_precision_products_are_the_librarys(static_launches):
    check_gradient(torch.bmm, leaf(20, 8, 9, dtype=torch.bfloat16), leaf(20, 9, 8, dtype=torch.bfloat16), tolerance=0.2)
    assert static_launches.stems() == []


# ------------------------------------------------------------------------------------------------------------ dense arrays
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (7, 4), (2, 3, 4)])
def test_jacobian_of_a_linear_function_is_one_pass(static_launches, shape, dtype):
    a, b = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    check_jacobian(lambda x: a * x + b, leaf(*shape, dtype=dtype))
    assert static_launches.stems() == ["materialize"] and static_launches.nests == []
    (launch,) = static_launches
    assert launch["bytes_written"] == dtype.itemsize * a.numel() ** 2 and launch["bytes_read"] == dtype.itemsize * a.numel()


A = torch.randn(6)

LINEAR = {
    "broadcast": (lambda x: (A * x).expand(3, 6), (6,)),
    "reversed": (lambda x: (A * x).flip(0), (6,)),
    "sliced": (lambda x: A[::2] * x[::2], (6,)),
    "both_ends": (lambda x: torch.cat((A * x, x * A.flip(0))), (6,)),
    "stencil": (lambda x: A[1:5] * x[1:5] + A[:4] * x[:4] + A[2:] * x[2:], (6,)),
    "rows": (lambda x: x @ torch.linspace(0, 1, 6), (3, 6)),
    "matrix": (lambda x: torch.linspace(0, 1, 24).view(4, 6) @ x, (6, 2)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_jacobians(static_launches, name):
    fn, shape = LINEAR[name]
    check_jacobian(fn, leaf(*shape))
    assert static_launches.stems().count("materialize") == 1


def test_later_writes_stand_on_top(static_launches):
    x = leaf(6)
    check_jacobian(lambda x: torch.cat((A * x, x.sin(), 3 + x)), x)
    check_jacobian(lambda x: A * x + x.sin().flip(0), x)
    assert set(static_launches.stems()) <= {"materialize"}


def test_python_numbers_are_no_memory_of_the_device(static_launches):
    check_jacobian(lambda x: 2.5 * x + 1, leaf(5))
    check_jacobian(lambda x: x + 1, leaf(5))


def test_the_engine_plans_anew_for_a_device_without_static_kernels(static_launches):
    net, x = mlp(3, 16, 16, 5), torch.randn(8, 3)
    y = net(x.requires_grad_())
    assert " * " in wengert._C.plan([y], [x], "vmap")
    wengert.batch_jacobian(net, x)
    launched = len(static_launches)
    assert launched > 0
    wengert._C.evaluate_with(None)
    assert " * " not in wengert._C.plan([y], [x], "vmap")
    torch.testing.assert_close(wengert.batch_jacobian(net, x), batch_jacobian(net, x))
    assert len(static_launches) == launched


# --------------------------------------------------------------------------------------------------------------- long programs
def cosines(x: Tensor, steps: int) -> Tensor:
    """A step's derivative comes close to -1, so that thousands of them leave a number."""
    for _ in range(steps):
        x = x.cos() * 1.3195
    return x


def euler(x: Tensor, steps: int) -> Tensor:
    """Every state is read twice."""
    for _ in range(steps):
        x = x + 0.01 * x.sin()
    return x


def leapfrog(x: Tensor, steps: int) -> Tensor:
    q, p = x, x.cos()
    for _ in range(steps):
        p = p - 0.05 * q.sin()
        q = q + 0.05 * p
    return q


def mixed(x: Tensor, steps: int) -> Tensor:
    functions = [torch.sin, torch.cos, torch.tanh, torch.sigmoid, torch.square, torch.exp]
    for k in range(steps):
        x = functions[(k * k + 3 * k) // 7 % 6](x) - 0.5
    return x


@pytest.mark.parametrize("steps", [65, 400])
@pytest.mark.parametrize("fn", [cosines, euler, leapfrog, mixed], ids=lambda fn: fn.__name__)
def test_pointwise_jacobian_of_a_long_chain_is_one_launch(static_launches, fn, steps):
    x = torch.linspace(0.1, 0.9, 40, dtype=torch.float64).requires_grad_()
    y = fn(x, steps)
    ours = wengert.jacobian(y, x)
    assert static_launches.nests == [1] and not static_launches
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    agree_relatively(ours.diagonal(), expected, 1e-10)
    static_launches.nests.clear()
    agree_relatively(wengert.grad(y.sum(), x, retain_graph=True)[0], expected, 1e-10)
    assert static_launches.nests == [1] and not static_launches


@pytest.mark.parametrize("fn", [cosines, euler], ids=lambda fn: fn.__name__)
def test_operands_beyond_a_kernels_parameters_are_written_to_memory_first(static_launches, fn):
    x = torch.linspace(0.1, 0.9, 5, dtype=torch.float64).requires_grad_()
    steps = 3000  # a saved tensor and a number each: 72 kB of addresses and strides, 32 kB a launch
    y = fn(x, steps)
    ours = wengert.jacobian(y, x)
    assert static_launches.nests == [1 + 3] and not static_launches
    agree_relatively(ours.diagonal(), torch.autograd.grad(y.sum(), x)[0], 1e-10)


def test_values_that_several_need_stay_in_registers(static_launches):
    """Parameters of each step: eight results a launch, one of them what the next launch goes on from."""
    x, weights = leaf(6), [leaf(6) for _ in range(21)]
    y = x
    for weight in weights:
        y = (y * weight).sin()
    inputs = (x, *weights)
    ours = wengert.grad(y.sum(), inputs, retain_graph=True)
    assert len(static_launches.nests) <= 4
    torch.testing.assert_close(ours, torch.autograd.grad(y.sum(), inputs))


def test_values_that_are_results_are_stored_too(static_launches):
    x = leaf(6)
    y = euler(x, 20)
    z = euler(y, 20).sum()
    ours = wengert.grad(z, (x, y), retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(z, (x, y)))
    assert static_launches.nests == [1]


def test_sums_are_taken_where_their_terms_are_computed(static_launches):
    """The gradients of a scale and a shift, over the same axis, and that of the input."""
    x, scale, shift = leaf(7, 5), leaf(5), leaf(5)
    check_gradient(lambda x, scale, shift: (x.sin() * scale + shift).tanh().exp(), x, scale, shift)
    assert static_launches.nests == [1]


def test_values_of_half_precision_are_rounded_in_memory(static_launches):
    x = leaf(6, dtype=torch.bfloat16)
    check_gradient(lambda x: euler(x, 9).float() * x.cos(), x, tolerance=4e-2)


def test_nests_that_do_not_run_alike_stay_apart(static_launches):
    x = leaf(6, 4, dtype=torch.float64)
    for fn in (
        lambda x: (x.sin() * x.sum(0)).cos() * x.sum(1, keepdim=True),
        lambda x: (x.flip(0).sin() * x).tanh() * x.cos() + x.roll(1, 0) * x.exp(),
        lambda x: euler(x, 9)[1:] * euler(x, 9)[:-1],
        lambda x: torch.cat((euler(x, 9), x.sin() * x[:2].sum())),
        lambda x: (euler(x, 9) @ torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)).sin(),
        lambda x: x[torch.tensor([0, 0, 3])].sin() * euler(x, 9)[:3],
        lambda x: euler(x.float(), 9).double() * euler(x, 9),
    ):
        check_gradient(fn, x)
        check_jacobian(fn, x)
