"""Many threads at once, on graphs of their own and on shared ones.  Small enough to run under ThreadSanitizer."""

import contextlib
import os
import sys
import threading
import time

import pytest
import torch
import wengert
from support.compare import assert_same
from support.native import Calls

THREADS = 4
ROUNDS = int(os.environ.get("WENGERT_THREAD_ROUNDS", "30"))


@pytest.fixture(autouse=True)
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*works, rounds=ROUNDS):
    """Runs each work(k) in a thread of its own, all starting every round at once; the first error is raised."""
    errors, start = [], threading.Barrier(len(works))

    def run(work):
        try:
            for k in range(rounds):
                start.wait(timeout=60)
                work(k)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "deadlock"
    if errors:
        raise errors[0]


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g - g.mean(0) + 0 * x


def chain(x, steps=20):
    y = x
    for _ in range(steps):
        y = (y.sin() * x).exp() * 0.1
    return y[torch.arange(len(x)).flip(0)].sum()


def tolerant(call):
    """A graph that another thread frees: PyTorch's message, or the result."""
    try:
        return call()
    except RuntimeError as error:
        assert "second time" in str(error) or "already been freed" in str(error), str(error)
        return None


def test_one_graph_read_and_freed():
    """No thread sees half of what another is freeing."""
    graphs = []
    for k in range(ROUNDS):
        x = torch.linspace(0.1, 1.0 + k, 16, dtype=torch.float64, requires_grad=True)
        graphs.append((x, chain(x), torch.autograd.grad(chain(x), x)[0]))

    def read(k):
        x, y, expected = graphs[k]
        got = tolerant(lambda: wengert.grad(y, x, retain_graph=True))
        if got is not None:
            assert_same(got[0], expected)

    def free(k):
        x, y, expected = graphs[k]
        got = tolerant(lambda: wengert.grad(y, x))
        if got is not None:
            assert_same(got[0], expected)

    def free_by_torch(k):
        x, y, _ = graphs[k]
        tolerant(lambda: torch.autograd.grad(y, x))

    together(read, free, read, free_by_torch)


def test_graphs_of_their_own_share_the_caches():
    def work(seed):
        def run(k):
            x = torch.linspace(0.1, 1.0, 3 + (seed + k) % 4, dtype=torch.float64)
            f = lambda x: x.sin() * x.roll(1) + x.sum()
            assert_same(wengert.jacobian(f, x), torch.autograd.functional.jacobian(f, x))
            g = lambda x: (x.exp() * x.flip(0)).sum()
            assert_same(wengert.hessian(g, x), torch.autograd.functional.hessian(g, x))

        return run

    together(*map(work, range(THREADS)))


def test_the_same_graph_in_many_forms():
    x = torch.linspace(0.1, 1.0, 6, dtype=torch.float64, requires_grad=True)
    y = Centred.apply(x.sin()) * x.cumsum(0)
    wanted = torch.stack([torch.autograd.grad(v, x, retain_graph=True)[0] for v in y])
    together(
        lambda k: assert_same(wengert.jacobian(y, x), wanted),
        lambda k: assert_same(wengert.grad(y.sum(), x, retain_graph=True)[0], wanted.sum(0)),
        lambda k: assert_same(wengert.jacobian(y, x, create_graph=True), wanted),
        lambda k: wengert.explain(y, x),
        lambda k: (wengert.stats(), wengert.reset_stats()),
    )


def test_caches_are_cleared_meanwhile():
    """Whoever lets go of a plan last frees it, with what others have found out about it."""
    x = torch.linspace(0.1, 1.0, 6, dtype=torch.float64)
    wanted = torch.diag(x.cos() * x + x.sin())

    def differentiable(_):
        live = x.clone().requires_grad_()
        assert_same(wengert.jacobian(lambda x: x.sin() * x, live, create_graph=True).detach(), wanted)

    def clear(_):
        time.sleep(0.001)
        wengert.clear_caches()

    def often(work):  # without a barrier, which would order everything
        return lambda k: [work(k) for _ in range(20)]

    together(*[often(differentiable)] * 3, often(clear))


def test_reports_and_custom_functions():
    """Both want a Function's name, for which the interpreter has to be asked."""
    f, x = (lambda x: Centred.apply(x) * 2), torch.rand(4, 3, dtype=torch.float64)

    def coupled(k):
        with contextlib.suppress(ValueError):
            wengert.batch_jacobian(f, x)

    together(coupled, lambda k: wengert.explain(f, x), lambda k: wengert.jacobian(f, x), rounds=5 * ROUNDS)


def test_errors_in_one_thread_leave_the_others_alone():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            raise ValueError("mine")

    x = torch.linspace(0.1, 1.0, 5, dtype=torch.float64)
    expected = torch.diag(x.cos())

    def fails(k):
        with pytest.raises(ValueError, match="mine"):
            wengert.jacobian(lambda x: Fails.apply(x.sin()), x)

    together(fails, lambda k: assert_same(wengert.jacobian(torch.sin, x), expected), fails)


def test_a_long_graph_is_freed_by_another_thread():
    """Neither reading nor freeing a graph may depend on the size of a thread's stack."""
    before = threading.stack_size(256 * 1024)
    try:

        def work(k):
            x = torch.linspace(0.1, 1.0, 2, dtype=torch.float64, requires_grad=True)
            y = x
            for _ in range(3000):
                y = y.sin() * 1.01
            (g,) = wengert.grad(y.sum(), x, create_graph=True)
            assert g.requires_grad
            del g, y

        together(work, rounds=1)
    finally:
        threading.stack_size(before)


def test_a_thread_that_ends_takes_nothing_along():
    x = torch.linspace(0.1, 1.0, 5, dtype=torch.float64)
    results = []
    for _ in range(20):
        thread = threading.Thread(target=lambda: results.append(wengert.jacobian(torch.sin, x)))
        thread.start()
        thread.join()
    for result in results:
        assert_same(result, torch.diag(x.cos()))


@pytest.mark.parametrize("name", ["jacfwd", "hessian", "vmap"])
def test_random_numbers_of_another_thread(name):
    """They are not the function's, and are drawn once."""
    transforms = {
        "jacfwd": wengert.func.jacfwd,
        "hessian": wengert.func.hessian,
        "vmap": lambda f: lambda x: wengert.func.vmap(wengert.func.jacrev(f))(x[None])[0],
    }
    drawn = []

    def f(x):
        thread = threading.Thread(target=lambda: drawn.append(torch.rand(3)))
        thread.start()
        thread.join()
        assert torch.initial_seed() == 5
        return x.sin().sum()

    torch.manual_seed(5)
    before = Calls.now()
    transforms[name](f)(torch.rand(3))
    drawn.append(torch.rand(3))
    assert len(drawn) == 2 and not torch.equal(*drawn)
    assert (Calls.now() - before).native == 1
    assert torch.initial_seed() == 5


def test_an_interrupt_while_a_watch_begins(monkeypatch):
    """The mode that watches is on the stack, but nobody has been told yet."""
    from torch import overrides

    push = overrides._push_mode
    x = torch.rand(3)

    def interrupted(mode):
        push(mode)
        raise KeyboardInterrupt

    for transform in (wengert.func.jacfwd(torch.sin), wengert.func.vmap(wengert.func.grad(lambda x: x.sin().sum()))):
        given = x if transform.__name__ == "sin" else torch.stack([x, x])
        with torch.no_grad(), monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(overrides, "_push_mode", interrupted)
            transform(given)
        assert torch._C._len_torch_function_stack() == 0
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("interrupted", ["_modules", "_restore_unless_held"])
def test_an_interrupt_while_patching(monkeypatch, interrupted):
    theirs = torch.func.jacrev
    real = getattr(wengert.patching, interrupted)
    times = []

    def once(*args):
        if not times:
            times.append(0)
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(wengert.patching, interrupted, once)
    with pytest.raises(KeyboardInterrupt), wengert.patched():
        pass
    assert torch.func.jacrev is theirs
    with wengert.patched():
        assert torch.func.jacrev is wengert.func.jacrev
    assert torch.func.jacrev is theirs


def test_what_others_draw_while_a_function_runs_with_copies_stays_drawn():
    """Its later calls write to an argument in a graph that nobody watched."""
    drawn, stop = [], threading.Event()

    def draw():
        while not stop.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    def derive_once():
        step = 0

        def f(x, c):
            if not step:
                return x.sin().sum()
            c.add_(1)
            y = x * x * c.sum()
            for _ in range(3 * step):
                y = y.sin()
            return y.sum()

        derive = wengert.func.vmap(wengert.func.grad(f))
        for step in range(4):  # noqa: B007
            derive(torch.ones(3, 3), torch.zeros(3, 3))

    other = threading.Thread(target=draw)
    other.start()
    try:
        for _ in range(100):
            derive_once()
    finally:
        stop.set()
        other.join()
    assert len(set(drawn)) == len(drawn)
