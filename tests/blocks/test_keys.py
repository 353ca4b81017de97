"""Structures that differ in the last detail are told apart wherever something is found again by its structure."""

import pytest
import torch
import wengert
from support.check import DEVICE, check_against_torch
from support.compare import assert_same
from torch.autograd import functional as torch_functional


def test_two_reads_at_integer_positions():
    """The same integers in a nest of other extents, read by one loop and by two."""
    pad = torch.nn.functional.pad
    g = torch.Generator().manual_seed(0)
    m = torch.rand(3, 10, dtype=torch.float64, generator=g).to(DEVICE)
    i, j = (torch.randint(0, 9, size, generator=g).to(DEVICE) for size in ((10,), (12, 3)))
    x = torch.rand(6, dtype=torch.float64, generator=g).to(DEVICE)
    check_against_torch(lambda x: (m @ pad(x.sin(), (0, 3))[i], pad(x.cos(), (0, 3))[j][4]), x, modes=("jacobian", "hessian"))


PIPELINES = [
    lambda x: x.sum(0),
    lambda x: x.sum(-1),
    lambda x: x.permute(*reversed(range(x.dim()))).reshape(-1)[:3],
    lambda x: x.roll(1, 0).roll(1, -1)[0],
    lambda x: x.roll((1, 1), (0, -1))[0],
]


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 4), (24, 1), (1, 24), (4, 3, 2), (2, 2, 6)])
def test_contents_that_follow_one_another_in_a_signature(shape):
    """Lists of which one takes from the other: extents and steps, several saved lists."""
    x = torch.linspace(-1, 1, 24, dtype=torch.float64, device=DEVICE)
    for k, pipeline in enumerate(PIPELINES):

        def fn(x, pipeline=pipeline):
            return pipeline(x.sin().reshape(shape))

        assert_same(wengert.jacobian(fn, x), torch_functional.jacobian(fn, x), f"pipeline {k}")
