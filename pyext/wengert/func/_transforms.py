"""The transform objects: how each runs on the engine, for one point and for a whole batch.

A transform runs the user's function on fresh leaves *below* no functorch level, which leaves an ordinary autograd graph that
the engine can read.  Whatever is unusual goes to `peer`, torch.func's own function made with the same arguments.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from threading import active_count
from typing import Any, NoReturn

import torch
import torch.func as _torch
from torch import Tensor
from torch._C._functorch import (
    _add_batch_dim,
    _remove_batch_dim,
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
    get_dynamic_layer_stack_depth,
)
from torch._functorch.eager_transforms import (
    _construct_standard_basis_for,
    _validate_and_wrap_argnums,
    assert_non_empty_tensor_output,
    error_if_complex,
)
from torch._functorch.vmap import _unwrap_batched, lazy_load_decompositions
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map

from .. import _engine
from .._compile import traced_as
from .._engine import Refused
from .._native import C
from ._leaves import Argnums, Leaves, differentiated_twice
from ._trees import differentiated, flatten, unflatten
from ._watch import ForwardWatch, Verdict

_torch_grad, _torch_grad_and_value = _torch.grad, _torch.grad_and_value  # kept from before any patching
_torch_jacrev, _torch_jacfwd, _torch_hessian, _torch_vmap = _torch.jacrev, _torch.jacfwd, _torch.hessian, _torch.vmap
_is_grad_enabled = torch.is_grad_enabled
_set_grad_enabled = torch._C._set_grad_enabled
_load_decompositions = functools.cache(lazy_load_decompositions)
_is_ordinary = _engine.is_ordinary


class Wrapped:
    """A callable that looks like the function it wraps, and binds as a method like one."""

    def __init__(self, func: Callable[..., Any]) -> None:
        functools.update_wrapper(self, func, updated=())
        self.func = func

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Transform(Wrapped):
    """A derivative of `func` with respect to the positional arguments `argnums`."""

    name = ""
    takes_kwargs = False
    forward = False  # stands for a transform that is forward mode in torch

    def __init__(self, func: Callable[..., Any], argnums: Argnums, has_aux: bool, **options: Any) -> None:
        super().__init__(func)
        self.argnums = argnums
        self.has_aux = has_aux
        self.options = options  # what else the peer takes
        self._peers: dict[Argnums, Callable[..., Any]] = {}

    def make_peer(self, argnums: Argnums) -> Callable[..., Any]:
        """torch.func's own function."""
        raise NotImplementedError

    def derive(self, out: Any, leaves: Leaves) -> Any:
        """The result, from what `func` returned at the leaves."""
        raise NotImplementedError

    def derive_batch(self, out: Any, leaves: Leaves, dims: Sequence[int | None]) -> Any:
        """The same with a batch axis in front of every output and of the arguments whose entry in `dims` is 0."""
        raise NotImplementedError

    def check(self, out: Any) -> Any:
        """Raise what PyTorch raises for what `func` returned (of one sample); return it."""
        raise NotImplementedError

    def peer(self, *args: Any, **kwargs: Any) -> Any:
        if not (args and isinstance(self.argnums, (int, tuple))):
            return self.make_peer(self.argnums)(*args, **kwargs)
        argnums = _validate_and_wrap_argnums(self.argnums, len(args))  # torch 2.13's jacfwd gives zeros for negative ones
        made = self._peers.get(argnums) or self._peers.setdefault(argnums, self.make_peer(argnums))
        return made(*args, **kwargs)

    def unusual(self, flat: Sequence[Any], args_spec: Any) -> str | None:
        """Why PyTorch should see these arguments (to raise an error, most often), or None."""
        if not isinstance(self.argnums, (int, tuple)):
            return "argnums that is neither an int nor a tuple"
        if self.forward and self.options.get("randomness", "error") != "error":
            return "random numbers in forward mode"
        for k in differentiated(self.argnums, len(flat), args_spec)[0]:
            if not _is_ordinary(flat[k]) or not flat[k].is_floating_point():
                return "differentiated arguments that are not plain real tensors"
        for x in flat:
            if isinstance(x, Tensor) and (not _is_ordinary(x) or x.is_complex()):
                return "arguments that are not plain real tensors"
        if isinstance(self.func, Transform) and any(map(_engine.is_half, flat)):
            return _engine.HALF
        return None

    def run(self, leaves: Leaves, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What `func` returns; raises Refused where PyTorch's forward mode would not compute what the graph says."""
        if not self.forward:
            return leaves.run(func, args, kwargs)
        # PyTorch's forward mode is a vmap, where drawing is an error.
        watch = ForwardWatch(leaves.flat)
        out = watch.run(functools.partial(C.without_draws, functools.partial(leaves.run, func, args, kwargs)))
        if watch.reason is not None:
            raise Refused(watch.reason)
        return out

    def chain(self) -> Iterator[Transform]:
        """This transform, the one it differentiates, and so on."""
        transform = self
        while isinstance(transform, Transform):
            yield transform
            transform = transform.func

    @traced_as(peer)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.at_point(args, kwargs, self.name)

    def at_point(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        """The derivative at these arguments, counted under `name`."""
        handled = sys.exc_info()[1]
        reason = _engine.refusal()
        if reason is None and (not args or (kwargs and not self.takes_kwargs)):
            reason = "unusual arguments"
        if reason is None:
            flat, spec = flatten(args)
            reason = self.unusual(flat, spec) or differentiated_twice(flat)
        if reason is None:
            grad_mode = _is_grad_enabled()
            leaves = drawn = versions = None
            try:
                _set_grad_enabled(True)
                leaves = Leaves(flat, spec, self.argnums, grad_mode, kwargs)
                if not self.forward:  # which watches the function
                    given = [*leaves.flat, *tree_leaves(kwargs)] if kwargs else leaves.flat
                    versions, drawn = C.versions(given), C.mark_generators(leaves.tensors[0].device)
                out = self.check(self.run(leaves, self.func, unflatten(leaves.flat, spec), kwargs))
                result = self.derive(out, leaves)
                _engine.count(name, leaves.refused)
                return result
            except RuntimeError as error:
                known = self.forward or isinstance(error, Refused) or _torch_func_alone(error, grad_mode)
                if not known or C.ends_a_program(error, handled):
                    raise
                if drawn is not None:
                    if versions != C.versions(given):
                        cannot_run_again(name, error)
                    if active_count() == 1:  # what other threads have drawn stays drawn
                        drawn.restore()
                reason = str(error) if isinstance(error, Refused) else "reverse mode raises an error"
            finally:
                _set_grad_enabled(grad_mode)
                if leaves is not None:
                    leaves.clean()
        _engine.count_fallback(name, reason)
        return self.peer(*args, **kwargs)

    def run_batch(
        self,
        flat: list[Any],
        spec: Any,
        dims: Sequence[int | None],
        kwargs: dict[str, Any],
        randomness: str,
        verdict: Verdict,
        grad_mode: bool = True,
    ) -> tuple[Any, str | None]:
        """The derivative at every sample, batch axes in front; and why PyTorch's engine computed it, if it did.

        `verdict` is that on the innermost function; `grad_mode` is the caller's; here it is on.
        """
        leaves = Leaves(flat, spec, self.argnums, grad_mode)
        inner_dims = [dims[k] for k in leaves.positions]
        if isinstance(self.func, Transform):
            options = {"kwargs": kwargs, "randomness": randomness, "verdict": verdict}
            inner = functools.partial(self.func.run_batch, spec=spec, dims=dims, **options)
            out, leaves.refused = self.run(leaves, inner, (leaves.flat,), {})
            self.check(tree_map(_first_sample, out))
            result = self.derive_batch(out, leaves, inner_dims)
            leaves.drop_hooks()
            return result, leaves.refused
        shapes = tuple([x.shape if isinstance(x, Tensor) else None for x in flat])
        arguments = (leaves.flat, spec, dims, kwargs, randomness)
        seen = verdict.structures(shapes)
        watched = not seen
        random = None if watched or randomness == "error" else _engine.random_state(leaves.tensors)
        given = [*leaves.flat, *tree_leaves(kwargs)] if kwargs else leaves.flat
        versions = [] if watched else C.versions(given)
        first = first_structure = None
        try:
            while True:
                verdict.refuse()
                C.take_structures()
                if watched:
                    out = verdict.watch(functools.partial(self.run, leaves, self._map, arguments, {}), given)
                else:
                    out = self.run(leaves, self._map, arguments, {})
                    leaves.written = versions != C.versions(given)
                result = self.derive_batch(out, leaves, inner_dims)
                leaves.drop_hooks()
                structure = C.take_structures()
                if watched:
                    verdict.remember(shapes, structure)
                if first is not None:  # these were copies
                    random.restore()
                    if structure != first_structure:
                        raise Refused("a function that writes to its arguments")
                    return first
                if watched or structure in seen:
                    return result, leaves.refused
                if leaves.written:  # so that only copies can be given to it once more
                    first, first_structure = (result, leaves.refused), structure
                    if random is not None:
                        random.end()
                    random = _engine.random_state(leaves.tensors)
                    copies, copied = tree_map(_copy, (flat, kwargs))
                    leaves, given = Leaves(copies, spec, self.argnums, grad_mode=False), []
                    arguments, watched = (leaves.flat, spec, dims, copied, randomness), True
                    continue
                watched, leaves.refused = True, None
                if random is not None:
                    random.restore()
        finally:
            if random is not None:
                random.end()

    def _map(self, flat: list[Any], spec: TreeSpec, dims: Sequence[int | None], kwargs: dict[str, Any], randomness: str) -> Any:
        """torch.func.vmap of the checked function, batch axes in front."""
        _load_decompositions()
        size = next(x.shape[0] for x, dim in zip(flat, dims) if dim is not None)
        depth = get_dynamic_layer_stack_depth()
        handled = sys.exc_info()[1]
        try:
            level = _vmap_increment_nesting(size, randomness)
            args = [x if dim is None else _add_batch_dim(x, 0, level) for x, dim in zip(flat, dims)]
            out = self.check(C.composed(functools.partial(self.func, *unflatten(args, spec), **kwargs)))
            if type(out) is Tensor:
                return _remove_batch_dim(out, level, size, 0)
            return _unwrap_batched(out, 0, level, size, self.func)
        except Exception as error:  # PyTorch's order of things may run it, or has an error of its own
            if isinstance(error, Refused) or not _engine.may_run_again(error, handled):
                raise
            raise Refused("a function that does not run under vmap alone") from error
        finally:
            while get_dynamic_layer_stack_depth() > depth:  # not so where an interrupt comes first
                _vmap_decrement_nesting()


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def cannot_run_again(name: str, error: RuntimeError) -> NoReturn:
    """Raise, as PyTorch would have to run a function again that has changed what it was given."""
    if not isinstance(error, Refused):
        raise error
    if error.__cause__ is not None:
        raise error.__cause__ from None
    raise RuntimeError(
        f"{name}: the function wrote to its arguments, so that it cannot run again for PyTorch to answer, as it has to here "
        f"({error}); torch.{name} runs it once"
    ) from None


def _first_sample(x: Any) -> Any:
    """Of a tensor with a batch axis in front, for what has to be known of one sample."""
    return x.detach()[0] if isinstance(x, Tensor) else x


def _torch_func_alone(error: RuntimeError, grad_mode: bool) -> bool:
    """Whether it may be that torch.func has no such error.

    It has derivatives by decomposing operators; under no_grad a function may write to arguments that require grad.
    """
    text = str(error)
    return (
        "is not differentiable with respect to argument" in text
        or "Inference tensors cannot be saved for backward" in text
        or (not grad_mode and "a leaf Variable that requires grad" in text)
    )


class Jacobian(Transform):
    """What jacrev and jacfwd return."""

    def __init__(self, name: str, func: Callable[..., Any], argnums: Argnums, has_aux: bool, **options: Any) -> None:
        super().__init__(func, argnums, has_aux, **options)
        self.name = f"func.{name}"
        self.forward = name == "jacfwd"

    def make_peer(self, argnums: Argnums) -> Callable[..., Any]:
        maker = _torch_jacfwd if self.forward else _torch_jacrev
        return maker(self.func, argnums, has_aux=self.has_aux, **self.options)

    def check(self, out: Any) -> Any:
        api = "jvp(f, primals, tangents)" if self.forward else "vjp(f, *primals)"
        result = out
        if self.has_aux:
            if not (isinstance(out, tuple) and len(out) == 2):
                raise RuntimeError(f"{api}: output of function f should be a tuple: (output, aux) if has_aux is True")
            result = out[0]
        flat = [result] if isinstance(result, Tensor) else tree_leaves(result)
        assert_non_empty_tensor_output(flat, api)
        for t in flat:
            if not t.is_floating_point():
                if self.forward and not t.is_complex():
                    raise Refused("an output that is not real")
                if not t.is_complex():
                    raise RuntimeError(
                        "vjp(f, ...): All outputs of f must be floating-point or complex Tensors, "
                        f"got Tensor with dtype {t.dtype}"
                    )
                error_if_complex("jacfwd" if self.forward else "jacrev", flat, is_input=False)
        return out

    def derive(self, out: Any, leaves: Leaves) -> Any:
        out, aux = out if self.has_aux else (out, None)
        flat, spec = flatten(out)
        must_be_finite = self.forward and _check_forward(flat, leaves.tensors)
        leaves.decide(flat)
        try:
            leaves.refuse()
            blocks = _engine.native_jacobian(flat, leaves.tensors, leaves.create_graph)
        except Refused as error:
            if self.forward:  # which may be much cheaper than rows
                raise
            leaves.left_to_pytorch(error, flat)
            by_rows = _engine.torch_rows if leaves.refused == _engine.SAVED_THROUGH_HOOKS else self._vmapped_rows
            blocks = by_rows(flat, leaves.tensors, leaves.create_graph)
        rows = [[_filled(block, x, y.shape + x.shape) for block, x in zip(row, leaves.tensors)] for y, row in zip(flat, blocks)]
        result = unflatten([leaves.nest(row) for row in self._settle(rows, leaves)], spec)
        if must_be_finite:
            _check_finite(result)
        return (result, leaves.release(aux, self.forward)) if self.has_aux else result

    def derive_batch(self, out: Any, leaves: Leaves, dims: Sequence[int | None]) -> Any:
        out, aux = out if self.has_aux else (out, None)
        flat, spec = flatten(out)
        must_be_finite = self.forward and _check_forward(flat, leaves.tensors)
        leaves.decide(flat)
        rows = list(zip(*_batch_columns(flat, leaves, dims)))
        result = unflatten([leaves.nest(row) for row in self._settle(rows, leaves)], spec)
        if must_be_finite:
            _check_finite(result)
        return (result, leaves.release(aux, self.forward)) if self.has_aux else result

    def _settle(self, rows: Sequence[Sequence[Tensor]], leaves: Leaves) -> Sequence[Sequence[Tensor]]:
        if self.forward:
            return leaves.settle(rows)
        return list(zip(*leaves.settle(list(zip(*rows)))))

    def _vmapped_rows(self, outputs: list[Tensor], inputs: list[Tensor], create_graph: bool) -> _engine.Blocks:
        """torch.func.jacrev's way through the graph that is there."""
        live = [y for y in outputs if y.requires_grad]
        if not live:
            return [[None] * len(inputs) for _ in outputs]
        sizes = tuple(y.numel() for y in live)

        def row(*cotangents: Tensor) -> tuple[Tensor, ...]:
            found = _engine.torch_grad(live, inputs, cotangents, True, create_graph=create_graph, allow_unused=True)
            return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs))

        basis = _construct_standard_basis_for(live, sizes)
        stacked = _torch_vmap(row, chunk_size=self.options.get("chunk_size"))(*basis)
        parts = iter(zip(*(g.split(sizes) for g in stacked)))
        return [
            [g.reshape(y.shape + x.shape) for g, x in zip(next(parts), inputs)] if y.requires_grad else [None] * len(inputs)
            for y in outputs
        ]


class Gradient(Transform):
    """What grad and grad_and_value return."""

    takes_kwargs = True

    def __init__(self, func: Callable[..., Any], argnums: Argnums, has_aux: bool, with_value: bool) -> None:
        super().__init__(func, argnums, has_aux)
        self.with_value = with_value
        self.name = "func.grad_and_value" if with_value else "func.grad"

    def make_peer(self, argnums: Argnums) -> Callable[..., Any]:
        return (_torch_grad_and_value if self.with_value else _torch_grad)(self.func, argnums, self.has_aux)

    def check(self, out: Any) -> Any:
        result = out
        if self.has_aux:
            if not (isinstance(out, tuple) and len(out) == 2):
                raise RuntimeError(
                    "grad_and_value(f)(*args): output of function f should be a tuple: (output, aux) if has_aux is True"
                )
            result = out[0]
        if not isinstance(result, Tensor):
            raise RuntimeError(f"grad_and_value(f)(*args): Expected f(*args) to return a Tensor, got {type(result)}")
        if result.dim() != 0:
            raise RuntimeError(
                "grad_and_value(f)(*args): Expected f(*args) to return a scalar Tensor, got tensor with "
                f"{result.dim()} dims. Maybe you wanted to use the vjp or jacrev APIs instead?"
            )
        return out

    def derive(self, out: Any, leaves: Leaves) -> Any:
        value, aux = out if self.has_aux else (out, None)
        _check_real(value)
        leaves.decide((value,))
        found = self._vjp(value, leaves)
        return self._result(found, value, aux, leaves)

    def derive_batch(self, out: Any, leaves: Leaves, dims: Sequence[int | None]) -> Any:
        value, aux = out if self.has_aux else (out, None)
        _check_real(value)
        leaves.decide((value,))
        if None in dims:
            found = [column[0] for column in _batch_columns([value], leaves, dims)]
        else:  # samples are independent, so the gradient of their sum holds every sample's own
            found = self._vjp(value, leaves, batched=True)
        return self._result(found, value, aux, leaves)

    def _vjp(self, value: Tensor, leaves: Leaves, batched: bool = False) -> list[Tensor]:
        found: Sequence[Tensor | None] = [None] * len(leaves.tensors)
        if value.requires_grad:
            # The auxiliary output may share the graph, so that freeing it would break what the caller holds.
            retain_graph = leaves.create_graph or self.has_aux
            ones = torch.ones_like(value)
            try:
                leaves.refuse()
                found = _engine.native_vjp((value,), leaves.tensors, (ones,), retain_graph, leaves.create_graph)
            except Refused as error:
                leaves.left_to_pytorch(error, (value,))
                if batched and leaves.refused == _engine.SAVED_THROUGH_HOOKS:
                    raise
                retain_graph = leaves.create_graph or self.has_aux
                found = _engine.torch_grad(value, leaves.tensors, ones, retain_graph, leaves.create_graph, allow_unused=True)
        return [_filled(g, x, x.shape) for g, x in zip(found, leaves.tensors)]

    def _result(self, found: list[Tensor], value: Tensor, aux: Any, leaves: Leaves) -> Any:
        gradient = leaves.nest([g for (g,) in leaves.settle([(g,) for g in found])])
        if not self.with_value:
            return (gradient, leaves.release(aux)) if self.has_aux else gradient
        value = leaves.release(value)
        return gradient, (value, leaves.release(aux)) if self.has_aux else value


class Hessian(Jacobian):
    """What hessian returns: the Jacobian of the Jacobian, in one sweep where the function has one output element."""

    def __init__(self, func: Callable[..., Any], argnums: Argnums) -> None:
        super().__init__("jacfwd", Jacobian("jacrev", func, argnums, False), argnums, False)
        self.name = "func.hessian"
        self.scalar_func = func
        functools.update_wrapper(self, func, updated=())

    def make_peer(self, argnums: Argnums) -> Callable[..., Any]:
        return _torch_hessian(self.scalar_func, argnums)

    def at_point(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        return _HessianAtPoint(self).at_point(args, kwargs, name)


class _HessianAtPoint(Transform):
    """The Hessian at one point: runs the scalar function itself instead of the inner Jacobian."""

    name = "func.hessian"
    forward = True

    def __init__(self, hessian: Hessian) -> None:
        self.func = hessian.scalar_func
        self.argnums = hessian.argnums
        self.has_aux = False
        self.options = hessian.options
        self.inner = hessian.func
        self.make_peer = hessian.make_peer  # type: ignore[method-assign]
        self._peers = {}

    def check(self, out: Any) -> Any:
        return self.inner.check(out)

    def derive(self, out: Any, leaves: Leaves) -> Any:
        flat, spec = flatten(out)
        xs = leaves.tensors
        must_be_finite = _check_forward([*flat, *xs], xs)
        leaves.decide(flat)
        leaves.refuse()
        results = []
        for y in flat:
            shapes = [[y.shape + a.shape + b.shape for b in xs] for a in xs]
            rows = [
                [_filled(block, xs[j], shapes[i][j]) for j, block in enumerate(row)]
                for i, row in enumerate(_hessian_blocks(y, xs, leaves.create_graph))
            ]
            results.append(leaves.nest([leaves.nest(row) for row in leaves.settle(rows)]))
        if must_be_finite:
            _check_finite(results)
        return unflatten(results, spec)


def _check_forward(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Raise Refused where PyTorch's forward mode would compute something else than the graph of `outputs` says.

    Returns whether that depends on the result: where it must be finite (`_check_finite`).
    """
    if any(y.dtype is not x.dtype for y in outputs for x in inputs):
        raise Refused("forward mode with outputs of another dtype")  # tangents carry the output's precision
    if not all(t.numel() for t in (*outputs, *inputs)):
        raise Refused("a tensor without elements in forward mode")  # which mostly raises
    differs, masks = _engine.forward_mode(outputs, inputs)
    if differs:
        raise Refused(f"forward mode through {differs}")
    return masks


def _check_finite(result: Any) -> None:
    if not all(bool(block.isfinite().all()) for block in tree_leaves(result)):
        raise Refused("an infinite derivative, which forward mode may leave out")


def _hessian_blocks(y: Tensor, xs: list[Tensor], create_graph: bool) -> _engine.Blocks:
    if y.numel() == 1:
        return _engine.native_hessian(y, xs, create_graph)
    blocks = _engine.native_jacobian([y], xs, True)[0]
    rows = [_filled(block, x, y.shape + x.shape) for block, x in zip(blocks, xs)]
    return _engine.native_jacobian(rows, xs, create_graph)


def _check_real(value: Tensor) -> None:
    """Raise what PyTorch raises for the gradient of a complex number."""
    if value.requires_grad and value.is_complex():
        raise RuntimeError(f"grad can be implicitly created only for real scalar outputs but got {value.dtype}")


def _filled(block: Tensor | None, wrt: Tensor, shape: torch.Size) -> Tensor:
    """A block of a result: zeros where nothing is connected."""
    if block is None:
        return wrt.new_zeros(shape)
    return block if block.shape == shape else block.reshape(shape)


def _batch_columns(outputs: list[Tensor], leaves: Leaves, dims: Sequence[int | None]) -> list[list[Tensor]]:
    """``[j][i]``: per-sample Jacobians of outputs ``(B, *out)`` in leaves with or without a batch axis in front."""
    inputs = leaves.tensors
    shared = [x for x, dim in zip(inputs, dims) if dim is None]
    tied = [x for x, dim in zip(inputs, dims) if dim is not None] if shared else inputs
    of_shared: _engine.Blocks = [[] for _ in outputs]
    if shared:
        try:
            leaves.refuse()
            of_shared = _engine.native_jacobian(outputs, shared, leaves.create_graph, by_sample=True)
        except Refused as error:
            if not leaves.written:
                raise  # they are torch.func's: row by row they are a pass over the whole batch for every sample
            leaves.left_to_pytorch(error, outputs)
            of_shared = _engine.torch_rows(outputs, shared, leaves.create_graph)
    of_tied: _engine.Blocks = [[] for _ in outputs]
    if tied:
        try:
            leaves.refuse()
            of_tied = _engine.native_batch_jacobian(outputs, tied, leaves.create_graph, check=False)
        except Refused as error:
            leaves.left_to_pytorch(error, outputs)
            if leaves.refused == _engine.SAVED_THROUGH_HOOKS:
                raise
            of_tied = [_engine.summed_rows(out, tied, leaves.create_graph) for out in outputs]
    if not shared:
        return [[_filled(row[j], x, y.shape + x.shape[1:]) for row, y in zip(of_tied, outputs)] for j, x in enumerate(inputs)]
    tied_columns, shared_columns = iter(zip(*of_tied)), iter(zip(*of_shared))
    columns = []
    for x, dim in zip(inputs, dims):
        column, inner = (next(shared_columns), x.shape) if dim is None else (next(tied_columns), x.shape[1:])
        columns.append([_filled(block, x, y.shape + inner) for block, y in zip(column, outputs)])
    return columns


@traced_as(_torch_grad)
def grad(func: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Gradient:
    """Gradient of a scalar function; torch.func.grad.

    Args:
        func: returns a tensor without axes, or a pair of it and auxiliary output with `has_aux`.
        argnums: the positional argument, or tuple of arguments, to differentiate; tensors or pytrees of them.
        has_aux: whether `func` returns auxiliary output beside the value.

    Returns:
        A function of the same arguments that returns the gradient (and the auxiliary output).

    Raises:
        RuntimeError: on call, what torch.func.grad raises.

    >>> grad(lambda x: (x**2).sum())(torch.tensor([1.0, 2.0]))
    tensor([2., 4.])
    """
    return Gradient(func, argnums, has_aux, with_value=False)


@traced_as(_torch_grad_and_value)
def grad_and_value(func: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Gradient:
    """Gradient and value of a scalar function; torch.func.grad_and_value.

    Args:
        func, argnums, has_aux: as for `grad`.

    Returns:
        A function of the same arguments that returns ``(gradient, value)``, or ``(gradient, (value, aux))``.

    Raises:
        RuntimeError: on call, what torch.func.grad_and_value raises.

    >>> grad_and_value(lambda x: (x**2).sum())(torch.tensor([1.0, 2.0]))
    (tensor([2., 4.]), tensor(5.))
    """
    return Gradient(func, argnums, has_aux, with_value=True)


@traced_as(_torch_jacrev)
def jacrev(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    _preallocate_and_copy: bool = False,
) -> Jacobian:
    """Jacobian of a function; torch.func.jacrev.

    Args:
        func: returns a tensor or a pytree of tensors.
        argnums: the positional argument, or tuple of arguments, to differentiate; tensors or pytrees of them.
        has_aux: whether `func` returns a pair of output and auxiliary output.
        chunk_size: rows at a time on PyTorch's path; the engine keeps structure instead and needs none.

    Returns:
        A function of the same arguments that returns ``J`` of shape ``output.shape + input.shape``, nested like the output
        and, inside, like the arguments.

    Raises:
        RuntimeError: on call, what torch.func.jacrev raises.
        ValueError: for a chunk size below 1.

    >>> jacrev(lambda x: x**2)(torch.tensor([1.0, 2.0]))
    tensor([[2., 0.],
            [0., 4.]])
    """
    if not (chunk_size is None or chunk_size > 0):
        raise ValueError("jacrev: `chunk_size` should be greater than 0.")
    options = {"chunk_size": chunk_size, "_preallocate_and_copy": _preallocate_and_copy}
    return Jacobian("jacrev", func, argnums, has_aux, **options)


@traced_as(_torch_jacfwd)
def jacfwd(func: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False, *, randomness: str = "error") -> Jacobian:
    """Jacobian of a function; torch.func.jacfwd (with negative `argnums`, for which torch 2.13 returns zeros).

    The engine chooses the direction itself; the name says which of torch's functions this one stands for.

    Args:
        func, argnums, has_aux: as for `jacrev`.
        randomness: as in torch; all but "error" take PyTorch's path.

    Returns:
        A function of the same arguments that returns ``J`` of shape ``output.shape + input.shape``, nested like the output
        and, inside, like the arguments; its dtype is the output's.

    Raises:
        RuntimeError: on call, what torch.func.jacfwd raises.

    >>> jacfwd(lambda a, x: a * x, argnums=-1)(torch.tensor(3.0), torch.tensor([1.0, 2.0]))
    tensor([[3., 0.],
            [0., 3.]])
    """
    return Jacobian("jacfwd", func, argnums, has_aux, randomness=randomness)


@traced_as(_torch_hessian)
def hessian(func: Callable[..., Any], argnums: Argnums = 0) -> Hessian:
    """Hessian of a function; torch.func.hessian.

    Args:
        func, argnums: as for `jacrev`; the output may have any shape.

    Returns:
        A function of the same arguments that returns ``H`` of shape ``output.shape + input.shape + input.shape``, nested
        like the output and, twice inside, like the arguments.

    Raises:
        RuntimeError: on call, what torch.func.hessian raises.

    >>> hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    tensor([[ 6.,  0.],
            [ 0., 12.]])
    """
    return Hessian(func, argnums)
