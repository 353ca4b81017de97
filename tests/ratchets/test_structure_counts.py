"""How much structure the engine keeps: exact counts per problem, so that a regression and an improvement both show."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
import wengert
from support.check import DEVICE
from wengert import _C


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one derivative costs; on a second call the plan is found again and everything else stays."""

    blocks: int  # blocks that reached an input
    losses: int  # structure given up, for any reason
    launches: int  # kernel launches
    matmuls: int
    node_calls: int


def rows(*shape: int) -> torch.Tensor:
    return torch.linspace(-0.9, 1.1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def pointwise(x):
    return (x.sin() * x.exp() + x.square()).tanh()


def heat2d(u):
    inner = u[1:-1, 1:-1]
    return inner + 0.1 * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * inner)


def lorenz96(x):
    return (x.roll(-1) - x.roll(2)) * x.roll(1) - x + 8.0


def cart_pole(state):
    _, v, angle, spin = state.unbind(-1)
    sin, cos = angle.sin(), angle.cos()
    push = 0.05 * spin.square() * sin
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos.square()))
    return torch.stack([v, push - 0.05 * turn * cos, spin, turn], -1)


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


def mlp(x):
    return (x @ rows(4, 6)).tanh() @ rows(6, 3)


def wide_mlp(x):
    return (x @ rows(48, 64)).tanh() @ rows(64, 32)


def residual_mlp(x):
    return x + (x @ rows(4, 6)).tanh() @ rows(6, 4)


def softmax(x):
    return x.softmax(-1)


def cross_entropy(x):
    return torch.nn.functional.cross_entropy(x, torch.arange(x.shape[0]) % x.shape[1])


def layer_norm(x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


def layer_norm_weights(w):
    return torch.nn.functional.layer_norm(rows(5, 4), (4,), w)


def batch_norm(x):
    return torch.nn.functional.batch_norm(x, rows(4), 1 + rows(4).square(), rows(4))


def gather(x):
    return x[torch.tensor([2, 0, 5, 5, 1])] * 2


def convolution(x):
    return torch.nn.functional.conv1d(x, rows(2, 1, 3))


def convolution_weights(w):
    return torch.nn.functional.conv1d(rows(3, 2, 9), w, padding=1)


def embedding(w):
    return torch.nn.functional.embedding(torch.tensor([[2, 0, 5], [5, 1, 2]]), w) * 2


def rollout(x):
    """Every state is read twice: what is computed for both stays in one nest."""
    for _ in range(15):
        x = x + 0.1 * x.sin()
    return x


def attention(x):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def gradient(y, x):
    return wengert.grad(y.sum(), x, retain_graph=True)


J, H = wengert.jacobian, wengert.hessian
CASES = {
    "pointwise": (J, pointwise, rows(40), Counts(blocks=1, losses=0, launches=1, matmuls=0, node_calls=0)),
    "rollout": (J, rollout, rows(8), Counts(blocks=1, losses=0, launches=1, matmuls=0, node_calls=0)),
    "heat2d": (J, heat2d, rows(8, 8), Counts(blocks=5, losses=0, launches=1, matmuls=0, node_calls=0)),
    "lorenz96": (J, lorenz96, rows(12), Counts(blocks=7, losses=0, launches=6, matmuls=0, node_calls=0)),
    "cart-pole": (J, cart_pole, rows(5, 4), Counts(blocks=6, losses=0, launches=1, matmuls=0, node_calls=0)),
    "mlp": (J, mlp, rows(5, 4), Counts(blocks=1, losses=0, launches=2, matmuls=0, node_calls=0)),
    "wide mlp": (J, wide_mlp, rows(16, 48), Counts(blocks=1, losses=0, launches=3, matmuls=1, node_calls=0)),
    "residual mlp": (J, residual_mlp, rows(5, 4), Counts(blocks=2, losses=0, launches=3, matmuls=0, node_calls=0)),
    "softmax": (J, softmax, rows(5, 4), Counts(blocks=2, losses=0, launches=2, matmuls=0, node_calls=0)),
    "layer norm": (J, layer_norm, rows(5, 4), Counts(blocks=1, losses=1, launches=2, matmuls=0, node_calls=1)),
    "norm weights": (J, layer_norm_weights, rows(4), Counts(blocks=1, losses=0, launches=1, matmuls=0, node_calls=0)),
    "batch norm": (J, batch_norm, rows(5, 4), Counts(blocks=1, losses=0, launches=1, matmuls=0, node_calls=0)),
    "attention": (J, attention, rows(1, 2, 5, 4), Counts(blocks=3, losses=0, launches=5, matmuls=0, node_calls=0)),
    "gather": (J, gather, rows(6), Counts(blocks=1, losses=0, launches=3, matmuls=0, node_calls=0)),
    "convolution": (J, convolution, rows(3, 1, 9), Counts(blocks=1, losses=2, launches=2, matmuls=0, node_calls=1)),
    "kernel": (J, convolution_weights, rows(2, 2, 3), Counts(blocks=1, losses=0, launches=1, matmuls=0, node_calls=0)),
    "embedding gradient": (gradient, embedding, rows(6, 4), Counts(blocks=1, losses=0, launches=2, matmuls=0, node_calls=0)),
    "rosenbrock": (H, rosenbrock, rows(10), Counts(blocks=6, losses=0, launches=4, matmuls=0, node_calls=0)),
    "cross entropy": (H, cross_entropy, rows(5, 4), Counts(blocks=3, losses=0, launches=5, matmuls=0, node_calls=1)),
}


# A device with kernels of its own for sums at indices counts each of them too; a CPU adds in place.
LAUNCHED_SUMS = {"embedding gradient": 1}


@pytest.mark.parametrize("name", CASES)
def test_structure_counts(name):
    derivative, function, point, expected = CASES[name]
    if DEVICE.type == "cuda":
        if name == "attention":
            pytest.skip("only the CPU's kernel is read as what it is composed of")
        expected = dataclasses.replace(expected, launches=expected.launches + LAUNCHED_SUMS.get(name, 0))
    x = point.clone().requires_grad_()
    y = function(x)
    planning, running = counted(derivative, y, x), counted(derivative, y, x)
    found = Counts(
        blocks=planning["blocks"],
        losses=planning["densified"],
        **{key: planning[key] for key in ("launches", "matmuls", "node_calls")},
    )
    assert found == expected, "better or worse: look, and then write the new counts down"
    # The second call finds every plan of the first, and runs it alike.
    assert (running["plan_hits"], running["plan_misses"]) == (planning["plan_misses"], 0)
    for key in ("launches", "matmuls", "node_calls", "takes"):
        assert running[key] == planning[key], key


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the portions are of a CPU's caches")
def test_a_called_node_takes_its_rows_in_portions():
    kernel, image = rows(2, 1, 3, 3), rows(1, 1, 20, 20)
    f = lambda x: torch.nn.functional.conv2d(x, kernel, padding=1).sin()
    y = f(x := image.clone().requires_grad_())
    found = counted(wengert.jacobian, y, x)
    moved = 8 * y.numel() * (y.numel() + x.numel())  # bytes of cotangents and results
    assert (found["node_calls"], found["launches"]) == (math.ceil(moved / 2**21), 1)
    torch.testing.assert_close(wengert.jacobian(y, x), torch.autograd.functional.jacobian(f, image))
    once = counted(lambda y, x: wengert.jacobian(y, x, create_graph=True), y, x)  # a graph has the call once
    assert once["node_calls"] == 1


def counted(derivative, y, x) -> dict[str, int]:
    _C.reset_counters()
    derivative(y, x)
    return _C.counters()


@pytest.mark.parametrize(
    ("function", "x", "largest"),
    [
        (softmax, rows(64), 64),
        (softmax, rows(3, 64), 3 * 64),
        (lambda x: x.log_softmax(-1), rows(64), 64),
        (lambda x: rows(5, 64) @ x.softmax(0), rows(64), 5 * 64),
    ],
    ids=["one", "rows", "logarithm", "product"],
)
def test_what_stands_still_multiplies_a_sum_from_outside(function, x, largest):
    """The gradient of a softmax takes one pass over its elements, not one for each of them."""
    x = x.clone().requires_grad_()
    y = function(x)
    plan = _C.plan([(y * rows(*y.shape)).sum()], [x], "gradient")
    nests = [math.prod(map(int, extents.split(", "))) for extents in re.findall(r"evaluate over \(([\d, ]+)\)", plan)]
    assert nests and max(nests) <= largest, plan


@pytest.mark.parametrize("name", [name for name, row in CASES.items() if row[0] is J])
def test_explain_finds_the_same_losses(name):
    _, function, point, expected = CASES[name]
    x = point.clone().requires_grad_()
    nodes = _C.explain([function(x)], [x])
    assert all((row["structure"] == "kept") == (not row["structure"].startswith("lost")) for row in nodes)
    assert any(row["structure"] != "kept" for row in nodes) == (expected.losses > 0)


def test_overlapping_windows_are_added_in_as_many_nests_as_they_overlap():
    x = rows(2, 128).requires_grad_()
    window = torch.hann_window(32, dtype=torch.float64)
    y = torch.stft(x, 32, 8, window=window, return_complex=True).abs()
    plan = _C.plan([y], [x], "jacobian").splitlines()
    assert sum(line.startswith("evaluate") for line in plan) == 6  # 4 of them add windows


@pytest.mark.parametrize("net", [torch.nn.Conv1d(2, 3, 3), torch.nn.ConvTranspose1d(2, 3, 3)], ids=["conv", "conv_transpose"])
def test_a_node_that_gave_nothing_is_known_the_next_time(net):
    """The derivatives of a convolution give none for the data where only its cotangent is asked about."""
    net, x = net.double().to(DEVICE), rows(2, 2, 7)
    f = lambda x: net(x).tanh().square().sum()
    for derivative in (wengert.vhp, wengert.hvp) if DEVICE.type == "cpu" else (wengert.vhp,):  # elsewhere hvp takes more passes
        first = derivative(f, x, x.cos())[1]
        wengert.reset_stats()
        second = derivative(f, x, x.cos())[1]
        assert wengert.stats().engine["plan_misses"] == 0
        assert wengert.stats().engine["node_calls"] == 3  # once backward, then what that is made of
        assert torch.equal(first, second)
        torch.testing.assert_close(second, torch.autograd.functional.vhp(f, x, x.cos())[1])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernel in the place of PyTorch's is for the CPU")
def test_a_called_node_is_asked_for_what_is_wanted():
    """As PyTorch's engine asks it, which leaves the gradient of the weights out."""
    masks = []

    def convolution_backward(g, x, w, sizes, stride, padding, dilation, transposed, output_padding, groups, mask):
        masks.append(mask)
        return torch.zeros_like(x) if mask[0] else None, torch.zeros_like(w) if mask[1] else None, None

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("convolution_backward", convolution_backward, "CPU")
        x, w = rows(2, 2, 7).requires_grad_(), rows(3, 2, 3).requires_grad_()
        y = torch.nn.functional.conv1d(x, w)
        wengert.grad(y, x, torch.ones_like(y), retain_graph=True)
        wengert.jacobian(y, x)
        torch.autograd.grad(y, x, torch.ones_like(y))
    finally:
        library._destroy()
    assert len(masks) == 3
    assert all(mask == [True, False, False] for mask in masks)


def test_digits_of_a_position_are_looked_up():
    """A reshape before a scatter: several loops run through the positions of one axis."""
    index = torch.tensor([3, 0, 23, 7, 3])

    def f(x):
        return torch.zeros(24, dtype=x.dtype).index_add(0, index, x).view(2, 3, 4).sin()

    x = rows(5)
    assert sum("lost" in row["structure"] for row in wengert.explain(f, x)) == 0
    torch.testing.assert_close(wengert.jacobian(f, x), torch.autograd.functional.jacobian(f, x))


def test_outputs_that_share_nodes_are_planned_one_after_the_other():
    """Nothing of one output's sweep is left for the next: neither where it ended nor where it had nothing to go on with."""
    x = rows(4).requires_grad_()
    shared, constant = x.sin(), rows(4).requires_grad_().exp()
    outputs = [shared * k + constant for k in range(5)] + [shared.sum(), constant * 2, (shared * x).cumsum(0)]
    for mine, y in zip(wengert.jacobian(outputs, x, allow_unused=True), outputs):
        parts = [torch.autograd.grad(v, x, retain_graph=True, allow_unused=True)[0] for v in y.flatten()]
        theirs = torch.stack([torch.zeros_like(x) if part is None else part for part in parts]).reshape(y.shape + x.shape)
        torch.testing.assert_close(mine, theirs)


def test_a_nest_of_many_operands_is_called_where_one_row_arrives():
    """Its derivatives, one for every result and operand, would be many times its own work."""
    leaves = [rows(5).add_(k).requires_grad_() for k in range(8)]
    y = leaves[0].sin()
    for leaf in leaves[1:]:
        y = y * (leaf * 1.5).cos() + leaf
    first = wengert.grad(y.sum(), leaves, create_graph=True)
    total = sum(g.square().sum() for g in first)
    found = counted(lambda y, x: wengert.grad(y, x, retain_graph=True), total, leaves)
    assert (found["node_calls"], found["launches"]) == (1, 9)
    torch.testing.assert_close(wengert.grad(total, leaves, retain_graph=True), torch.autograd.grad(total, leaves))


def test_positions_of_one_axis_are_taken_along_it():
    """The weights of messages between nodes of a graph: rows of the cotangent at the nodes, no position of each element."""
    source, target = torch.arange(30) * 7 % 12, torch.arange(30) * 5 % 12
    features, weights = rows(12, 6), rows(6, 40).requires_grad_()
    y = rows(12, 40).mul(0).index_add(0, target, (features[source] @ weights).sin()).square().sum()
    plan = _C.plan([y], [weights], "gradient")
    assert next(line for line in plan.splitlines() if line.startswith("take")).endswith("along axis 0"), plan
    torch.testing.assert_close(wengert.grad(y, weights, retain_graph=True), torch.autograd.grad(y, weights, retain_graph=True))
    first = [g.grad(y, weights, create_graph=True)[0] for g in (wengert, torch.autograd)]
    torch.testing.assert_close(*(torch.autograd.grad(g.sin().sum(), weights, retain_graph=True) for g in first))
