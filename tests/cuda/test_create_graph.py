"""What is recorded with create_graph for a GPU: kernels of a bounded size, and sums at indices in a fixed order."""

import itertools

import pytest
import torch
import wengert
from support.host_device import launching_device

MOST_OUTPUTS = 16


def outputs_of(text):
    return sum(line.startswith("out ") for line in text.splitlines())


def operands_of(text):
    return int(text.split("operands=")[1].split()[0])


def loss(parameters):
    """Every parameter meets its neighbour."""
    total = 0
    for a, b in itertools.pairwise(parameters):
        total = total + a.sin() * b
    return (total * parameters[0]).sum()


def second_order(parameters, grad):
    grads = grad(loss(parameters), parameters, create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    return [p.grad for p in parameters]


def fresh(count, shapes=((5,), (1,))):
    torch.manual_seed(0)
    return [torch.rand(shapes[i % len(shapes)], dtype=torch.float64).requires_grad_() for i in range(count)]


@pytest.mark.parametrize("count", [3, 16, 17, 40, 120, 300])
def test_gradients_of_many_parameters_come_in_groups(count):
    wanted = second_order(fresh(count), torch.autograd.grad)
    with launching_device() as texts:
        ours = second_order(fresh(count), wengert.grad)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert max(map(outputs_of, texts)) <= MOST_OUTPUTS


def test_more_parameters_than_one_kernel_has_outputs():
    wanted = second_order(fresh(1366, [(3,)]), torch.autograd.grad)
    with launching_device() as texts:
        ours = second_order(fresh(1366, [(3,)]), wengert.grad)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert max(map(outputs_of, texts)) <= MOST_OUTPUTS


def test_a_program_takes_the_operands_it_reads():
    """And those that give the nest its extents: the sum of ones over an axis that only another operand has."""
    fused = torch.ops.wengert.fused
    text = "fused v1 rank=2 operands=3 compute=f64\nt0 = mul a0 a1\nt1 = add t0 a2\nout t1 f64 sum=1\n"
    shapes = [(3, 1), (3, 1), (3, 7)]
    ours = [torch.rand(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    plain = [x.detach().clone().requires_grad_() for x in ours]
    with launching_device() as texts:
        (y,) = fused(ours, text)
        grads = torch.autograd.grad(y.square().sum(), ours, create_graph=True)
        again = torch.autograd.grad(sum(g.sin().sum() for g in grads), ours)
    z = (plain[0] * plain[1] + plain[2]).sum(1, keepdim=True)
    wanted = torch.autograd.grad(z.square().sum(), plain, create_graph=True)
    torch.testing.assert_close(grads, wanted)
    torch.testing.assert_close(again, torch.autograd.grad(sum(g.sin().sum() for g in wanted), plain))
    with launching_device() as texts:
        (y,) = fused([x.detach().requires_grad_(x is ours[0]) for x in ours], text)
        y.sum().backward()
    assert operands_of(texts[-1]) == 3  # a1, the cotangent, and a2 for its seven columns


def test_what_a_gradient_does_not_depend_on_is_not_an_operand():
    x, y = (torch.rand(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    text = "fused v1 rank=1 operands=2 compute=f64\nt0 = mul a0 a1\nout t0 f64\n"
    with launching_device() as texts:
        (z,) = torch.ops.wengert.fused([x, y], text)
        (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    assert operands_of(texts[-1]) == 2 and g.requires_grad
    (h,) = torch.autograd.grad(g.sum(), x, allow_unused=True)
    assert h is None, "y * ct does not depend on x"


# ---------------------------------------------------------------------------------------------------------------------- scatters
INDEX = torch.tensor([3, 0, 3, 5, 3, 1])
GATHER = torch.tensor([[0, 2], [1, 1], [3, 0]])

PUTTING = {
    "rows": lambda w: w[INDEX].sin() * w[INDEX.flip(0)],
    "columns": lambda w: w.index_select(1, torch.tensor([1, 1, 0])).exp(),
    "part of rows": lambda w: torch.nn.functional.embedding(INDEX, w[:, :2]).sin(),
    "matrix": lambda w: w[INDEX.view(2, 3)].cos(),
    "pairs": lambda w: w[INDEX, INDEX.flip(0) % 4].square(),
    "gather": lambda w: w.gather(0, GATHER).sin(),
    "windows": lambda w: w.unfold(0, 3, 1).sin(),
}


def nodes_of(tensor):
    seen, stack = {}, [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen[node] = node.name()
        stack += [function for function, _ in node.next_functions]
    return set(seen.values())


@pytest.mark.parametrize("name", PUTTING)
def test_sums_at_indices_are_sorted(name):
    """index_add and scatter_add add in any order on a GPU, and so does the derivative of index_select."""
    function = PUTTING[name]
    torch.manual_seed(1)
    w = torch.rand(6, 4, dtype=torch.float64).requires_grad_()

    def both(grad):
        y = function(w)
        ct = torch.linspace(0.5, 1, y.numel(), dtype=torch.float64).view(y.shape).requires_grad_()
        (g,) = grad(y, w, ct, create_graph=True)
        second = torch.autograd.grad(g.square().sum(), (w, ct), create_graph=True)
        return g, *second, *torch.autograd.grad(second[0].sin().sum(), (w, ct))

    wanted = both(torch.autograd.grad)
    with launching_device():
        ours = both(wengert.grad)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)
    own = nodes_of(ours[0]) - nodes_of(function(w))
    if name == "gather":  # both columns of the index repeat a row
        assert "ScatterAddBackward0" not in own
    assert not own & {"IndexAddBackward0", "ScatterAddBackward0", "IndexSelectBackward0"}
