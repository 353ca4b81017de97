"""jacobian, hessian, vjp, jvp, vhp and hvp with the signatures of torch.autograd.functional, and the graph forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import functional as _torch
from torch.autograd.functional import _check_requires_grad

from . import _engine
from ._compile import eager
from ._native import C

Tensors: TypeAlias = Tensor | tuple[Tensor, ...]
Function: TypeAlias = Callable[..., Tensors]

_COMPUTED = (Tensor, tuple, list)  # a first argument of the graph form
_torch_jacobian = _torch.jacobian  # kept from before any patching
_torch_hessian = _torch.hessian
_is_grad_enabled = torch.is_grad_enabled
_set_grad_enabled = torch._C._set_grad_enabled
_refusal = _engine.refusal


@eager
def jacobian(
    func: Function | Tensor | Sequence[Tensor],
    inputs: Tensors,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    strategy: str = "reverse-mode",
    *,
    allow_unused: bool = True,
) -> Any:
    """Jacobian of a function at `inputs`, or of tensors already computed from them (the graph form).

    Args:
        func: a function of the tensors in `inputs` that returns a tensor or a tuple of tensors; or, for the graph
            form, those outputs themselves.
        inputs: a tensor or a tuple of tensors.  In the graph form they must be tensors that the outputs were computed from.
        create_graph: whether the result can be differentiated again.
        strict, vectorize, strategy: as in torch.autograd.functional.jacobian; function form only.  The engine needs no
            `vectorize`; ``strategy="forward-mode"`` takes PyTorch's path.
        allow_unused: graph form only.  Whether an input no output depends on gives zeros or raises.

    Returns:
        ``J`` of shape ``output.shape + input.shape``; ``J[i]`` or ``J[j]`` where one side is a tuple, ``J[i][j]`` where
        both are.  The dtype is the input's.  The graph form never frees the graph.

    Raises:
        RuntimeError, TypeError: what torch.autograd.functional.jacobian raises.  Graph form: what torch.autograd.grad
            raises for outputs that do not require grad, and for unused inputs with ``allow_unused=False``.

    >>> x = torch.tensor([1.0, 2.0])
    >>> jacobian(lambda x: x.prod() * x, x)
    tensor([[4., 1.],
            [4., 4.]])
    >>> x = x.requires_grad_()
    >>> y = x.prod() * x
    >>> jacobian(y, x)
    tensor([[4., 1.],
            [4., 4.]])
    """
    if isinstance(func, _COMPUTED):
        _reject_function_options(strict, vectorize, strategy)
        return _graph_jacobian(func, inputs, create_graph, allow_unused)
    special = create_graph or strict or strategy != "reverse-mode"
    begun = _engine.of_function("jacobian", C.jacobian_of, func, inputs, special)
    if begun is None:
        reason = _engine.refusal_of(strategy, inputs)
        if reason is not None:
            _engine.count_fallback("jacobian", reason)
            return _torch_jacobian(func, inputs, create_graph, strict, vectorize, strategy)
    elif type(begun) is not list:
        return begun
    grad_mode = _is_grad_enabled()
    _set_grad_enabled(True)
    try:
        is_inputs_tuple, inputs, outputs, reason = _engine.values("jacobian", func, inputs, create_graph, begun)
        is_outputs_tuple, outputs = _engine.as_tuple(outputs, "outputs of the user-provided function", "jacobian")
        if strict:
            _check_requires_grad(outputs, "outputs", strict)
            if vectorize:
                raise RuntimeError(
                    "torch.autograd.functional.jacobian: `strict=True` and `vectorized=True` are not supported together. "
                    "Please either set `strict=False` or `vectorize=False`."
                )
            reason = reason or _strict_refusal(outputs, inputs, create_graph)
        if not outputs and not vectorize:
            raise IndexError("tuple index out of range")  # as torch.autograd.functional.jacobian says it
        blocks = _blocks(outputs, inputs, create_graph, strict, vectorize, reason)
        return _nest(blocks, is_outputs_tuple, is_inputs_tuple)
    finally:
        _set_grad_enabled(grad_mode)


def _blocks(
    outputs: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    create_graph: bool,
    strict: bool,
    vectorize: bool = False,
    reason: str | None = None,
) -> list[list[Tensor]]:
    """Blocks without gaps, with the complaints of strict mode; by PyTorch if there is a reason."""
    # Which PyTorch refuses, but for one among others under vmap.
    if not (any if vectorize else all)(map(Tensor.numel, outputs)):
        reason = "an output without elements"
    options = {"reason": reason, "vectorize": vectorize, "none_is_zero": not strict}
    blocks: list[list[Tensor | None]] = []
    # One after the other where there may be a complaint about one, which comes before whatever is said to the next.
    for part in [(out,) for out in outputs] if strict else [outputs]:
        for row, out in zip(_engine.jacobian("jacobian", part, inputs, create_graph, **options), part):
            for j, block in enumerate(row):
                if block is None:
                    if strict:
                        raise RuntimeError(
                            f"Output {len(blocks)} of the user-provided function is independent of input {j}. "
                            "This is not allowed in strict mode."
                        )
                    row[j] = _engine.zeros(out, inputs[j])
                elif strict and create_graph and not block.requires_grad:
                    raise RuntimeError(
                        f"The jacobian of the user-provided function is independent of input {len(blocks)}. "
                        "This is not allowed in strict mode when create_graph=True."
                    )
            blocks.append(row)
    return blocks  # type: ignore[return-value]


def _strict_refusal(outputs: Sequence[Tensor], inputs: Sequence[Tensor], create_graph: bool) -> str | None:
    """Why strict mode, which is about histories, is PyTorch's: it is not asked about those of results through user code."""
    if create_graph and C.passes_custom(outputs, inputs):
        return "a custom Function or hooks in strict mode with create_graph"
    return None


def _nest(blocks: list[list[Tensor]], is_outputs_tuple: bool, is_inputs_tuple: bool) -> Any:
    if not is_outputs_tuple:
        return tuple(blocks[0]) if is_inputs_tuple else blocks[0][0]
    return tuple(tuple(row) if is_inputs_tuple else row[0] for row in blocks)


@eager
def hessian(
    func: Function | Tensor,
    inputs: Tensors,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    outer_jacobian_strategy: str = "reverse-mode",
    *,
    allow_unused: bool = True,
) -> Any:
    """Hessian of a function with one output element at `inputs`, or of such a tensor already computed (the graph form).

    Args:
        func: a function of the tensors in `inputs` that returns a tensor with one element; or, for the graph form, that
            tensor itself.
        inputs: a tensor or a tuple of tensors.
        create_graph: whether the result can be differentiated again.
        strict, vectorize, outer_jacobian_strategy: as in torch.autograd.functional.hessian; function form only.
            ``outer_jacobian_strategy="forward-mode"`` takes PyTorch's path.
        allow_unused: graph form only.  Whether an input the output does not depend on gives zeros or raises.

    Returns:
        ``H`` of shape ``input.shape + input.shape``, or ``H[i][j]`` of shape ``inputs[i].shape + inputs[j].shape``.

    Raises:
        RuntimeError, TypeError: what torch.autograd.functional.hessian raises.

    >>> x = torch.tensor([6.0, -2.0])
    >>> hessian(lambda x: x[0] ** 3 + x[1] ** 2, x)
    tensor([[36.,  0.],
            [ 0.,  2.]])
    >>> x = x.requires_grad_()
    >>> hessian(x[0] ** 3 + x[1] ** 2, x)
    tensor([[36.,  0.],
            [ 0.,  2.]])
    """
    if isinstance(func, _COMPUTED):
        _reject_function_options(strict, vectorize, outer_jacobian_strategy)
        return _graph_hessian(func, inputs, create_graph, allow_unused)
    special = create_graph or strict or outer_jacobian_strategy != "reverse-mode"
    begun = _engine.of_function("hessian", C.hessian_of, func, inputs, special)
    if begun is None:
        reason = _engine.refusal_of(outer_jacobian_strategy, inputs)
        if reason is not None or (strict and vectorize):
            _engine.count_fallback("hessian", reason or "strict and vectorize together")
            return _torch_hessian(func, inputs, create_graph, strict, vectorize, outer_jacobian_strategy)
    elif type(begun) is not list:
        return begun
    grad_mode = _is_grad_enabled()
    _set_grad_enabled(True)
    try:
        given = inputs
        is_inputs_tuple, inputs, out, reason = _engine.values("hessian", func, given, create_graph, begun)
        if reason == _engine.DETACHED:  # of a view, to PyTorch, which has its own errors
            return _torch_hessian(func, given, create_graph, strict, vectorize, outer_jacobian_strategy)
        is_out_tuple, outputs = _engine.as_tuple(out, "outputs of the user-provided function", "hessian")
        if strict:
            _check_requires_grad(outputs, "outputs", strict)
        if is_out_tuple:
            raise RuntimeError("The function given to hessian should return a single Tensor")
        if out.numel() != 1:
            raise RuntimeError("The Tensor returned by the function given to hessian should contain a single element")
        if strict:
            reason = reason or _strict_refusal(outputs, inputs, create_graph)
            gradient = _blocks((out.squeeze(),), inputs, True, False, reason=reason)[0]
            _check_requires_grad(gradient, "jacobian", strict)
            blocks = _blocks(tuple(gradient), inputs, create_graph, True, reason=reason)
        else:
            if not all(x.numel() for x in inputs):
                reason = "an input without elements"
            found = _engine.hessian("hessian", out, inputs, create_graph, reason=reason, vectorize=vectorize)
            blocks = _fill(found, inputs, inputs)
        return _nest(blocks, is_inputs_tuple, is_inputs_tuple)
    finally:
        _set_grad_enabled(grad_mode)


def _fill(blocks: _engine.Blocks, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    for out, row in zip(outputs, blocks):
        for j, block in enumerate(row):
            if block is None:
                row[j] = _engine.zeros(out, inputs[j])
    return blocks  # type: ignore[return-value]


def _reject_function_options(strict: bool, vectorize: bool, strategy: str) -> None:
    if strict or vectorize or strategy != "reverse-mode":
        raise TypeError("strict, vectorize and strategy belong to the function form; the graph form takes none of them")


def _graph_jacobian(outputs: Any, inputs: Any, create_graph: bool, allow_unused: bool) -> Any:
    is_outputs_tuple, outputs, is_inputs_tuple, inputs = _graph_arguments(outputs, inputs, "jacobian")
    grad_mode = _is_grad_enabled()
    _set_grad_enabled(True)
    try:
        blocks = _engine.jacobian("jacobian", outputs, inputs, create_graph, reason=_refusal(), none_is_zero=allow_unused)
        if not allow_unused:
            _engine.check_used(next((block for block in column if block is not None), None) for column in zip(*blocks))
        return _nest(_fill(blocks, outputs, inputs), is_outputs_tuple, is_inputs_tuple)
    finally:
        _set_grad_enabled(grad_mode)


def _graph_hessian(output: Any, inputs: Any, create_graph: bool, allow_unused: bool) -> Any:
    is_output_tuple, outputs, is_inputs_tuple, inputs = _graph_arguments(output, inputs, "hessian")
    if is_output_tuple:
        raise RuntimeError("The function given to hessian should return a single Tensor")
    if outputs[0].numel() != 1:
        raise RuntimeError("The Tensor returned by the function given to hessian should contain a single element")
    grad_mode = _is_grad_enabled()
    _set_grad_enabled(True)
    try:
        if not allow_unused:  # an input may well have no second derivative: it is the gradient that has to reach it
            _engine.torch_grad(outputs[0].sum(), inputs, retain_graph=True, allow_unused=False)
        blocks = _engine.hessian("hessian", outputs[0], inputs, create_graph, reason=_refusal())
        return _nest(_fill(blocks, inputs, inputs), is_inputs_tuple, is_inputs_tuple)
    finally:
        _set_grad_enabled(grad_mode)


def _graph_arguments(outputs: Any, inputs: Any, name: str) -> tuple[bool, tuple[Tensor, ...], bool, tuple[Tensor, ...]]:
    """Both sides as tuples, with torch.autograd.grad's complaints about tensors outside of any graph."""
    is_outputs_tuple, outputs = _engine.as_tuple(tuple(outputs) if type(outputs) is list else outputs, "outputs", name)
    is_inputs_tuple, inputs = _engine.as_tuple(tuple(inputs) if type(inputs) is list else inputs, "inputs", name)
    if not inputs:
        raise RuntimeError("`inputs` argument to `grad()` cannot be empty.")
    for out in outputs:  # loops, as generators cost a small graph some percent
        if out.requires_grad:
            break
    else:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    for x in inputs:
        if not x.requires_grad:
            raise RuntimeError("One of the differentiated Tensors does not require grad")
    return is_outputs_tuple, outputs, is_inputs_tuple, inputs


class _PlainGradient(tuple):
    """The gradient of a function without code of the user's behind it (custom Functions, hooks): the Hessian is symmetric."""


class _SecondProduct(tuple):
    """A gradient g, in the place of ``u^T dg/dx`` as a function of `u`, which nobody may need."""

    inputs: tuple[Tensor, ...]
    u: tuple[Tensor, ...]


def _is_at_hand(tensors: Sequence[Tensor]) -> bool:
    """Whether values can be looked at: not those of tracers and fake tensors, nor what a CUDA graph is being made of."""
    if not all(type(tensor) is Tensor and (tensor.is_cpu or tensor.is_cuda) for tensor in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _with_our_gradient(name: str, strict: bool) -> Callable[..., Any]:
    """torch.autograd.functional's own function of that name, but with its calls of autograd going through the engine.

    Argument checks, strict mode, nesting and messages so are PyTorch's own, whatever its version does.

    Of hvp but in strict mode, the derivative of ``u^T dg/dx`` by u, times v, is computed as ``v^T dg/dx`` where dg/dx is
    symmetric: in one pass less, and with smaller errors. Where that is not finite, or shall have a history, it is computed as
    PyTorch does.
    """
    transposes = name == "hvp" and not strict

    def autograd_grad(
        outputs: tuple[Tensor | None, ...],
        inputs: tuple[Tensor, ...],
        grad_outputs: tuple[Tensor | None, ...] | None = None,
        create_graph: bool = False,
        retain_graph: bool | None = None,
        is_grads_batched: bool = False,
    ) -> tuple[Tensor | None, ...]:
        if type(outputs) is _PlainGradient:
            product = _SecondProduct(outputs)
            product.inputs, product.u = inputs, grad_outputs
            return product
        if type(outputs) is _SecondProduct:
            if not create_graph:
                found = autograd_grad(tuple(outputs), outputs.inputs, grad_outputs, retain_graph=True)
                if C.are_finite(found):
                    return found
            outputs = autograd_grad(tuple(outputs), outputs.inputs, outputs.u, create_graph=True)
        if len(outputs) != len(grad_outputs or outputs):
            raise AssertionError(
                f"Expected outputs and grad_outputs to have the same length, but got {len(outputs)} and {len(grad_outputs or ())}"
            )
        pairs = [
            (out, ct) for out, ct in zip(outputs, grad_outputs or (None,) * len(outputs)) if out is not None and out.requires_grad
        ]
        if not pairs:
            return (None,) * len(inputs)
        connected, cotangents = zip(*pairs)
        explicit = torch.autograd._make_grads(connected, cotangents, is_grads_batched)
        retain = create_graph if retain_graph is None else retain_graph
        reason = _refusal() or (_strict_refusal(connected, inputs, create_graph) if strict else None)
        if reason is None and not all(x.requires_grad for x in inputs):
            reason = _engine.DETACHED
        if reason is None and name != "vjp" and any(map(_engine.is_half, (*connected, *inputs))):
            reason = _engine.HALF
        plain = transposes and grad_outputs is None and reason is None and _is_at_hand((*connected, *inputs))
        plain = plain and not C.passes_custom(connected, inputs)
        found = _engine.vjp(name, connected, inputs, explicit, retain, create_graph, is_grads_batched, reason=reason)
        return _PlainGradient(found) if plain else tuple(found)

    original = getattr(_torch, name)
    names = {**vars(_torch), "_autograd_grad": autograd_grad}
    return FunctionType(original.__code__, names, name, original.__defaults__, original.__closure__)


# In strict mode, and else.
_vjp, _jvp, _vhp, _hvp = (
    {strict: _with_our_gradient(name, strict) for strict in (False, True)} for name in ("vjp", "jvp", "vhp", "hvp")
)


@eager
def vjp(
    func: Function, inputs: Tensors, v: Tensors | None = None, create_graph: bool = False, strict: bool = False
) -> tuple[Tensors, Tensors]:
    """Value of `func` and the product of a cotangent `v` with its Jacobian; torch.autograd.functional.vjp.

    Args:
        func: a function of the tensors in `inputs` that returns a tensor or a tuple of tensors.
        inputs: a tensor or a tuple of tensors.
        v: like the outputs; may be left out where the output has a single element.
        create_graph, strict: as in torch.

    Returns:
        The outputs, and ``v^T J`` with the shapes of the inputs.

    Raises:
        RuntimeError, TypeError: what torch.autograd.functional.vjp raises.

    >>> vjp(lambda x: x**2, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 10.0]))
    (tensor([1., 9.]), tensor([ 2., 60.]))
    """
    return _vjp[bool(strict)](func, inputs, v, create_graph, strict)


@eager
def jvp(
    func: Function, inputs: Tensors, v: Tensors | None = None, create_graph: bool = False, strict: bool = False
) -> tuple[Tensors, Tensors]:
    """Value of `func` and the product of its Jacobian with a tangent `v`; torch.autograd.functional.jvp.

    Args:
        func: a function of the tensors in `inputs` that returns a tensor or a tuple of tensors.
        inputs: a tensor or a tuple of tensors.
        v: like the inputs; may be left out where the input has a single element.
        create_graph, strict: as in torch.

    Returns:
        The outputs, and ``J v`` with the shapes of the outputs.

    Raises:
        RuntimeError, TypeError: what torch.autograd.functional.jvp raises.

    >>> jvp(lambda x: x**2, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 10.0]))
    (tensor([1., 9.]), tensor([ 2., 60.]))
    """
    return _jvp[bool(strict)](func, inputs, v, create_graph, strict)


@eager
def vhp(
    func: Function, inputs: Tensors, v: Tensors | None = None, create_graph: bool = False, strict: bool = False
) -> tuple[Tensor, Tensors]:
    """Value of a scalar function and the product of a vector `v` with its Hessian; torch.autograd.functional.vhp.

    Args:
        func: a function of the tensors in `inputs` that returns a tensor with one element.
        inputs: a tensor or a tuple of tensors.
        v: like the inputs; may be left out where the input has a single element.
        create_graph, strict: as in torch.

    Returns:
        The output, and ``v^T H`` with the shapes of the inputs.

    Raises:
        RuntimeError, TypeError: what torch.autograd.functional.vhp raises.

    >>> vhp(lambda x: (x**3).sum(), torch.tensor([1.0, 3.0]), torch.tensor([1.0, 10.0]))
    (tensor(28.), tensor([  6., 180.]))
    """
    return _vhp[bool(strict)](func, inputs, v, create_graph, strict)


@eager
def hvp(
    func: Function, inputs: Tensors, v: Tensors | None = None, create_graph: bool = False, strict: bool = False
) -> tuple[Tensor, Tensors]:
    """Value of a scalar function and the product of its Hessian with a vector `v`; torch.autograd.functional.hvp.

    Args:
        func: a function of the tensors in `inputs` that returns a tensor with one element.
        inputs: a tensor or a tuple of tensors.
        v: like the inputs; may be left out where the input has a single element.
        create_graph, strict: as in torch.

    Returns:
        The output, and ``H v`` with the shapes of the inputs.

    Raises:
        RuntimeError, TypeError: what torch.autograd.functional.hvp raises.

    >>> hvp(lambda x: (x**3).sum(), torch.tensor([1.0, 3.0]), torch.tensor([1.0, 10.0]))
    (tensor(28.), tensor([  6., 180.]))
    """
    return _hvp[bool(strict)](func, inputs, v, create_graph, strict)
