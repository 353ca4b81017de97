"""grad with the signature of torch.autograd.grad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _make_grads, _tensor_or_tensors_to_tuple
from torch.autograd.graph import GradientEdge, _engine_run_backward

from . import _engine
from ._compile import eager
from ._native import C

_refusal = _engine.refusal
_is_plain = _engine.is_plain


@eager
def grad(
    outputs: Tensor | Sequence[Tensor] | GradientEdge | Sequence[GradientEdge],
    inputs: Tensor | Sequence[Tensor] | GradientEdge | Sequence[GradientEdge] | dict[str, Tensor],
    grad_outputs: Tensor | Sequence[Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """Sum of gradients of `outputs` with respect to `inputs`, weighted by `grad_outputs`; torch.autograd.grad.

    Args:
        outputs: a tensor or a sequence of tensors (or gradient edges, which take PyTorch's path).
        inputs: a tensor, a sequence of tensors, or a dict of them (or gradient edges, which take PyTorch's path).
        grad_outputs: one cotangent per output, of its shape; None for outputs with a single element.
        retain_graph: whether the graph stays usable; as `create_graph` by default.
        create_graph: whether the result can be differentiated again.
        only_inputs: ignored, as in torch.
        allow_unused: whether inputs no output depends on give None; as `materialize_grads` by default.
        is_grads_batched: whether the first axis of every cotangent counts cotangents: one product for each of them.
        materialize_grads: whether unused inputs give zeros instead of None.

    Returns:
        A tuple with one tensor or None per input, of its shape (with a leading axis where the cotangents are batched); a
        dict with the same keys where `inputs` is a dict.

    Raises:
        RuntimeError, TypeError, ValueError: what torch.autograd.grad raises.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> grad(x**2, x, torch.eye(2), is_grads_batched=True)
    (tensor([[2., 0.],
            [0., 4.]]),)
    """
    reason = _refusal() if create_graph is False or create_graph is True else "unusual options"
    if reason is None and create_graph and not is_grads_batched:
        reason = C.refusal_of_history(outputs, inputs)  # first, as a refusal by the engine would be felt
        if reason is not None and only_inputs and not materialize_grads:
            return _torch_grad_of_tensors(outputs, inputs, grad_outputs, retain_graph, allow_unused, reason)
    if reason is None:
        if type(outputs) is Tensor:
            outs = (outputs,)
        elif type(outputs) is tuple or type(outputs) is list:
            outs = tuple(outputs)
        else:
            outs = ()
        if _is_plain(inputs):
            ins = (inputs,)
        elif type(inputs) is tuple or type(inputs) is list:
            ins = tuple(inputs)
        elif type(inputs) is dict:
            ins = tuple(inputs.values())
        else:
            ins = ()
        reason = _unusual(outs, ins)
        # Contradictory or deprecated options: PyTorch raises or warns.
        if not only_inputs or (materialize_grads and allow_unused is False):
            reason = "unusual options"
    if reason is None:
        cotangents, reason = _cotangents(outs, grad_outputs, is_grads_batched)
    if reason is not None:
        _engine.count_fallback("grad", reason)
        return _engine.torch_grad(
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
    retain = create_graph if retain_graph is None else retain_graph
    result = _engine.vjp("grad", outs, ins, cotangents, retain, create_graph, is_grads_batched, asked=True)
    if materialize_grads:
        result = [torch.zeros_like(x, requires_grad=create_graph) if g is None else g for g, x in zip(result, ins)]
    elif not allow_unused:
        _engine.check_used(result)
    return dict(zip(inputs, result)) if type(inputs) is dict else tuple(result)


def _torch_grad_of_tensors(
    outputs: Any, inputs: Any, grad_outputs: Any, retain_graph: bool | None, allow_unused: bool | None, reason: str
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad with create_graph, which does not have to ask again whether these are plain tensors."""
    outs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    ins = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    cotangents, unusual = _cotangents(outs, grad_outputs, False) if outs and ins else ((), "no tensors")
    _engine.count_fallback("grad", reason)
    if unusual is not None:
        return _engine.torch_grad(outs, ins, grad_outputs, retain_graph, True, allow_unused=allow_unused)
    given = cotangents or tuple([torch.ones_like(y, memory_format=torch.preserve_format) for y in outs])
    retain = True if retain_graph is None else retain_graph
    return _engine_run_backward(outs, given, retain, True, ins, bool(allow_unused), accumulate_grad=False)


def _cotangents(
    outputs: tuple[Tensor, ...], given: Any, batched: bool
) -> tuple[Sequence[Tensor | None], str | None]:
    """Those to go on with: none where numbers are differentiated as they are; or why PyTorch should see what was given.

    Raises what torch.autograd.grad raises for those that do not fit.
    """
    if given is None and not batched:
        for y in outputs:  # loops, as generators cost a small graph some percent
            if y.numel() != 1 or not y.is_floating_point():
                break
        else:
            return (), None
    cotangents = _tensor_or_tensors_to_tuple(given, len(outputs))
    if batched:
        if any(cotangent is None for cotangent in cotangents):
            return (), "batched cotangents that are missing"
    elif len(cotangents) == len(outputs):
        for y, cotangent in zip(outputs, cotangents):
            if not (_is_plain(cotangent) and cotangent.dtype == y.dtype and cotangent.shape == y.shape):
                break
        else:
            return cotangents, None
    made = _make_grads(outputs, cotangents, batched)
    return made, None if len(made) == len(outputs) else "fewer cotangents than outputs"


def _unusual(outputs: tuple[Any, ...], inputs: tuple[Any, ...]) -> str | None:
    """Why PyTorch should see this call as it is (to raise an error, most often), or None."""
    if not outputs or not inputs:
        return "arguments that are not tensors"
    for t in outputs:
        if not _is_plain(t):
            return "arguments that are not plain tensors"
        if not t.requires_grad:
            return "an output that does not require grad"
    for t in inputs:
        if not _is_plain(t):
            return "arguments that are not plain tensors"
        if not t.requires_grad:
            return "an input that does not require grad"
    return None
