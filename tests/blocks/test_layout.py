"""Arrays that a plan makes lie so that the nests which read them run along their rows."""

import re

import torch
import wengert
from wengert._native import C


def made_reads(plan: str) -> list[str]:
    """The axes of each array of two axes or more, by loops, that a nest reads or writes and that a step of the plan has made."""
    given = {int(s) for s in re.findall(r"^s(\d+) \(.*given", plan, re.MULTILINE)}
    found = []
    for line in plan.splitlines():
        if line.startswith("evaluate over") and "{" in line:
            found += [axes for s, axes in re.findall(r"s(\d+)\[([a-z, ]+)\]", line) if int(s) not in given and "," in axes]
    return found


def second_derivative(net: torch.nn.Module, x: torch.Tensor) -> str:
    leaves = list(net.parameters())
    found = torch.autograd.grad(net(x).square().mean(), leaves, create_graph=True)
    return C.plan([g for g in found if g.requires_grad], leaves, "gradient")


def test_products_with_transposed_weights_lie_as_the_batch_does():
    """PyTorch's graph of a weight's gradient goes through its transpose, whose cotangent would lie across the batch."""
    torch.manual_seed(0)
    layers = [m for n in (8, 32, 32) for m in (torch.nn.Linear(n, 32), torch.nn.Tanh())]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(32, 4))
    reads = made_reads(second_derivative(net, torch.randn(256, 8)))
    assert len(reads) > 10
    assert all(axes == ", ".join(sorted(axes.split(", "))) for axes in reads)


def test_what_was_copied_only_to_be_turned_is_made_in_its_place():
    """The arguments of a node that is called lie as it wants them."""

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * x.cos()

    w = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)
    x = torch.randn(256, 16, dtype=torch.float64, requires_grad=True)
    y = (Sine.apply(x.t()).t() @ w).sin()
    plan = C.plan([y], [x], "gradient")
    before, call, _ = plan.partition("call node")
    assert call and "matmul" in before and "{0 instructions}" not in before
    seed = torch.ones_like(y)
    torch.testing.assert_close(wengert.grad(y, x, seed, retain_graph=True), torch.autograd.grad(y, x, seed))
