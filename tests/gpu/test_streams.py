"""A graph runs on the stream of its forward, as PyTorch's does, and the caller's stream waits for it.

A long kernel in front makes an order that is missing visible.
"""

import pytest
import torch
import wengert
from torch import nn

SLEEP = 200_000_000  # cycles, a tenth of a second


def weighted(x):
    return (x * 1.7).sin() * x.roll(1) + x.square().sum() * 0.3


def normed(x):  # nodes that are called as they are, and tensors that capture derives
    return nn.functional.layer_norm(x.view(8, -1), (x.numel() // 8,)).cumsum(1).flatten()


def gathered(x):
    return x[torch.arange(x.numel(), device=x.device) // 3].exp() * x


FUNCTIONS = [weighted, normed, gathered]


def slow_graph(stream, function, source):
    """The function's graph on `stream`, whose values are there only after a while."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        x = (source * 1).requires_grad_()
        return function(x), x


def expected(function, source, form):
    x = source.clone().requires_grad_()
    y = function(x)
    if form == "jacobian":
        return torch.autograd.functional.jacobian(function, source)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    return g.detach() if form == "gradient" else torch.autograd.grad(g.square().sum(), x)[0]


FORMS = {
    "jacobian": lambda y, x: wengert.jacobian(y, x),
    "gradient": lambda y, x: wengert.grad(y, x, torch.ones_like(y), retain_graph=True)[0],
    "twice": lambda y, x: wengert.grad(wengert.grad(y, x, torch.ones_like(y), create_graph=True)[0].square().sum(), x)[0],
}


@pytest.fixture(autouse=True)
def warm(gpu):
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_graph_of_another_stream(gpu, function, form):
    source = torch.rand(64, device=gpu, dtype=torch.float64)
    wanted = expected(function, source, form)
    FORMS[form](*slow_graph(torch.cuda.Stream(), function, source))  # compiles
    torch.cuda.synchronize()
    caller = torch.cuda.Stream()
    caller.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(caller):
        ours = FORMS[form](*slow_graph(torch.cuda.Stream(), function, source))
        assert torch.cuda.current_stream() == caller
        copy = ours.clone()  # the caller's stream has waited
    caller.synchronize()
    torch.testing.assert_close(copy, wanted)


def test_it_is_native(gpu):
    y, x = slow_graph(torch.cuda.Stream(), weighted, torch.rand(16, device=gpu))
    wengert.reset_stats()
    wengert.jacobian(y, x)
    assert sum(wengert.stats().native.values()) == 1


@pytest.mark.parametrize("form", ["jacobian", "gradient"])
def test_saved_memory_is_not_given_away_while_it_is_read(gpu, form):
    """The caller's stream is late; what the graph saved is freed, and its stream fills memory anew at once."""
    source = torch.rand(1 << 20 if form == "gradient" else 2048, device=gpu)
    cosine = source.cos()
    stream, caller = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(2):
        y, x = slow_graph(stream, lambda x: (x * 1).sin(), source)
        stream.synchronize()
        caller.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(caller):
            torch.cuda._sleep(SLEEP)
            (ours,) = wengert.grad(y, x, torch.ones_like(y)) if form == "gradient" else (wengert.jacobian(y, x).diagonal(),)
        del y, x
        with torch.cuda.stream(stream):
            spoilers = [torch.full_like(source, 7.0) for _ in range(8)]
        torch.cuda.synchronize()
        torch.testing.assert_close(ours, cosine)
        del spoilers, ours


def test_a_cotangent_of_the_callers_stream(gpu):
    """Given late, used on the graph's stream, freed by the caller at once."""
    source = torch.rand(1 << 20, device=gpu)
    stream, caller = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(2):
        y, x = slow_graph(stream, torch.sin, source)
        with torch.cuda.stream(caller):
            torch.cuda._sleep(SLEEP)
            ct = torch.full_like(source, 3.0)
            (g,) = wengert.grad(y, x, ct)
            del ct
            spoilers = [torch.full_like(source, 7.0) for _ in range(8)]
        torch.cuda.synchronize()
        torch.testing.assert_close(g, 3 * source.cos())
        del spoilers


def test_a_graph_of_two_streams_is_pytorchs(gpu):
    source = torch.rand(32, device=gpu, dtype=torch.float64)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    a, x = slow_graph(first, torch.sin, source)
    second.wait_stream(first)
    with torch.cuda.stream(second):
        torch.cuda._sleep(SLEEP)
        y = a * a
    wengert.reset_stats()
    g = wengert.jacobian(y, x)
    torch.cuda.synchronize()
    torch.testing.assert_close(g, torch.diag(2 * source.sin() * source.cos()))
    (reasons,) = wengert.stats().fallback.values()
    assert "several streams" in next(iter(reasons))


def test_backward_of_what_create_graph_gave(gpu):
    """PyTorch's own backward runs our nodes on the stream they were recorded for."""
    source = torch.rand(256, device=gpu, dtype=torch.float64)
    y, x = slow_graph(torch.cuda.Stream(), weighted, source)
    (g,) = wengert.grad(y.sum(), x, create_graph=True)
    g.square().sum().backward()
    plain = source.clone().requires_grad_()
    (h,) = torch.autograd.grad(weighted(plain).sum(), plain, create_graph=True)
    torch.cuda.synchronize()
    torch.testing.assert_close(x.grad, torch.autograd.grad(h.square().sum(), plain)[0])


# ---------------------------------------------------------------------------------------------------------------------- capture
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outside", [False, True], ids=["graph captured", "graph made before"])
def test_capture(gpu, form, outside):
    """With Python numbers in the graph; where it was made before, on the default stream, its memory is the capture's input."""
    source = torch.rand(64, device=gpu, dtype=torch.float64)
    x = source.clone().requires_grad_()
    FORMS[form](weighted(x), x)
    torch.cuda.synchronize()
    y = weighted(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if not outside:
            y = weighted(x)
        result = FORMS[form](y, x)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(result, expected(weighted, source, form))
    if not outside:
        with torch.no_grad():
            x.copy_(torch.rand_like(source))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(result, expected(weighted, x.detach().clone(), form))


@pytest.mark.parametrize("form", ["hessian", "hvp"])
def test_capture_of_second_derivatives_with_numbers(gpu, form):
    def energy(x):
        return ((x * 1.3 + 0.2).exp() * x.roll(1)).sum() / 3.7

    x = torch.rand(12, device=gpu, dtype=torch.float64)
    more = (torch.rand_like(x),) if form == "hvp" else ()
    derive = lambda m: getattr(m, form)(energy, x, *more)
    derive(wengert)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = derive(wengert)
    x.copy_(torch.rand_like(x))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(found, derive(torch.autograd.functional))
