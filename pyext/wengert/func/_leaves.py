"""The tensors that a transform differentiates by, and what the caller may see of tensors that hang on them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .. import _engine
from .._engine import Refused
from .._native import C
from ._trees import differentiated, unflatten

Argnums = int | tuple[int, ...]
_MANY = 64  # leaves of inner transforms


class Leaves:
    """The differentiated tensors of one call, made fresh, and what is needed to put results back into their structure."""

    __slots__ = (
        "attached",
        "begun",
        "by_pytorch",
        "create_graph",
        "flat",
        "given",
        "grad_mode",
        "hooked",
        "inner",
        "most_inner",
        "nests",
        "nodes",
        "others",
        "positions",
        "refused",
        "spec",
        "tensors",
        "written",
    )

    def __init__(
        self, flat: list[Any], args_spec: Any, argnums: Argnums, grad_mode: bool, kwargs: dict[str, Any] | None = None
    ) -> None:
        self.positions, self.spec = differentiated(argnums, len(flat), args_spec)
        self.nests = isinstance(argnums, tuple)
        self.flat = list(flat)
        self.refused: str | None = None  # why PyTorch's engine had to go through the graph in the end
        self.grad_mode = grad_mode  # the caller's
        self.create_graph = False  # whether PyTorch's result could be differentiated again
        self.by_pytorch: str | None = None  # why PyTorch's engine has to go through the graph
        self.written = False  # the function wrote to its arguments, so that it must not run again
        self.hooked: Sequence[Tensor] = ()  # outputs with hooks behind them, which PyTorch's engine has run
        self.begun = C.sequence_number()  # what has a lower one is the caller's
        self.attached = False  # some leaf hangs on a graph of the caller
        self.tensors: list[Tensor] = []
        self.nodes: list[Any] = []  # of those that hang on nothing
        self.given: list[Tensor] = []  # in whose places they are
        # Those of transforms that the function called.  Where a graph holds them it keeps these references alive, too.
        self.inner: list[weakref.ref[Tensor]] = []
        self.most_inner = _MANY  # when to forget those that are gone
        for k in self.positions:
            x = flat[k]
            if grad_mode and x.requires_grad:
                self.attached = True
                leaf = C.attached_leaf(x)
            else:
                leaf, node = C.transform_leaf(x)
                self.nodes.append(node)
            self.flat[k] = leaf
            self.tensors.append(leaf)
            self.given.append(x)
        # Of the other arguments, those without a history; it is not the function's to leave them one.
        self.others: list[Tensor] = []
        if len(flat) > len(self.positions) or kwargs:
            rest = [x for k, x in enumerate(flat) if k not in self.positions]
            for x in [*rest, *tree_leaves(kwargs)] if kwargs else rest:
                if isinstance(x, Tensor) and not x.requires_grad:
                    self.others.append(x)
                    if x._is_view() and not x._base.requires_grad:  # type: ignore[union-attr]
                        self.others.append(x._base)  # type: ignore[arg-type]

    def nest(self, parts: Sequence[Any]) -> Any:
        nested = unflatten(list(parts), self.spec)
        return nested if self.nests else nested[0]

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What `func` returns.  The leaves of transforms inside of it are known here afterwards."""
        outer, _running.leaves = _running.leaves, self
        try:
            if not self.attached:
                return func(*args, **kwargs)
            places = [(leaf.grad_fn, leaf._version) for leaf in self.tensors]
            out = func(*args, **kwargs)
            for leaf, (place, version) in zip(self.tensors, places):
                if leaf.grad_fn is not place:
                    if leaf._version != version:  # as torch.func says it, to which each argument is a leaf
                        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
                    raise Refused("an argument that is detached in place")
            return out
        finally:
            _running.leaves = outer
            if outer is not None:
                outer.inner += map(weakref.ref, self.tensors)
                outer.inner += [leaf for leaf in self.inner if leaf() is not None]
                if len(outer.inner) > outer.most_inner:
                    outer.inner = [leaf for leaf in outer.inner if leaf() is not None]
                    outer.most_inner = max(_MANY, 2 * len(outer.inner))

    def reach_caller(self, outputs: Sequence[Tensor]) -> list[bool]:
        """Which of PyTorch's `outputs` would require grad: behind ours is more than leaves of this call, made here or inside."""
        own = self.tensors
        if self.inner:
            own = own + [leaf for reference in self.inner if (leaf := reference()) is not None]
        attached = [leaf for leaf in self.tensors if leaf.grad_fn is not None] if self.attached else ()
        return _engine.have_other_leaves(outputs, own, self.begun, attached)

    def settle(self, groups: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
        """Blocks, in groups that PyTorch computes as one tensor: with a history where one of a group's reaches the caller."""
        live = [block for group in groups for block in group if block.requires_grad]
        if not live:
            return list(groups)
        reaching = iter(self.reach_caller(live) if self.create_graph else [False] * len(live))
        settled: list[Sequence[Tensor]] = []
        for group in groups:
            with_history = [block for block in group if block.requires_grad]
            reaches = [next(reaching) for _ in with_history]
            if not any(reaches):
                settled.append([block.detach() for block in group] if with_history else group)
            elif len(with_history) == len(group):
                settled.append(group)
            else:
                settled.append([block if block.requires_grad else C.tether(block, with_history) for block in group])
        return settled

    def left_to_pytorch(self, error: Refused, outputs: Sequence[Tensor]) -> None:
        """PyTorch's engine goes through the graph of `outputs` instead."""
        self.refused = str(error)
        if C.passes_hooks(outputs, self.tensors):
            self.hooked = outputs
            self.create_graph = self.grad_mode  # a hook may use what has a history

    def drop_hooks(self) -> None:
        """Of the function's own graph: torch.func's transforms outside of this one do not meet them again."""
        if self.hooked:
            C.drop_hooks(self.hooked, self.tensors, self.begun)

    def clean(self) -> None:
        """Takes what the function left behind: its history in other arguments that it wrote to, and hooks."""
        self.drop_hooks()
        written = [x for x in self.others if x.requires_grad]
        if written:
            for x, reaches in zip(written, self.reach_caller(written)):
                if not (reaches and self.grad_mode):
                    C.forget_history(x)

    def decide(self, outputs: Sequence[Tensor]) -> None:
        """Whether PyTorch's result could be differentiated again: a caller's graph or a captured parameter is involved."""
        if self.inner and any(map(_engine.is_half, (*outputs, *self.tensors))):
            self.by_pytorch = _engine.HALF
        self.create_graph = self.grad_mode and (self.attached or any(self.reach_caller(outputs)))

    def refuse(self) -> None:
        """Raise where `decide` found that the engine must not go through the graph."""
        if self.by_pytorch is not None:
            raise Refused(self.by_pytorch)

    def release(self, tree: Any, forward: bool = False) -> Any:
        """What the caller may see of tensors that hang on our leaves: PyTorch's would not.

        Arguments are themselves again, but after PyTorch's forward mode, and so is what is the caller's own.
        """
        flat, spec = tree_flatten(tree)
        given = {id(leaf): x for leaf, x in zip(self.tensors, self.given)}
        asked = []
        for k, t in enumerate(flat):
            if not isinstance(t, Tensor):
                raise RuntimeError(f"Expected tensors, got unsupported type {type(t)}")
            if not t.requires_grad:
                continue
            if id(t) in given and not forward:
                flat[k] = given[id(t)]
            elif id(t) in given or not (t.is_leaf or (not self.grad_mode and C.is_older(t, self.tensors, self.begun))):
                asked.append(k)
        reached = self.reach_caller([flat[k] for k in asked]) if self.grad_mode and asked else [False] * len(asked)
        for k, reaches in zip(asked, reached):
            if not reaches:
                flat[k] = flat[k].detach()
        kept = [flat[k] for k, reaches in zip(asked, reached) if reaches]
        if kept:
            C.drop_hooks(kept, self.tensors, self.begun)
        return tree_unflatten(flat, spec)


class _Running(threading.local):
    leaves: Leaves | None = None  # of the innermost transform whose function this thread runs


_running = _Running()


def differentiated_twice(given: Sequence[Any]) -> str | None:
    """Why PyTorch has to take the derivative of a transform inside of another by these, and then the other's, or None."""
    outer = _running.leaves
    if outer is None or not any(map(_engine.is_half, given)):
        return None
    outer.by_pytorch = _engine.HALF
    return _engine.HALF
