"""Operators that vmap has no rule for, composed of what it has rules for (csrc/ops/composed.cpp)."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_same, assert_same_call
from support.native import Calls
from torch.nn.attention import SDPBackend, sdpa_kernel
from wengert import func


def both(call):
    return assert_same_call(lambda: call(func), lambda: call(torch.func), "")


def of_module(net, rank, first=lambda out: out[0] if isinstance(out, tuple) else out):
    """A function of an input, where it is a tensor of numbers, and of the parameters."""
    names = [name for name, _ in net.named_parameters()]
    values = [t.detach().double() for t in net.parameters()]
    return lambda x, *p: first(torch.func.functional_call(net, dict(zip(names, p)), (x,))), values, rank


def attention(**options):
    def f(x, w):
        q, k, v = (x @ w).reshape(5, 3, 2, 4).permute(1, 2, 0, 3)
        return F.scaled_dot_product_attention(q, k, v, **options)

    return f, [torch.randn(6, 24, dtype=torch.float64)], (5, 6)


def grouped_attention(x, w):
    q, k = (x @ w).reshape(1, 5, 6, 4).transpose(1, 2).split([4, 2], 1)
    return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def bag(mode, indices=(0, 3, 3, 1, 6, 2), offsets=(0, 2, 2, 5), weighted=False, **options):
    def f(x, w):
        weights = x.reshape(-1)[: len(indices)] if weighted else None
        scaled = w * x.sum()
        return F.embedding_bag(
            torch.tensor(indices), scaled, torch.tensor(offsets), mode=mode, per_sample_weights=weights, **options
        )

    return f, [torch.randn(7, 3, dtype=torch.float64)], (8,)


COMPOSED = {
    "GRU cell": of_module(torch.nn.GRUCell(3, 4), (2, 3)),
    "LSTM cell": of_module(torch.nn.LSTMCell(3, 4), (3,)),
    "simple cell": of_module(torch.nn.RNNCell(3, 4, bias=False), (2, 3)),
    "simple cell of relu": of_module(torch.nn.RNNCell(3, 4, nonlinearity="relu"), (2, 3)),
    "LSTM": of_module(torch.nn.LSTM(3, 4, 2, batch_first=True), (2, 5, 3)),
    "last state of an LSTM": of_module(torch.nn.LSTM(3, 2, bidirectional=True), (5, 3), lambda out: out[1][1]),
    "LSTM with projections": of_module(torch.nn.LSTM(3, 4, proj_size=2, bias=False), (5, 2, 3)),
    "GRU": of_module(torch.nn.GRU(3, 4, bidirectional=True), (5, 2, 3)),
    "simple net": of_module(torch.nn.RNN(3, 4, 2, batch_first=True), (2, 5, 3)),
    "simple net of relu": of_module(torch.nn.RNN(3, 4, nonlinearity="relu"), (5, 3)),
    "attention": attention(),
    "causal attention": attention(is_causal=True),
    "scaled attention": attention(scale=0.3),
    "masked attention": attention(attn_mask=torch.arange(25).reshape(5, 5) % 3 != 0),
    "attention with an added mask": attention(attn_mask=torch.linspace(-1, 1, 25, dtype=torch.float64).reshape(5, 5)),
    "attention to nothing": attention(attn_mask=torch.arange(5)[:, None].ne(2).expand(5, 5)),
    "grouped attention": (grouped_attention, [torch.randn(6, 24, dtype=torch.float64)], (5, 6)),
    "sums of bags": bag("sum"),
    "means of bags": bag("mean"),
    "weighted bags": bag("sum", weighted=True),
    "bags with padding": bag("mean", padding_idx=3),
    "bags with their end": bag("sum", offsets=(0, 2, 2, 6), include_last_offset=True),
}


@pytest.mark.parametrize("form", ["grad", "jacrev", "hessian"])
@pytest.mark.parametrize("name", COMPOSED)
def test_operators_that_are_composed_of_what_has_a_rule(name, form):
    """By the samples and by the parameters, against one sample at a time; PyTorch's vmap repeats them or has an error."""
    f, parameters, shape = COMPOSED[name]
    if form == "hessian" and "bags" in name:
        pytest.skip("PyTorch has no second derivative")
    x = torch.linspace(-1, 1, 3 * math.prod(shape), dtype=torch.float64).reshape(3, *shape).sin()
    loss = lambda x, *p: (f(x, *p) ** 2).sum()
    scalar_form = form in ("grad", "hessian")
    argnums = 0 if form == "hessian" else tuple(range(1 + len(parameters)))
    one = {
        "grad": lambda s: torch.autograd.functional.jacobian(loss, (s, *parameters)),
        "jacrev": lambda s: torch.autograd.functional.jacobian(f, (s, *parameters)),
        "hessian": lambda s: torch.autograd.functional.hessian(lambda s: loss(s, *parameters), s),
    }[form]
    before = Calls.now()
    mapped = func.vmap(getattr(func, form)(loss if scalar_form else f, argnums), (0, *[None] * len(parameters)))
    ours = mapped(x, *parameters)
    if form != "hessian":  # whose forward mode may be PyTorch's
        assert (Calls.now() - before).native == 1
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's kernel has no second derivative
        expected = [one(s) for s in x]
    expected = torch.stack(expected) if form == "hessian" else tuple(map(torch.stack, zip(*expected)))
    assert_same(ours, expected, name)


def r(*sizes):
    return torch.linspace(-1, 2, math.prod(sizes), dtype=torch.float64).sin().reshape(sizes)


UNFIT = {
    "a state of another batch": (lambda x, h: torch.gru_cell(x, h, r(12, 3), r(12, 4)).sum(), r(3, 2, 3), r(3, 1, 4)),
    "an input of another batch": (lambda x, h: torch.rnn_tanh_cell(x, h, r(4, 3), r(4, 4)).sum(), r(3, 1, 3), r(3, 2, 4)),
    "rows of one gate": (lambda x, h: torch.lstm_cell(x, (h, h), r(4, 3), r(4, 4))[0].sum(), r(3, 2, 3), r(3, 2, 4)),
    "states of a net of another batch": (
        lambda x, h: torch.gru(x, h, [r(12, 3), r(12, 4)], False, 1, 0.0, False, False, False)[0].sum(),
        r(3, 5, 2, 3),
        r(3, 1, 1, 4),
    ),
    "padding that is no row": (
        lambda x, w: (F.embedding_bag(torch.tensor([0, 1]), w, torch.tensor([0]), mode="sum", padding_idx=9) * x).sum(),
        r(3, 3),
        r(3, 7, 3),
    ),
    "offsets that are no integers": (
        lambda x, w: (F.embedding_bag(torch.tensor([0, 1]), w, torch.tensor([0.0]), mode="sum") * x).sum(),
        r(3, 3),
        r(3, 7, 3),
    ),
    "bags that begin late": (
        lambda x, w: (F.embedding_bag(torch.tensor([0, 1]), w, torch.tensor([1]), mode="sum") * x).sum(),
        r(3, 3),
        r(3, 7, 3),
    ),
    "too few weights": (
        lambda x, w: F.embedding_bag(torch.tensor([0, 1]), w, torch.tensor([0]), mode="sum", per_sample_weights=x[:1]).sum(),
        r(3, 3),
        r(3, 7, 3),
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", UNFIT)
def test_what_would_only_be_broadcast_is_an_error(name):
    f, *arguments = UNFIT[name]
    both(lambda m: m.vmap(m.grad(f))(*arguments))


def test_long_bags_in_half_precision_are_added_in_single_precision():
    index, w = torch.arange(600) % 7, r(2, 7, 3).bfloat16()
    f = lambda w: F.embedding_bag(index, w, torch.tensor([0]), mode="mean").sum()
    ours, theirs = (m.vmap(m.grad(f))(w) for m in (func, torch.func))
    assert torch.equal(ours, theirs)


def test_pytorch_s_vmap_is_as_it_was():
    """Compositions are for this package's own runs of a function; importing it changes nothing and says nothing."""
    program = """
import torch, warnings
import wengert
cell, x = torch.nn.GRUCell(3, 4), torch.rand(5, 2, 3)
h = torch.rand(5, 2, 4)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    torch.func.vmap(cell)(x, h)
assert any("performance drop" in str(w.message) for w in seen), seen
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "verrid" not in done.stderr  # of a kernel of PyTorch's


def test_indices_beyond_a_table_of_each_sample_are_an_error():
    tables, places = torch.arange(8.0).reshape(2, 2, 2), torch.tensor([[0, 2], [1, 0]])
    bag_of = lambda w, i: F.embedding_bag(i, w, torch.tensor([0]), mode="sum").sin()
    both(lambda m: m.vmap(m.jacrev(bag_of))(tables, places))
    both(lambda m: m.vmap(m.jacrev(bag_of))(tables, places.clamp(max=1)))
    both(lambda m: m.vmap(m.jacrev(bag_of))(tables, -places))


WRONG_LAYERS = {
    "a vector": lambda w: w[:6] + [w[6][0]] + w[7:],
    "few rows": lambda w: w[:5] + [w[5][:1]] + w[6:],
    "many columns": lambda w: w[:4] + [torch.cat([w[4], w[4]], 1)] + w[5:],
    "a short bias": lambda w: w[:7] + [w[7][:1]],
    "a bias of another dtype": lambda w: w[:7] + [w[7].float()],
}


@pytest.mark.parametrize("name", WRONG_LAYERS)
def test_later_layers_have_to_fit_too(name):
    weights = [torch.randn(*shape, dtype=torch.float64) for shape in ((3, 2), (3, 3), (3,), (3,), (3, 3), (3, 3), (3,), (3,))]
    x, h = torch.randn(2, 4, 1, 2, dtype=torch.float64), torch.randn(2, 1, 3, dtype=torch.float64)

    def f(x):
        return torch._VF.rnn_tanh(x, h, WRONG_LAYERS[name](weights), True, 2, 0.0, False, False, False)[0].sum()

    both(lambda m: m.vmap(m.grad(f))(x))


def test_precisions_under_autocast_are_pytorchs():
    net = torch.nn.LSTM(3, 4)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)[0]
        return out.float().sum(), out.detach()

    for x in (torch.randn(2, 5, 1, 3), torch.randn(1, 5, 1, 3)):
        both(lambda m: m.vmap(m.grad(f, has_aux=True), randomness="same")(x))  # noqa: B023
