"""torch's pytrees, quick where a tree is a tensor or a tuple of tensors and numbers: there a round trip costs 20 us in torch."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._functorch.eager_transforms import _slice_argnums
from torch._functorch.vmap import _process_batched_inputs
from torch.nn import Parameter
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_LEAF_TYPES = {Tensor, Parameter, int, float, bool}
_LEAF = tree_flatten(0)[1]
_children = TreeSpec.children if hasattr(TreeSpec, "children") else operator.attrgetter("children_specs")  # before torch 2.13


@functools.cache
def _tuple_of(count: int) -> TreeSpec:
    """The structure of a tuple of `count` leaves; always the same object, so that it is recognised by identity."""
    return tree_flatten((0,) * count)[1]


def flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """tree_flatten."""
    if type(tree) is Tensor:
        return [tree], _LEAF
    if type(tree) is tuple and all(type(x) in _LEAF_TYPES for x in tree):
        return list(tree), _tuple_of(len(tree))
    return tree_flatten(tree)


def unflatten(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    """tree_unflatten."""
    if spec is _LEAF:
        return leaves[0]
    if spec is _tuple_of(len(leaves)):
        return tuple(leaves)
    return tree_unflatten(leaves, spec)


def differentiated(argnums: int | tuple[int, ...], count: int, spec: TreeSpec) -> tuple[list[int], TreeSpec]:
    """Which of the `count` leaves of the arguments `argnums` picks, and the structure of the picked ones."""
    if type(argnums) is int and -count <= argnums < count and spec is _tuple_of(count):
        return [argnums % count], _tuple_of(1)
    return tree_flatten(_slice_argnums(tree_unflatten(list(range(count)), spec), argnums))


def batched(in_dims: Any, args: tuple[Any, ...], func: Callable[..., Any]) -> tuple[int, list[int | None], list[Any], TreeSpec]:
    """Batch size, batch axis per leaf, leaves, structure; with torch.func.vmap's errors."""
    if in_dims == 0 and type(in_dims) is int and args and all(type(x) is Tensor and x.dim() for x in args):
        size = args[0].shape[0]
        if all(x.shape[0] == size for x in args):
            return size, [0] * len(args), list(args), _tuple_of(len(args))
    if type(in_dims) is tuple and len(in_dims) == len(args) and all(d is None or (type(d) is int and d == 0) for d in in_dims):
        flat, spec = flatten(args)
        dims: list[int | None] = []
        for dim, tree in zip(in_dims, _children(spec)):
            dims += [dim] * tree.num_leaves
        over = [x for x, dim in zip(flat, dims) if dim is not None]
        if all(type(x) is Tensor and x.dim() for x in over):
            sizes = {x.shape[0] for x in over}
            if len(sizes) == 1:
                return sizes.pop(), dims, flat, spec
    return _process_batched_inputs(in_dims, args, func)
