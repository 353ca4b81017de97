"""What is known of the functions that run under vmap: whether the graph they leave below it stands for PyTorch's derivative.

PyTorch's ``vmap(jacrev(f))`` records `f` one sample at a time, as it were, and maps afterwards; the engine reads what one run of
the mapped `f` leaves.  The two agree but for operators that vmap rewrites (see NOTE [Operators that vmap rewrites] in the
engine), autograd Functions with a vmap rule of their own, and functions that ask whether a tensor requires grad.  So a function
is watched on its first run with inputs of certain shapes.  Later runs are compared by the structure of their graph, which
costs nothing.  A graph that nobody has watched counts for nothing either: the function runs again then, watched, within the same
call, since what a call returns must not depend on the calls before it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from inspect import signature
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack, _pop_torch_function_stack
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._functorch.autograd_function import custom_function_call, has_overridden_vmap_rule
from torch.nn import Parameter
from torch.nn.functional import batch_norm, embedding, embedding_bag, instance_norm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .. import _engine
from .._engine import Refused
from .._native import C

_MOST_SHAPES = 64  # that one function's verdict remembers
_MOST_STRUCTURES = 8  # for inputs of the same shapes; with more, every run is watched
_ENOUGH_REFUSALS = 2  # the first may be due to what the function was given
_NOTHING: AbstractSet[int] = frozenset()
_CONSTANTS = {int, bool, str, type(None)}
_DATA = {int, float, bool, Tensor, Parameter}
_MOST_ITEMS = 16  # of a tuple, a list or a dict that is looked into
_ASKS_FOR_HISTORY = (Tensor.requires_grad, Tensor.grad_fn, Tensor.is_leaf)
_WRITES = {"__setitem__", "__set__", *(f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor".split())}
_detach_, _register_hook, _data = Tensor.detach_, Tensor.register_hook, Tensor.data
_set_grad_enabled = torch._C._set_grad_enabled


class Rewritten(Refused):
    """The function runs under vmap, but the graph it leaves does not stand for PyTorch's derivative, or is B graphs."""


class ArgumentsWatch(TorchFunctionMode):
    """Watches one run of a function that PyTorch may have to run again: `refuse` for what must not happen twice.

    Raises at once, before the function writes to its arguments; `reason` stays for functions that catch errors.
    """

    refusal: type[Refused] = Refused

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.reason: str | None = None
        self._arguments = arguments
        self._storages: set[int] | None = None

    def run(self, function: Callable[[], Any]) -> Any:
        """What the function returns, watched."""
        depth = _len_torch_function_stack()
        try:
            with self:
                return function()
        finally:
            while _len_torch_function_stack() > depth:  # an interrupt came between entering and what leaves
                _pop_torch_function_stack()

    def refuse(self, reason: str) -> NoReturn:
        self.reason = reason
        raise self.refusal(reason)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look(func, args, kwargs)
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            self.reason = "an operator that raises an error"  # which it need not do in PyTorch's order of things
            raise

    def look(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any] | None) -> None:
        """Raise where the call writes to an argument or moves a generator, or cuts a tensor off from all derivatives."""
        if func is _detach_:
            self.refuse("detach_() in the function")
        if kwargs and kwargs.get("generator") is not None:
            self.refuse("a random generator of the function's own")
        written = _written(func, args, kwargs or {})
        if not written:
            return
        if self._storages is None:
            self._storages = {_storage(x) for x in self._arguments if isinstance(x, Tensor)}
        if any(_storage(x) in self._storages for x in tree_leaves(written) if isinstance(x, Tensor)):
            self.refuse("a function that writes to its arguments")


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a call writes to, by the name of what is called; an empty list where that is nothing."""
    name = getattr(func, "__name__", "").partition(".")[0]  # of torch.ops.aten.add_.Scalar, say
    in_place = name[-1:] == "_" and (name in _WRITES or (name[-2:-1] != "_" and name != "requires_grad_"))
    if in_place or kwargs.get("inplace"):
        return args[:1] or [kwargs.get(first) for first in ("input", "self", "tensor")]
    if kwargs.get("out") is not None:
        return [kwargs["out"]]
    if (func is embedding or func is embedding_bag) and (len(args) > 3 or kwargs.get("max_norm") is not None):
        bound = signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        return [] if bound.arguments["max_norm"] is None else [bound.arguments["weight"]]
    return _updated_statistics(func, name, args, kwargs) if "norm" in name else []


def _storage(x: Tensor) -> int:
    """What tensors that share memory have in common."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


class ForwardWatch(ArgumentsWatch):
    """Sees what forward and reverse mode treat differently: torch.no_grad stops only reverse mode, hooks run only there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (func is _set_grad_enabled and not args[0]) or func is _register_hook:
            self.refuse("forward mode through torch.no_grad or a hook")
        if getattr(func, "__self__", None) is _data:
            self.refuse("forward mode through x.data")
        if _updated_statistics(func, getattr(func, "__name__", "").partition(".")[0], args, kwargs or {}):
            self.refuse("running statistics that are updated")
        return super().__torch_function__(func, types, args, kwargs)


# Operators that update running statistics, their fourth and fifth arguments: where the sixth says so, and always.
_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training")
_NORMS_IN_TRAINING = {
    "batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_impl_index",
    "_native_batch_norm_legit",
}  # fmt: skip
_NORMS_ALWAYS = {"_batch_norm_with_update", "batch_norm_gather_stats", "batch_norm_gather_stats_with_counts"}


def _updated_statistics(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
    """The running statistics that a call of batch or instance norm updates, if it is one and does."""
    if func is batch_norm or func is instance_norm:
        bound = signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
    elif name in _NORMS_IN_TRAINING or name in _NORMS_ALWAYS:
        given = {**dict(zip(_NORM, args)), **kwargs}
    else:
        return []
    if not (given.get("training") or given.get("use_input_stats") or name in _NORMS_ALWAYS):
        return []
    return [x for x in (given.get("running_mean"), given.get("running_var")) if x is not None]


class Watch(ArgumentsWatch):
    """Watches one run of a function under vmap; `reason` then says why its graph is not PyTorch's, if it is not."""

    refusal = Rewritten

    def __enter__(self) -> Watch:
        C.begin_vmap_watch()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.reason = C.end_vmap_watch() or self.reason

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        if func is custom_function_call:
            if has_overridden_vmap_rule(args[0]) and not all(_comes_from(t, args[0]) for t in tree_leaves(out)):
                self.reason = f"{args[0].__name__} has a vmap rule of its own"
        elif getattr(func, "__self__", None) in _ASKS_FOR_HISTORY and is_batchedtensor(args[0]):
            self.reason = "the function asks whether a tensor requires grad"
        return out


_engine.HARMLESS_MODES |= {ArgumentsWatch, ForwardWatch, Watch}


def _comes_from(value: Any, function: type) -> bool:
    """Whether what vmap's rule for the autograd `function` returned is the function's own result for the whole batch."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    whole = get_unwrapped(value) if is_batchedtensor(value) else value
    return getattr(whole.grad_fn, "_forward_cls", None) is function


Refusals = dict[Any, tuple[str, int]]  # why PyTorch answered a request instead of the engine, and how often


class Verdict:
    """What is known of one function; its refusals, of all functions made by the same code.

    A function written as a lambda is a new one on every call.  That another one was refused says where to go first, no more:
    PyTorch's answer is the right one whatever the function does.  That the graph of another one was watched says nothing.
    """

    __slots__ = ("complete", "like", "one_by_one", "reason", "refusals", "seen")

    def __init__(self, refusals: Refusals) -> None:
        self.like: Any = None
        self.reason: str | None = None  # why PyTorch has to evaluate it
        self.complete = False  # for that reason, after the whole of it was watched
        self.one_by_one = False  # for PyTorch cannot either
        self.seen: dict[Any, set[int]] = {}  # structures of watched graphs, by the shapes of the inputs
        self.refusals = refusals

    def likeness(self, func: Any) -> Any:
        """What tells the function from others of its code; as it was at first, whatever becomes of its closure."""
        if self.like is None:
            self.like = _likeness(func)
        return self.like

    def refuse(self) -> None:
        """Raise if the function is known to need PyTorch."""
        if self.reason is not None:
            raise Rewritten(self.reason)

    def expected(self, request: Any) -> str | None:
        """What a request was refused for, where it always was: the function need not run to be refused again."""
        reason, times = self.refusals.get(request, (None, 0))
        return reason if times >= _ENOUGH_REFUSALS else None

    def refused(self, request: Any, reason: str) -> None:
        """A request was."""
        if request is None:
            return
        if request not in self.refusals and len(self.refusals) >= _MOST_SHAPES:
            self.refusals.clear()
        self.refusals[request] = (reason, self.refusals.get(request, (None, 0))[1] + 1)

    def forget(self, request: Any) -> None:
        """A request was not refused, or PyTorch has an error for it."""
        self.refusals.pop(request, None)

    def structures(self, shapes: Any) -> AbstractSet[int]:
        """Of watched graphs with inputs of these shapes.  Where there are some, a run need not be watched."""
        seen = self.seen.get(shapes, _NOTHING)
        return seen if len(seen) <= _MOST_STRUCTURES else _NOTHING

    def watch(self, run: Callable[[], Any], arguments: Sequence[Any]) -> Any:
        """What the function returns, watched; raises Rewritten where PyTorch has to evaluate it."""
        watch = Watch(arguments)
        try:
            out = watch.run(run)
        except Rewritten:
            self.reason = watch.reason
            raise
        self.reason = watch.reason
        self.complete = True
        self.refuse()
        return out

    def remember(self, shapes: Any, structure: int) -> None:
        """After the derivative of a watched run."""
        if structure:
            if shapes not in self.seen and len(self.seen) >= _MOST_SHAPES:
                self.seen.clear()
            known = self.seen.setdefault(shapes, set())
            if len(known) <= _MOST_STRUCTURES:
                known.add(structure)


# By object, as an object may be unhashable or equal to others: its own verdict, and those of its methods.
_verdicts: dict[int, tuple[weakref.ref[Any], Verdict, weakref.WeakKeyDictionary[Any, Verdict]]] = {}
_refusals: dict[int, tuple[weakref.ref[CodeType], Refusals]] = {}  # by code object, too: comparing two of them is slow


def verdict_of(func: Any) -> Verdict:
    """The verdict on a function, kept as long as the function (and the object it is a method of) lives."""
    owner, method = (func.__self__, func.__func__) if type(func) is MethodType else (func, None)
    key = id(owner)
    entry = _verdicts.get(key)
    try:
        if entry is None or entry[0]() is not owner:
            reference = weakref.ref(owner, partial(_verdicts.pop, key))  # no Python code, where a signal could strike
            refusals = _refusals_of(owner.__code__) if type(owner) is FunctionType else {}
            entry = _verdicts[key] = (reference, Verdict(refusals), weakref.WeakKeyDictionary())
        return entry[1] if method is None else entry[2].setdefault(method, Verdict({}))
    except TypeError:  # watched every time
        return Verdict({})


def _refusals_of(code: CodeType) -> Refusals:
    key = id(code)
    entry = _refusals.get(key)
    if entry is None or entry[0]() is not code:
        entry = _refusals[key] = (weakref.ref(code, partial(_refusals.pop, key)), {})
    return entry[1]


def _likeness(value: Any, depth: int = 3) -> Any:
    """What functions of the same code have in common if they were refused for the same: kinds of what their closures hold.

    Objects are told apart by their identity.  It may be that of one that is gone, a tensor of the same shape or a number may be
    another: functions that are taken for alike need not be.
    """
    kind = type(value)
    if kind in _CONSTANTS:
        return kind, value
    if kind is float:  # which may well be another in the next call
        return kind
    if kind is Tensor or kind is Parameter:
        return value.shape, value.dtype
    if kind is MethodType:
        return id(value.__self__), id(value.__func__)
    if depth:
        of = partial(_likeness, depth=depth - 1)
        if kind is FunctionType:
            defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            return id(value.__code__), *map(of, map(_content, value.__closure__ or ())), *map(of, defaults)
        if kind is tuple and len(value) <= _MOST_ITEMS:
            return kind, *map(of, value)
        if kind is list or kind is dict:  # what is called, say; numbers may well be others in the next call
            items = [x for x in (value if kind is list else value.values()) if type(x) not in _DATA]
            if len(items) <= _MOST_ITEMS:
                return kind, *map(of, items)
    return id(value)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty as yet
        return None
