"""What functions of transforms do to their arguments and to the generators is done once, whoever answers in the end."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_same, assert_same_call
from wengert import func

WRITES = {
    "by keyword": lambda s: s.add_(1),
    "an overload by keyword": lambda s: torch.ops.aten.mul_.Scalar(self=s, other=3.0),
    "an argument by keyword": lambda s: torch.relu_(input=s),
    "an initialisation": lambda s: torch.nn.init.constant_(s, 4.0),
    "statistics": lambda s: torch.batch_norm(s[:1, None] + s, None, None, s[:1], s[1:], True, 0.1, 1e-5, False),
    "an operator's statistics": lambda s: torch.ops.aten.native_batch_norm(
        torch.arange(4.0).reshape(2, 2), None, None, s, torch.ones(2), True, 0.1, 1e-5
    ),
}


@pytest.mark.parametrize("form", ["vmap(grad)", "vmap(grad), by name", "jacfwd"])
@pytest.mark.parametrize("name", WRITES)
def test_arguments_are_written_once(name, form):
    """Where the function runs again (PyTorch splits ties of `max`; forward mode is its own) it has not written yet."""

    def f(x, s):
        y = (x * x.max() * s).sum()
        WRITES[name](s)
        return y

    def call(m, s):
        if form == "jacfwd":
            return m.jacfwd(f)(torch.tensor([0.5, 2.0]), s)
        x = torch.tensor([[0.5, 2.0]] * 2)
        return m.vmap(m.grad(f), (0, None))(x, s) if form == "vmap(grad)" else m.vmap(m.grad(f))(x, s=s)

    mine, theirs = torch.tensor([-1.0, 0.5]), torch.tensor([-1.0, 0.5])
    assert_same_call(lambda: call(func, mine), lambda: call(torch.func, theirs), name)
    assert_same(mine, theirs)


def test_arguments_that_a_later_call_writes_to_are_written_once():
    """A graph that nobody watched is made again from copies."""
    for m in (func, torch.func):
        trains = False

        def f(x, s):
            if trains:  # noqa: B023
                s.add_(1)
                return (x.sin() * s).sum()
            return (x * s).sum()

        derive, x, s = m.vmap(m.grad(f)), torch.ones(3, 2), torch.zeros(3, 2)
        derive(x, s)
        trains = True
        assert_same(derive(x, s), x.cos())
        assert_same(s, torch.ones(3, 2))


@pytest.mark.parametrize("change", ["max", "hook", "write"])
def test_what_cannot_run_again_is_an_error_once(change):
    """A function whose later calls write to an argument and are PyTorch's: one call says so, the next ones are PyTorch's."""
    changed = False

    def f(x, c):
        if not changed:
            return x.sin()
        c.add_(1)
        y = x * x * c.sum()
        if change == "hook":
            y.register_hook(lambda g: 2 * g)
        return y * y.max() if change == "max" else y

    derive, x, c = func.vmap(func.jacrev(f)), torch.ones(3, 3), torch.zeros(3, 3)
    theirs, their_c = torch.func.vmap(torch.func.jacrev(f)), torch.zeros(3, 3)
    assert_same(derive(x, c), theirs(x, their_c))
    changed = True
    expected = theirs(x, their_c)
    if change == "write":
        assert_same(derive(x, c), expected)
    else:
        with pytest.raises(RuntimeError):
            derive(x, c)
    assert_same(c, their_c)
    for _ in range(2):
        assert_same(derive(x, c), theirs(x, their_c))
        assert_same(c, their_c)


def test_an_error_that_both_have_writes_once():
    for fails in (lambda x: x.reshape(7, 7), lambda x: x * torch.rand(3)):
        states = []
        for m in (func, torch.func):
            changed = False

            def f(x, c):
                if changed:  # noqa: B023
                    c.add_(1)
                    return fails(x * c).sum()  # noqa: B023
                return (x * c).sum()

            derive, x, c = m.vmap(m.grad(f)), torch.ones(2, 3), torch.zeros(2, 3)
            derive(x, c)
            changed = True
            for _ in range(2):
                with pytest.raises(RuntimeError):
                    derive(x, c)
            states.append(c)
        assert_same(*states)


@pytest.mark.parametrize("form", ["grad", "jacrev", "jacfwd"])
def test_what_pytorch_is_first_to_write_is_written_once(form):
    """Where it is expected to answer, and has an error."""

    def make(fails):
        def f(x, b):
            if not fails:
                return (x * b).max()
            b.mul_(2)
            return (x @ torch.ones(7)).sum()

        return f

    x, written = torch.rand(4, 3), []
    for m in (func, torch.func):
        for _ in range(2):
            m.vmap(getattr(m, form)(make([])))(x, torch.ones(4, 3))
        written.append(torch.ones(4, 3))
        with pytest.raises(RuntimeError):
            m.vmap(getattr(m, form)(make([True])))(x, written[-1])
    assert_same(*written)


@pytest.mark.parametrize("bag", [False, True])
def test_tables_that_are_renormed_are_written_once(bag):
    places = torch.tensor([[0, 2], [3, 3], [1, 0]])
    row_of = lambda i, w: F.embedding(i, w, max_norm=1.0)
    if bag:
        row_of = lambda i, w: F.embedding_bag(i, w, torch.tensor([0]), 1.0)
    tables = []
    for m in (func, torch.func):
        table = torch.ones(3, 5, 3)
        derive = m.vmap(m.grad(lambda w, i: row_of(i, w).sin().sum()))
        tables.append((derive(table, places), derive(table, places), table))
    assert_same(*tables)


HALF_INSIDE = {
    "grad of grad": lambda m, n: m.grad(lambda x, c: (m.grad(lambda z: (z**3 * n(z)).sum())(x) ** 2 * counted(c, x)).sum()),
    "jacrev of grad": lambda m, n: m.jacrev(lambda x, c: m.grad(lambda z: (z**3 * n(z)).sum())(x) * counted(c, x)),
    "jacrev of jacrev": lambda m, n: m.jacrev(lambda x, c: m.jacrev(lambda z: z**3 * n(z))(x) * counted(c, x)),
    "jacfwd of jacrev": lambda m, n: m.jacfwd(lambda x, c: m.jacrev(lambda z: z**3)(x) * counted(c, x)),
    "two arguments": lambda m, n: m.grad(lambda x, c: (x * m.grad(lambda z: (x * z**2 * n(z)).sum())(x) * counted(c, x)).sum()),
}


def counted(c, x):
    c.add_(1)
    return c.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", HALF_INSIDE)
def test_transforms_inside_in_half_precision_run_once(name, dtype):
    """What they write to is written once, and what they draw is drawn once."""
    found = []
    for m in (func, torch.func):
        torch.manual_seed(0)
        c = torch.zeros(3)
        derived = HALF_INSIDE[name](m, torch.rand_like)(torch.ones(3, dtype=dtype), c)
        found.append((derived.float(), c, torch.rand(2)))
    (ours, c, drawn), (theirs, *rest) = found
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    assert_same([c, drawn], rest)


@pytest.mark.parametrize("form", ["grad", "jacrev", "grad_and_value"])
def test_what_torch_func_alone_can_do_is_drawn_once(form):
    """And not done twice where an argument was written to: that is an error."""
    with torch.inference_mode():
        a = torch.rand(3)
    drawn = lambda x: (torch.rand(3) * x * x * a).sum()
    with_inner = lambda m: lambda x: (torch.rand(3) * m.grad(torch.sin)(torch.tensor(0.5)) * x * x * a).sum()
    for f in (lambda m: drawn, with_inner):
        found = []
        for m in (func, torch.func):
            torch.manual_seed(0)
            found.append((getattr(m, form)(f(m))(torch.ones(3)), torch.rand(3)))
        assert_same(*found)
    # Beside another thread, which may draw at any time, it is an answer at least.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: getattr(func, form)(drawn)(torch.ones(3))).result()

    def written(x, c):
        c.add_(1)
        return (x * x * a * c).sum()

    c = torch.zeros(3)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        getattr(func, form)(written)(torch.ones(3), c)
    assert_same(c, torch.ones(3))
