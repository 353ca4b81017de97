"""The tensors that a transform differentiates by, and what the caller may see of tensors that hang on them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from .. import _engine
from .._native import C
from ._trees import differentiated, unflatten

Argnums = int | tuple[int, ...]


class Leaves:
    """The differentiated tensors of one call, made fresh, and what is needed to put results back into their structure."""

    __slots__ = ("attached", "flat", "given", "inner", "positions", "refused", "spec", "tensors", "tuple_of_args")

    def __init__(self, flat: list[Any], args_spec: Any, argnums: Argnums, grad_mode: bool) -> None:
        self.positions, self.spec = differentiated(argnums, len(flat), args_spec)
        self.tuple_of_args = isinstance(argnums, tuple)
        self.flat = list(flat)
        self.refused: str | None = None  # why PyTorch's engine had to go through the graph in the end
        self.attached = False  # some leaf hangs on a graph of the caller
        self.tensors: list[Tensor] = []
        self.given: list[Tensor] = []  # in whose places they are
        # Those of transforms that the function called.  Where a graph holds them it keeps these references alive, too.
        self.inner: list[weakref.ref[Tensor]] = []
        for k in self.positions:
            x = flat[k]
            if grad_mode and x.requires_grad:
                self.attached = True
                leaf = x.view_as(x)
            else:
                leaf = x.detach().requires_grad_()
            self.flat[k] = leaf
            self.tensors.append(leaf)
            self.given.append(x)

    def nest(self, parts: Sequence[Any]) -> Any:
        nested = unflatten(list(parts), self.spec)
        return nested if self.tuple_of_args else nested[0]

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What `func` returns.  The leaves of transforms inside of it are known here afterwards."""
        outer, _running.leaves = _running.leaves, self
        try:
            return func(*args, **kwargs)
        finally:
            _running.leaves = outer
            if outer is not None:
                outer.inner += map(weakref.ref, self.tensors)
                outer.inner += [leaf for leaf in self.inner if leaf() is not None]

    def reach_caller(self, outputs: Sequence[Tensor]) -> bool:
        """Whether PyTorch's `outputs` would require grad: behind ours lies more than leaves of this call, made here or inside."""
        inner = [leaf for reference in self.inner if (leaf := reference()) is not None]
        return _engine.has_other_leaves(outputs, self.tensors + inner)

    def settle(self, blocks: Sequence[Tensor], create_graph: bool) -> Sequence[Tensor]:
        """Blocks of a result that PyTorch computes as one tensor: with a history where any has one that reaches the caller."""
        for block in blocks:  # a loop, as a generator costs a small gradient some percent
            if block.requires_grad:
                break
        else:
            return blocks
        if not (create_graph and self.reach_caller(blocks)):
            return [block.detach() for block in blocks]
        live = [block for block in blocks if block.requires_grad]
        return blocks if len(live) == len(blocks) else [b if b.requires_grad else C.tether(b, live) for b in blocks]

    def needs_graph(self, outputs: Sequence[Tensor]) -> bool:
        """Whether PyTorch's result could be differentiated again: a caller's graph or a captured parameter is involved."""
        return self.attached or self.reach_caller(outputs)

    def release(self, tree: Any, grad_mode: bool) -> Any:
        """What the caller may see of tensors that hang on our leaves: PyTorch's would not."""

        def one(t: Any) -> Any:
            if not isinstance(t, Tensor):
                raise RuntimeError(f"Expected tensors, got unsupported type {type(t)}")
            if not t.requires_grad:
                return t
            given = next((x for leaf, x in zip(self.tensors, self.given) if t is leaf), None)
            if given is not None:
                return given
            if t.is_leaf:  # the caller's own
                return t
            return t if grad_mode and self.reach_caller((t,)) else t.detach()

        return one(tree) if isinstance(tree, Tensor) else tree_map(one, tree)


class _Running(threading.local):
    leaves: Leaves | None = None  # of the innermost transform whose function this thread runs


_running = _Running()
