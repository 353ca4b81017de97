"""patched(), install() and python -m wengert: what is replaced, what is restored, and what keeps working."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import types

import pytest
import torch
import torch.func
import wengert
from support.compare import assert_same
from torch.autograd import functional as F

ORIGINAL = {
    (module, name): getattr(module, name)
    for module, names in (
        (F, ("jacobian", "hessian", "vjp", "jvp", "vhp", "hvp")),
        (torch.func, ("grad", "grad_and_value", "jacrev", "jacfwd", "hessian", "vmap", "vjp", "jvp", "functional_call")),
        (torch.autograd, ("grad",)),
        (torch, ("vmap",)),
    )
    for name in names
}


def assert_restored():
    for (module, name), value in ORIGINAL.items():
        assert getattr(module, name) is value, f"{module.__name__}.{name}"


@pytest.fixture(autouse=True)
def restored():
    assert_restored()
    yield
    assert_restored()


@pytest.fixture
def user_module():
    """A module that imported torch's functions by name before any patching."""
    module = types.ModuleType("a_user_module")
    exec(
        "from torch.func import jacrev, vmap as batched\nfrom torch.autograd.functional import jacobian\n"
        "from torch.autograd import grad\nimport torch\n"
        "kept = [jacrev]\ndef slope(f, x): return jacobian(f, x)\ndef default(f, x, j=jacobian): return j(f, x)",
        vars(module),
    )
    sys.modules["a_user_module"] = module
    yield module
    del sys.modules["a_user_module"]


def test_what_is_replaced(user_module):
    with wengert.patched():
        assert F.jacobian is wengert.jacobian and F.hvp is wengert.hvp
        assert torch.func.jacrev is wengert.func.jacrev and torch.vmap is wengert.func.vmap
        assert user_module.jacrev is wengert.func.jacrev and user_module.batched is wengert.func.vmap
        assert user_module.jacobian is wengert.jacobian
        assert user_module.kept[0] is ORIGINAL[torch.func, "jacrev"]
    assert user_module.jacrev is ORIGINAL[torch.func, "jacrev"]


def test_calls_are_counted(user_module):
    x = torch.ones(3)
    with wengert.patched():
        wengert.reset_stats()
        user_module.slope(torch.sin, x)
        F.hessian(lambda x: x.sin().sum(), x)
        torch.func.vmap(torch.func.jacrev(torch.sin))(x[None])
        y = x.requires_grad_().sin()
        torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
        seen = wengert.stats()
    assert sum(seen.native.values()) + sum(sum(r.values()) for r in seen.fallback.values()) >= 4
    assert "jacobian" in {**seen.native, **seen.fallback}
    assert "func.vmap(jacrev)" in {**seen.native, **seen.fallback}
    assert "grad" in {**seen.native, **seen.fallback}


def test_only_batched_grad_is_replaced():
    x = torch.ones(3, requires_grad=True)
    with wengert.patched():
        wengert.reset_stats()
        assert_same(torch.autograd.grad(x.sin().sum(), x), (x.cos().detach(),))
        assert "grad" not in {**wengert.stats().native, **wengert.stats().fallback}


def test_nesting_and_exceptions():
    with wengert.patched():
        with pytest.raises(KeyError), wengert.patched():
            raise KeyError
        assert F.jacobian is wengert.jacobian
        with wengert.patched():
            pass
        assert F.jacobian is wengert.jacobian


def test_install_and_uninstall():
    wengert.uninstall()
    wengert.install()
    wengert.install()
    with wengert.patched():
        pass
    assert torch.func.jacrev is wengert.func.jacrev
    wengert.uninstall()
    assert_restored()
    wengert.uninstall()


def test_install_inside_patched():
    with wengert.patched():
        wengert.install()
    assert F.jacobian is wengert.jacobian
    wengert.uninstall()


def test_as_decorator():
    @wengert.patched()
    def run():
        return F.jacobian is wengert.jacobian

    assert run()
    assert_restored()
    assert run()


def test_somebody_else_s_patch_is_left_alone():
    mine = lambda *a: None
    try:
        with wengert.patched():
            F.jacobian = mine
        assert F.jacobian is mine
    finally:
        F.jacobian = ORIGINAL[F, "jacobian"]


def test_threads():
    errors, x = [], torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    expected = torch.diag(x.cos())

    def work():
        try:
            for _ in range(20):
                with wengert.patched():
                    assert_same(F.jacobian(torch.sin, x), expected)
                    assert_same(torch.func.vmap(torch.func.grad(torch.sin))(x), x.cos())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors[0]


def in_child(check):
    """The status of a forked process that runs `check`, which returns whether all is well there."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)  # rather than hang
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1]


def beside_a_thread(body, check):
    """`in_child`, while another thread is where `body` yields."""
    there, forked = threading.Event(), threading.Event()

    def run():
        with body():
            there.set()
            forked.wait(0.3 if body is held_lock else None)

    thread = threading.Thread(target=run)
    thread.start()
    there.wait()
    try:
        return in_child(check)
    finally:
        forked.set()
        thread.join()


def held_lock():
    return wengert.patching._lock


def is_patched():
    return F.jacobian is wengert.jacobian


def can_be_patched():
    before = is_patched()
    with wengert.patched():
        inside = is_patched()
    return inside and is_patched() == before


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("body", [held_lock, wengert.patched], ids=["enters", "is inside"])
def test_a_fork_beside_a_thread_that(body):
    """The child neither waits for the thread, which it has not, nor stays patched for it."""
    assert beside_a_thread(body, lambda: not is_patched() and can_be_patched()) == 0


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_keeps_what_the_forking_thread_and_the_process_hold():
    with wengert.patched():
        assert beside_a_thread(wengert.patched, lambda: is_patched() and can_be_patched()) == 0
    wengert.install()
    try:
        assert beside_a_thread(wengert.patched, lambda: is_patched() and can_be_patched()) == 0
        assert in_child(lambda: wengert.uninstall() or not is_patched()) == 0
    finally:
        wengert.uninstall()


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_a_lost_thread_entered_may_still_be_left():
    opened = wengert.patched()
    thread = threading.Thread(target=opened.__enter__)
    thread.start()
    thread.join()

    def leave():
        with wengert.patched():
            opened.__exit__(None, None, None)
            return is_patched()

    assert in_child(lambda: leave() and not is_patched()) == 0
    assert is_patched()
    opened.__exit__(None, None, None)




def test_modules_imported_while_patched_keep_a_working_function(tmp_path, monkeypatch):
    text = "from torch.func import jacrev, vmap\nfrom torch.autograd.functional import hessian\n"
    (tmp_path / "imported_while_patched.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with wengert.patched():
        import imported_while_patched as module
    x = torch.linspace(0.5, 1.5, 3)
    assert_same(module.vmap(module.jacrev(torch.sin))(x[None]), torch.diag(x.cos())[None])
    assert_same(module.hessian(lambda x: (x**3).sum(), x), torch.diag(6 * x))


def test_transforms_made_while_patched_keep_working():
    x = torch.linspace(0.5, 1.5, 3)
    with wengert.patched():
        g = torch.func.jacrev(torch.sin)
    assert_same(g(x), torch.diag(x.cos()))
    assert_same(torch.func.vmap(g)(x[None]), torch.diag(x.cos())[None])


SCRIPTED = '''
import torch
from torch import Tensor
from typing import List, Optional

class Function(object):
    def __init__(self, k: int):
        self.k = k

    def gradient(self, x: Tensor) -> Optional[Tensor]:
        f = (x ** self.k).sum()
        return torch.autograd.grad([f], [x], create_graph=False)[0]

Compiled = torch.jit.script(Function)

@torch.jit.script
def slope(x: Tensor) -> Optional[Tensor]:
    return torch.autograd.grad([(x ** 3).sum()], [x])[0]
'''


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_that_calls_autograd_grad(tmp_path, monkeypatch):
    """TorchScript finds torch.autograd.grad by identity; pytorch-minimize scripts a class that calls it."""
    (tmp_path / "scripts_grad.py").write_text(SCRIPTED)
    monkeypatch.syspath_prepend(tmp_path)
    with wengert.patched():
        import scripts_grad as module
    x = torch.linspace(0.5, 1.5, 3, requires_grad=True)
    assert_same(module.slope(x), (3 * x**2).detach())
    assert_same(module.Compiled(3).gradient(x), (3 * x**2).detach())


def run(*arguments, cwd, code=0, **env):
    command = [sys.executable, "-m", "wengert", *arguments]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout


SCRIPT = '''
import sys, torch, helper
from torch.func import jacrev
print(__name__, sys.argv[1:], helper.NAME)
x = torch.ones(2)
print(jacrev(torch.sin)(x).shape, torch.autograd.functional.jacobian(torch.sin, x).shape)
import wengert
print(jacrev is wengert.func.jacrev)
s = wengert.stats()
print(sum(s.native.values()), sorted({r for by in s.fallback.values() for r in by}))
if len(sys.argv) > 2:
    sys.exit(3)
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart/script.py").write_text(SCRIPT)
    (tmp_path / "apart/helper.py").write_text("NAME = 'beside the script'\n")
    return tmp_path


def test_running_a_script(script):
    lines = run("apart/script.py", "one", cwd=script).splitlines()
    assert lines[0] == "__main__ ['one'] beside the script"
    assert lines[2] == "True"


def test_running_a_module(script):
    assert "__main__ ['one'] beside the script" in run("-m", "script", "one", cwd=script / "apart")


def test_exit_status_and_bad_arguments(script):
    run("apart/script.py", "one", "two", cwd=script, code=3)
    run("no-such-script.py", cwd=script, code=1)
    run(cwd=script, code=2)
    assert "usage" in run("--help", cwd=script)


def test_disabled(script):
    lines = run("apart/script.py", cwd=script, WENGERT_DISABLE="1").splitlines()
    assert lines[3] == "0 ['WENGERT_DISABLE is set']"


def test_disabled_needs_no_extension(tmp_path):
    code = textwrap.dedent(
        """
        import sys
        sys.modules["wengert._C"] = None
        import torch, wengert
        x = torch.ones(3)
        print(wengert.jacobian(torch.sin, x).shape, wengert.func.vmap(wengert.func.grad(torch.sin))(x).shape)
        print(wengert.batch_jacobian(torch.sin, x).shape, wengert.explain(torch.sin, x))
        y = x.requires_grad_().sin()
        print(wengert.jacobian(y, x).shape, wengert.hessian(y.sum(), x).shape, wengert.grad(y.sum(), x)[0].shape)
        """
    )
    env = {**os.environ, "WENGERT_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "WENGERT_DISABLE is set" in done.stdout
