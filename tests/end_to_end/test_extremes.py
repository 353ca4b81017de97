"""Derivatives at zeros of both signs, kinks, ties, under- and overflow, infinities and nan: every function with a reader, up to the
third order, by every public function, against PyTorch's counterpart of each."""

import warnings

import pytest
import torch
import wengert
from support.extremes import AROUND, BINARY, GRID, ORDER, POINTS, UNARY, agreement, forms, points, sizes

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def disagreements(f, xs, names=None):
    """Every form of f's derivatives at xs whose entries are not PyTorch's."""
    expected = forms(f, xs, torch.autograd.functional, torch.autograd.grad, torch.func)
    found = forms(f, xs, wengert, wengert.grad, wengert.func)
    scale = sizes(f, xs)
    lines = []
    for name in names or found:
        try:
            wanted = expected[name]()
        except (RuntimeError, NotImplementedError):
            with pytest.raises((RuntimeError, NotImplementedError)):
                found[name]()
            continue
        for k, (ours, theirs) in enumerate(zip(found[name](), wanted, strict=True)):
            wrong = ~agreement(ours, theirs, scale[ORDER[name]])
            lines += [
                f"{name}[{k}] at {[x[i].item() for x in xs]}: {ours[i].item()} where torch gives {theirs[i].item()}"
                for i in wrong.nonzero().flatten().tolist()
            ]
    return lines


def check(f, xs, names=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = disagreements(f, xs, names)
    assert not lines, f"{len(lines)} entries\n" + "\n".join(lines[:12])
