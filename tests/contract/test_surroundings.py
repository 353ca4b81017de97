"""torch.compile, processes, threads, interrupts, stats and reports."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import wengert
from support.check import DEVICE
from support.compare import assert_same, assert_same_error
from torch.autograd import functional as F
from wengert import func


def f(x):
    return x.sin() * x.prod()


def compiled(g, x, **options):
    """Result, and the number of graph breaks."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    try:
        return torch.compile(g, backend="eager", **options)(x), sum(counters["graph_break"].values())
    finally:
        dynamo.reset()


COMPILED = {
    "jacobian": lambda x: wengert.jacobian(f, x * 2).sum(0) + 1,
    "hessian": lambda x: wengert.hessian(lambda x: f(x).sum(), x * 2).sum(0) + 1,
    "batch_jacobian": lambda x: wengert.batch_jacobian(torch.sin, x * 2) + 1,
    "vjp": lambda x: wengert.vjp(f, x * 2, x)[1] + 1,
}


@pytest.mark.parametrize("g", COMPILED.values(), ids=COMPILED)
def test_compiled_code_breaks_once_and_is_right(g):
    x = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    result, breaks = compiled(g, x)
    assert_same(result, g(x))
    assert breaks == 1


def test_compiled_code_breaks_once_inside_patched():
    x = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    g = lambda x: F.jacobian(f, x * 2).sum(0) + 1
    expected = g(x)
    with wengert.patched():
        result, breaks = compiled(g, x)
    assert_same(result, expected)
    assert breaks == 1


def total(x):
    return f(x).sum()


def transforms(m):
    mapped = m.vmap(m.jacrev(f))
    return {
        "jacrev": lambda x: m.jacrev(f)(x * 2).sum(0) + 1,
        "jacfwd": lambda x: m.jacfwd(f)(x * 2).sum(0) + 1,
        "hessian": lambda x: m.hessian(total)(x * 2).sum(0) + 1,
        "grad": lambda x: m.grad(total)(x * 2) + 1,
        "grad_and_value": lambda x: m.grad_and_value(total)(x * 2)[0] + 1,
        "vmap(jacrev)": lambda x: m.vmap(m.jacrev(f))((x * 2)[None].expand(2, 3)).sum(0) + 1,
        "vmap(grad)": lambda x: m.vmap(m.grad(total))((x * 2)[None].expand(2, 3)).sum(0) + 1,
        "vmap of a function": lambda x: m.vmap(f)((x * 2)[None].expand(2, 3)).sum(0) + 1,
        "made outside": lambda x: mapped((x * 2)[None].expand(2, 3)).sum(0) + 1,
    }


@pytest.mark.parametrize("name", transforms(func))
def test_transforms_in_compiled_code_are_torch_s_in_one_graph(name):
    x = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    g = transforms(torch.func)[name]
    expected = g(x)
    with wengert.patched():  # `g` finds torch.func.vmap, say, when it runs
        assert_same(compiled(g, x, fullgraph=True), (expected, 0))
        assert_same(compiled(transforms(torch.func)[name], x, fullgraph=True), (expected, 0))
    assert_same(compiled(transforms(func)[name], x, fullgraph=True), (expected, 0))


@pytest.mark.parametrize("strict", [True, False])
def test_export_inside_patched(strict):
    """Of what torch can export at all."""

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.func.vmap(f)(x)

    x = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).reshape(2, 3)
    expected = Model()(x)
    with wengert.patched():
        exported = torch.export.export(Model(), (x,), strict=strict).module()
    assert_same(exported(x), expected)


def test_differentiating_compiled_functions():
    import torch._dynamo as dynamo

    x = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    try:
        assert_same(wengert.jacobian(torch.compile(f, backend="eager"), x), F.jacobian(f, x))
    finally:
        dynamo.reset()


def expected_and_ours():
    x = torch.linspace(0.5, 1.5, 50, dtype=torch.float64, device=DEVICE)  # a thread has a default of its own
    g = lambda x: torch.roll(x, 1) * x.sin()
    return wengert.jacobian(g, x), F.jacobian(g, x)


def in_child(queue):
    ours, theirs = expected_and_ours()
    queue.put(bool(torch.allclose(ours, theirs)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_a_child_process(method):
    if DEVICE.type == "cuda" and method == "fork":
        pytest.skip("CUDA does not survive a fork")
    expected_and_ours()  # the engine's caches are warm when the process forks
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own limit: its threads do not survive a fork
    try:
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=in_child, args=(queue,))
        child.start()
        assert queue.get(timeout=120)
        child.join(timeout=60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(threads)


FORKS = """
import os, sys, threading, time, warnings
import torch, wengert
warnings.simplefilter("ignore")
torch.set_num_threads(1)
stop = False
def derive(k):
    x = torch.ones(k, requires_grad=True)
    wengert.grad((x.sin() * x).sum(), x, create_graph=True)
def work():
    k = 0
    while not stop:
        k = k % 7 + 1
        derive(k)
        wengert.clear_caches()
derive(3)  # what PyTorch initialises at its first use is not forked in between
threads = [threading.Thread(target=work) for _ in range(2)]
[t.start() for t in threads]
hung = 0
for _ in range(60):
    child = os.fork()
    if child == 0:  # takes every lock of ours; PyTorch's backward pass has one of its own, which a fork may leave locked
        wengert.jacobian(torch.sin, torch.ones(3))
        wengert.clear_caches()
        os._exit(0)
    last = time.monotonic() + 20
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > last:
            hung += 1
            os.kill(child, 9)
            os.waitpid(child, 0)
            break
        time.sleep(0.001)
    if hung:
        break
stop = True
[t.join() for t in threads]
sys.exit(hung)
"""


def test_a_fork_beside_threads_that_compute():
    """No cache is left locked in the child by a thread that it does not have."""
    if DEVICE.type == "cuda":
        pytest.skip("CUDA does not survive a fork")
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=300)


FIRST_FORKS = """
import os, random, sys, threading, time, warnings
import torch, wengert
warnings.simplefilter("ignore")
torch.set_num_threads(1)
def work(functional):
    x = torch.ones(5, requires_grad=True)
    functional.jacobian(lambda x: (x.sin() * x.exp()).softmax(0), x)
def ends(child, seconds):
    last = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        if time.monotonic() > last:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return False
        time.sleep(0.001)
work(torch.autograd.functional)  # what PyTorch initialises at its first use is not forked in between
draw = random.Random(0)
for _ in range(60):
    process = os.fork()
    if process == 0:  # where nobody has called wengert yet
        thread = threading.Thread(target=work, args=(wengert,))
        thread.start()
        last = time.perf_counter() + draw.random() * 0.002
        while time.perf_counter() < last:
            pass
        child = os.fork()
        if child == 0:
            work(wengert)
            os._exit(0)
        well = ends(child, 20)
        thread.join()
        os._exit(not well)
    draw.random()
    if not ends(process, 60):
        sys.exit(1)
"""


def test_a_fork_during_the_first_call():
    """Nothing that is made once is being made by a thread that the child does not have."""
    if DEVICE.type == "cuda":
        pytest.skip("CUDA does not survive a fork")
    subprocess.run([sys.executable, "-c", FIRST_FORKS], check=True, timeout=300)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, k):
        x = torch.full((3,), k + 1.0)
        return wengert.jacobian(torch.sin, x)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_dataloader_workers():
    if DEVICE.type == "cuda":
        pytest.skip("CUDA does not survive a fork")
    for k, row in enumerate(torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2)):
        assert_same(row, torch.diag(torch.full((3,), k + 1.0).cos()))


def test_threads_share_the_engine_and_keep_their_grad_mode():
    errors = []
    expected = expected_and_ours()[1]

    def work(k):
        try:
            torch.set_grad_enabled(bool(k % 2))
            for _ in range(10):
                assert_same(expected_and_ours()[0], expected)
                assert torch.is_grad_enabled() == bool(k % 2)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors[0]


def test_several_threads_on_one_graph():
    x = torch.linspace(0.5, 1.5, 20, dtype=torch.float64, requires_grad=True)
    y = x.sin() * x.sum()
    expected, results = wengert.jacobian(y, x), []
    threads = [threading.Thread(target=lambda: results.append(wengert.jacobian(y, x))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 4
    for result in results:
        assert_same(result, expected)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_keyboard_interrupt():
    """An interrupt in a long call arrives, and everything works afterwards."""

    def slow(x):
        time.sleep(0.2)
        for _ in range(200):
            x = x.sin() * x.sum()
        return x

    def raise_interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raise_interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            wengert.jacobian(slow, torch.ones(50))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert torch.is_grad_enabled()
    assert_same(*expected_and_ours())


def test_stats():
    x = torch.ones(3)
    wengert.reset_stats()
    assert wengert.stats().native == {} and wengert.stats().fallback == {}
    wengert.jacobian(torch.sin, x)
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        wengert.jacobian(torch.sin, x)
        func.grad(torch.sum)(x)
    seen = wengert.stats()
    assert seen.fallback["jacobian"]["anomaly mode"] == 1
    assert seen.fallback["func.grad"] == {"anomaly mode": 1}
    assert seen.native.get("jacobian", 0) + sum(seen.fallback["jacobian"].values()) == 2
    assert "anomaly mode" in str(seen)
    wengert.reset_stats()
    assert seen.fallback["jacobian"]["anomaly mode"] == 1, "a snapshot changed"
    assert wengert.stats().fallback == {}


def test_the_main_job_runs_on_the_engine():
    x = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    wengert.reset_stats()
    wengert.jacobian(lambda x: x.sin() * x, x)
    wengert.hessian(lambda x: (x[1:] * x[:-1] ** 2).sum(), x)
    func.jacrev(torch.tanh)(x)
    func.vmap(func.jacrev(lambda x: x.sin() * x.sum()))(x.reshape(2, 3))
    wengert.batch_jacobian(torch.sin, x)
    if os.environ.get("WENGERT_DISABLE"):
        return
    seen = wengert.stats()
    assert seen.fallback == {}, str(seen)
    assert seen.native == {"jacobian": 1, "hessian": 1, "func.jacrev": 1, "func.vmap(jacrev)": 1, "batch_jacobian": 1}


def test_explain():
    x = torch.linspace(0.5, 1.5, 10)
    report = wengert.explain(lambda x: (x.sin() * x).sum(), x)
    text = str(report)
    if report.refused is None:
        assert {"node", "kind", "structure", "blocks", "stored", "dense"} <= set(text.splitlines()[0].split())
        assert len(report) == len(list(report)) >= 3
        assert any("Mul" in row["node"] for row in report)
    leaf = x.requires_grad_()
    assert str(wengert.explain((leaf.sin() * leaf).sum(), leaf)) == text
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        assert "anomaly mode" in str(wengert.explain(torch.sin, x))
    with pytest.raises(TypeError, match="must be either a Tensor or a tuple of Tensors"):
        wengert.explain(lambda x: 3, x)


def test_histories_through_checkpoints():
    """Checkpointing saves through hooks of its own while PyTorch is asked what its results lead to."""
    from torch.utils.checkpoint import checkpoint

    def f(x):
        y = checkpoint(lambda t: t.sin() * t.flip(-1), x, use_reentrant=False)
        return y, y.sin()

    x, v = torch.rand(3, 3, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64)
    ours, theirs = (m.jvp(f, x.clone().requires_grad_(), v, create_graph=True) for m in (wengert, F))
    assert_same(ours, theirs)


def test_rows_through_a_checkpoint():
    """A node that is called row by row is in another pass each time: what a checkpoint computes again it gives once a pass."""
    from torch.utils.checkpoint import checkpoint

    x, w = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64, requires_grad=True)
    norm = lambda t: torch.nn.functional.layer_norm(t, (4,), w)
    f = lambda x: checkpoint(norm, x, use_reentrant=False)
    assert_same(wengert.jacobian(f, x, create_graph=True), F.jacobian(f, x, create_graph=True))
    assert_same(wengert.hessian(lambda x: f(x).square().sum(), x), F.hessian(lambda x: f(x).square().sum(), x))


def test_checkpointed_functions():
    from torch.utils.checkpoint import checkpoint

    x = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    g = lambda x: checkpoint(f, checkpoint(f, x, use_reentrant=False) * x, use_reentrant=False)
    expected = F.jacobian(g, x)
    assert_same(wengert.jacobian(g, x), expected)
    assert_same(wengert.func.jacrev(g)(x), expected)
    assert_same(wengert.func.grad(lambda x: g(x).sum())(x), expected.sum(0))
    # Below vmap PyTorch refuses such functions, and nobody could know what is computed again there.
    xs = torch.stack([x, 2 * x])
    for transform in (lambda m: m.jacrev(g), lambda m: m.grad(lambda x: g(x).sum())):
        assert_same_error(
            lambda m=wengert.func, t=transform: m.vmap(t(m))(xs), lambda m=torch.func, t=transform: m.vmap(t(m))(xs)
        )


def test_results_keep_nothing_of_the_user_alive():
    import gc
    import weakref

    class Holder:
        pass

    holder = Holder()
    watch = weakref.ref(holder)

    def g(x, holder=holder):
        return x.sin()

    wengert.jacobian(g, torch.ones(3))
    func.vmap(func.jacrev(g))(torch.ones(2, 3))
    del g, holder
    gc.collect()
    assert watch() is None
