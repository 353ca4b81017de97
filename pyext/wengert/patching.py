"""Routes torch's own functions through wengert: `patched`, `install` and `uninstall`.

What is replaced: ``torch.autograd.functional.*``, ``torch.func.*``, ``torch.vmap`` and batched ``torch.autograd.grad``,
in torch's public modules and in every module outside torch that holds one of them as a global name (after
``from torch.func import jacrev``, say).

What cannot be: references kept elsewhere (default arguments, closures, attributes of classes or objects, functools.partial), and
transforms that were built before, such as ``g = jacrev(f)`` at the top of a module.  They stay PyTorch's, and so stay right.
The replacement is global to the process: while it lasts, other threads see it too.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.func

from . import _engine, func, functional
from .autograd import grad


def _grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """torch.autograd.grad; through wengert where the cotangents are batched."""
    chosen = grad if is_grads_batched else _engine.torch_grad
    return chosen(
        outputs,
        inputs,
        grad_outputs,
        retain_graph,
        create_graph,
        only_inputs,
        allow_unused,
        is_grads_batched,
        materialize_grads,
    )


functools.update_wrapper(_grad, torch.autograd.grad)
del _grad.__wrapped__  # type: ignore[attr-defined]  # it is the replacement's own signature that counts


def _replacements() -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
    pairs = [(getattr(torch.autograd.functional, name), getattr(functional, name)) for name in _FUNCTIONAL]
    pairs += [(getattr(torch.func, name), getattr(func, name)) for name in _FUNC]
    pairs.append((_engine.torch_grad, _grad))
    return [(theirs, ours) for theirs, ours in pairs if theirs is not ours]


_FUNCTIONAL = ("jacobian", "hessian", "vjp", "jvp", "vhp", "hvp")
_FUNC = tuple(func.__all__)
_PUBLIC = ("torch", "torch.func", "torch.autograd", "torch.autograd.functional", "functorch")
_REPLACEMENTS = _replacements()

_lock = threading.RLock()


class _Holder:
    """An open `patched` of a thread, or `install`."""

    def __init__(self, thread: int | None) -> None:
        self.thread = thread


_PROCESS = _Holder(None)  # `install` holds for all threads
_holders: list[_Holder] = []
_changed: list[tuple[ModuleType, str, Any, Any]] = []  # module, name, what stood there, what stands there now


def _modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        inside = name.partition(".")[0] in ("torch", "functorch", "wengert", "torchgen")
        if isinstance(module, ModuleType) and (name in _PUBLIC or not inside):
            yield module


def _enter(holder: _Holder) -> None:
    """May be interrupted anywhere: `_exit` leaves nothing half done."""
    with _lock:
        first = not _holders
        _holders.append(holder)
        if not first:
            return
        # TorchScript finds torch.autograd.grad by identity: without this entry it would try to compile our function.
        torch.jit._builtins._register_builtin(_grad, "aten::grad")
        by_id = {id(theirs): (theirs, ours) for theirs, ours in _REPLACEMENTS}
        for module in _modules():
            for name, value in list(vars(module).items()):
                if id(value) in by_id:
                    theirs, ours = by_id[id(value)]
                    _changed.append((module, name, theirs, ours))
                    setattr(module, name, ours)


def _exit(holder: _Holder) -> None:
    with _lock:
        if holder in _holders:  # not if a fork left it behind
            _holders.remove(holder)
        _restore_unless_held()


def _exit_at_last(holder: _Holder) -> None:
    interrupt: BaseException | None = None
    for _ in range(8):
        try:
            _exit(holder)
            break
        except BaseException as error:  # an interrupt, or several
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _restore_unless_held() -> None:
    while _changed and not _holders:
        module, name, theirs, ours = _changed[-1]
        if vars(module).get(name) is ours:  # somebody else's later replacement stays
            setattr(module, name, theirs)
        _changed.pop()


def _after_fork_in_child() -> None:
    """Only the forking thread is here: what others hold would be held for good."""
    try:
        here = (None, threading.get_ident())
        _holders[:] = [holder for holder in _holders if holder.thread in here]
        _restore_unless_held()
    finally:
        _lock.release()


if hasattr(os, "register_at_fork"):
    # The lock is the forking thread's meanwhile, so that nothing is half done in the child.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork_in_child)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Inside, torch's own derivative functions run through wengert; a decorator, too.

    ``torch.autograd.functional.*``, ``torch.func.*`` and ``torch.autograd.grad(..., is_grads_batched=True)`` are replaced,
    also under names that other modules imported earlier.  May be nested; restores everything on the way out, also after an
    exception.  Modules imported inside that took a replaced function along keep it; it goes on working.  References held by
    closures, default arguments, classes or objects are not replaced, and go on being PyTorch's.

    >>> import torch, wengert
    >>> before = torch.func.jacrev
    >>> with wengert.patched():
    ...     torch.func.jacrev is wengert.func.jacrev
    True
    >>> torch.func.jacrev is before
    True
    """
    holder = _Holder(threading.get_ident())
    try:
        _enter(holder)
        yield
    finally:
        _exit_at_last(holder)


def install() -> None:
    """Do what `patched` does until `uninstall`; a second call changes nothing."""
    with _lock:
        if _PROCESS in _holders:
            return
        try:
            _enter(_PROCESS)
        except BaseException:
            _exit_at_last(_PROCESS)
            raise


def uninstall() -> None:
    """Undo `install`; without one before it, nothing happens."""
    _exit_at_last(_PROCESS)
