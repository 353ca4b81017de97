"""vmap with torch.func.vmap's signature, which sees through the transform objects of this package."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.func as _torch
from torch import Tensor
from torch._functorch.vmap import _get_chunked_inputs
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .. import _engine
from .._compile import traced_as
from .._engine import Refused
from .._native import C
from ._transforms import Transform, Wrapped, cannot_run_again
from ._trees import batched, flatten, unflatten
from ._watch import ArgumentsWatch, Rewritten, Verdict, verdict_of

_torch_vmap = _torch.vmap  # kept from before any patching


def _random_state(flat: list[Any]) -> Any:
    return _engine.random_state([x for x in flat if isinstance(x, Tensor)])


def _is_draw(error: RuntimeError) -> bool:
    """Whether random numbers were to be drawn within `C.without_draws`."""
    return "random operations inside of vmap" in str(error)


_CONSTANTS = {int, float, complex, bool, str, type(None), torch.dtype, torch.device}


def _kind(tree: Any) -> Any:
    """A tree with shapes and types in the place of its tensors; TypeError where it holds what cannot be told from others."""
    if type(tree) is Tensor:
        return tree.shape, tree.dtype
    if type(tree) is dict:
        return "dict", *[(name, _kind(value)) for name, value in tree.items()]
    if type(tree) is tuple or type(tree) is list:
        return type(tree), *map(_kind, tree)
    if type(tree) not in _CONSTANTS:
        raise TypeError(type(tree))
    return type(tree), tree


class BatchedTransform(Wrapped):
    """``vmap(jacrev(f))`` and its like: one evaluation of `f` for the whole batch, the batch axis tied."""

    def __init__(
        self, transform: Transform, in_dims: Any, out_dims: Any, randomness: str, chunk_size: int | None
    ) -> None:
        super().__init__(transform)
        # Made at once, so that bad options are refused here as they are by PyTorch.
        peer = functools.wraps(transform, updated=())(lambda *a, **k: transform.peer(*a, **k))
        self.peer = _torch_vmap(peer, in_dims, out_dims, randomness, chunk_size=chunk_size)
        self.in_dims, self.out_dims = in_dims, out_dims
        self.has_aux = any(t.has_aux for t in transform.chain())
        *_, self.innermost = transform.chain()
        self.randomness, self.chunk_size = randomness, chunk_size
        self.name = f"func.vmap({transform.name.removeprefix('func.')})"

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        return self.peer(*args, **kwargs)

    @traced_as(_traced)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handled = sys.exc_info()[1]
        reason = _engine.refusal()
        if reason is None and (type(self.out_dims) is not int or (kwargs and not self.func.takes_kwargs)):
            reason = "unusual arguments"
        grad_mode = torch.is_grad_enabled()
        verdict = verdict_of(self.innermost.func)
        request = random = None
        given: list[Any] = []
        if reason is None:
            size, dims, flat, spec = batched(self.in_dims, args, self.func)
            given = [*flat, *tree_leaves(kwargs)] if kwargs else flat
            reason = self._unusual(size, flat, spec)
        versions = C.versions(given) if given else []
        known = verdict.reason is not None  # the engine refuses without running the function
        if reason is None and verdict.refusals and not known:
            request = self._request(verdict, args, kwargs, grad_mode)
            expected = verdict.expected(request)
            if expected is not None:
                random = self._random_state(flat)
                try:
                    result = self.peer(*args, **kwargs)
                    _engine.count_fallback(self.name, expected)
                    return result
                except RuntimeError as error:  # which the engine need not raise
                    if C.ends_a_program(error, handled) or versions != C.versions(given):
                        raise
                    verdict.forget(request)
                    if random is not None:
                        random.restore()
                finally:
                    if random is not None:
                        random.end()
        if reason is None and size == 1 and not self.has_aux:
            try:
                return self._run_single(dims, flat, spec, kwargs)
            except RuntimeError as error:
                if not _is_draw(error):
                    raise
                reason = "random numbers"
        refused_as: type[Exception] = RuntimeError
        if reason is None:
            random = self._random_state(flat)
            try:
                torch._C._set_grad_enabled(True)
                run_chunk = functools.partial(self._run_chunk, spec, kwargs, verdict, grad_mode)
                result, refused = self._run(size, dims, flat, run_chunk)
                _engine.count(self.name, refused)
                if request is not None:
                    verdict.forget(request)
                return result
            except RuntimeError as error:  # PyTorch's own way has its own errors, or none
                if not _engine.may_run_again(error, handled):
                    raise
                if versions != C.versions(given):
                    verdict.reason = verdict.reason or "a function that writes to its arguments"  # PyTorch's, from now on
                    cannot_run_again(self.name, error)
                refused_as = type(error)
                reason = str(error) if isinstance(error, Refused) else "an error in the derivative of the mapped function"
                if random is not None:
                    random.restore()
            finally:
                torch._C._set_grad_enabled(grad_mode)
                if random is not None:
                    random.end()
        _engine.count_fallback(self.name, reason)
        # One sample after the other, where PyTorch cannot do it either, and nothing that was done would be done twice.
        # Where only time spoke for PyTorch, it may not be able to at all.
        alone = refused_as is Rewritten or (issubclass(refused_as, Refused) and reason == _engine.SHORTER)
        harmless = alone and random is None and verdict.complete
        refused_too: RuntimeError | None = None
        if not (harmless and verdict.one_by_one):
            try:
                result = self.peer(*args, **kwargs)
                if issubclass(refused_as, Refused) and not known:
                    verdict.refused(self._request(verdict, args, kwargs, grad_mode), reason)
                return result
            except RuntimeError as error:
                if not harmless or C.ends_a_program(error, handled) or versions != C.versions(given):
                    raise
                refused_too = error.with_traceback(None)  # which holds this frame
        run = functools.partial(self._run_one_by_one, size, dims, flat, spec, kwargs)
        try:
            result = ArgumentsWatch([*flat, *tree_leaves(kwargs)]).run(functools.partial(C.without_draws, run))
            verdict.one_by_one = True  # only now: the call may have been wrong for both
            return result
        except RuntimeError as error:
            if not (isinstance(error, Refused) or _is_draw(error)) or C.ends_a_program(error, handled):
                raise
        if refused_too is not None:
            raise refused_too
        return self.peer(*args, **kwargs)

    def _random_state(self, flat: list[Any]) -> Any:
        """Of the generators, where the function may draw from them and then run again; else None."""
        return None if self.randomness == "error" else _random_state(flat)

    def _request(self, verdict: Verdict, args: tuple[Any, ...], kwargs: dict[str, Any], grad_mode: bool) -> Any:
        """What a refusal depends on, but for what the function does besides; None where that cannot be told."""
        argnums = self.innermost.argnums
        if kwargs or not (type(argnums) is int or type(argnums) is tuple):
            return None
        try:
            like = verdict.likeness(self.innermost.func)
            return self.name, argnums, str(self.in_dims), self.randomness, grad_mode, _kind(args), like
        except TypeError:
            return None

    def _run_one_by_one(
        self, size: int, dims: list[int | None], flat: list[Any], spec: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The derivatives of the samples one after the other: of a function that runs under vmap, but not in PyTorch's order."""
        results = [
            self.func.at_point(
                unflatten([x if d is None else x.select(d, b) for x, d in zip(flat, dims)], spec), kwargs, self.name
            )
            for b in range(size)
        ]
        trees = [tree_flatten(result) for result in results]
        return tree_unflatten([torch.stack(parts, self.out_dims) for parts in zip(*(t[0] for t in trees))], trees[0][1])

    def _unusual(self, size: int, flat: list[Any], spec: Any) -> str | None:
        if size == 0:
            return "an empty batch"
        if self.chunk_size is not None and self.chunk_size < size and self.randomness == "same":
            return "chunks with the same randomness"
        for transform in self.func.chain():
            reason = transform.unusual(flat, spec)
            if reason is not None:
                return reason
        return None

    def _run_single(self, dims: list[int | None], flat: list[Any], spec: Any, kwargs: dict[str, Any]) -> Any:
        """A batch of one sample is that sample: the function runs without torch's batching, which triples its cost.

        Raises an error that `_is_draw` knows where torch forbids random numbers and some were to be drawn.
        """
        sample = unflatten([x if d is None else x.select(d, 0) for x, d in zip(flat, dims)], spec)
        if self.randomness == "error":
            result = C.without_draws(functools.partial(self.func.at_point, sample, kwargs, self.name))
        else:
            result = self.func.at_point(sample, kwargs, self.name)
        return result.unsqueeze(self.out_dims) if type(result) is Tensor else tree_map(self._unsqueeze, result)

    def _unsqueeze(self, t: Tensor) -> Tensor:
        return t.unsqueeze(self.out_dims)

    def _run(
        self, size: int, dims: list[int | None], flat: list[Any], run_chunk: Callable[..., tuple[Any, str | None]]
    ) -> tuple[Any, str | None]:
        if self.chunk_size is None or self.chunk_size >= size:
            return run_chunk(dims, flat)
        results, refused = zip(
            *(
                run_chunk(dims, list(chunk))
                for chunk in _get_chunked_inputs(flat, dims, size, self.chunk_size)
                if all(x.shape[d] for x, d in zip(chunk, dims) if d is not None)
            )
        )
        flat_results, specs = zip(*map(flatten, results))
        whole = unflatten([torch.cat(parts, self.out_dims) for parts in zip(*flat_results)], specs[0])
        return whole, next(filter(None, refused), None)

    def _run_chunk(
        self,
        spec: Any,
        kwargs: dict[str, Any],
        verdict: Verdict,
        grad_mode: bool,
        dims: list[int | None],
        flat: list[Any],
    ) -> tuple[Any, str | None]:
        front = [x.movedim(d, 0) if d else x for x, d in zip(flat, dims)]
        tied = [None if d is None else 0 for d in dims]
        result, refused = self.func.run_batch(front, spec, tied, kwargs, self.randomness, verdict, grad_mode)
        if self.out_dims != 0:
            result = tree_map(lambda t: t.movedim(0, self.out_dims), result)
        return result, refused


@traced_as(_torch_vmap)
def vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Map a function over a batch axis; torch.func.vmap.

    Args:
        func: any function.  If it is what this package's grad, grad_and_value, jacrev, jacfwd or hessian returned, the
            batch is differentiated by the engine: per-sample derivatives without a B x B intermediate.
        in_dims: the batch axis of the arguments, or None for those that all samples share.
        out_dims: where the batch axis goes in the results.
        randomness: "error", "different" or "same", as in torch.
        chunk_size: samples at a time; None for all of them.

    Returns:
        The mapped function.

    Raises:
        ValueError, RuntimeError: what torch.func.vmap raises.

    >>> from wengert.func import grad, jacrev
    >>> vmap(jacrev(lambda x: x.prod()))(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[2., 1.],
            [4., 3.]])
    >>> w, x = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> vmap(grad(lambda w, x: (w @ x) ** 2), in_dims=(None, 0))(w, x)
    tensor([[10., 20.],
            [66., 88.]])
    """
    if isinstance(func, Transform):
        return BatchedTransform(func, in_dims, out_dims, randomness, chunk_size)
    return _torch_vmap(func, in_dims, out_dims, randomness, chunk_size=chunk_size)
