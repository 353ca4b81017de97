"""Jacobians of functions that treat the rows of a batch independently."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _engine
from ._compile import eager
from ._native import C, CoupledSamples, Refused
from .functional import Function, Tensors, _nest


@eager
def batch_jacobian(func: Function, inputs: Tensors, create_graph: bool = False) -> Any:
    """Per-sample Jacobian of a function that maps ``(B, *in)`` to ``(B, *out)``, sample by sample.

    What ``torch.func.vmap(torch.func.jacrev(f))`` gives for the function `f` of one sample, without rewriting `func` for
    one sample, and without the B x B blocks that ``jacobian(func, inputs)`` would hold.

    Args:
        func: a function of the tensors in `inputs`, all of shape ``(B, ...)``, that returns a tensor or a tuple of
            tensors of shape ``(B, ...)``; sample b of the output may depend on sample b of the inputs only.
        inputs: a tensor or a tuple of tensors.
        create_graph: whether the result can be differentiated again.

    Returns:
        ``J`` of shape ``(B, *out, *in)``; ``J[i]`` or ``J[j]`` where one side is a tuple, ``J[i][j]`` where both are.

    Raises:
        ValueError: if an output of one sample depends on another sample (the message names the node where they meet, as far
            as that is known), or if the batch sizes differ.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> batch_jacobian(lambda x: x.prod(1), x)
    tensor([[2., 1.],
            [4., 3.]])
    >>> batch_jacobian(lambda x: x - x.mean(0), x)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    ValueError: ...
    """
    begun = _engine.of_function("batch_jacobian", C.batch_jacobian_of, func, inputs, create_graph)
    if begun is not None and type(begun) is not list:
        return begun
    refusal = _engine.refusal() if begun is None else None
    grad_mode = torch.is_grad_enabled()
    torch._C._set_grad_enabled(True)
    try:
        is_inputs_tuple, inputs, outputs, reason = _engine.values("batch_jacobian", func, inputs, create_graph, begun)
        is_outputs_tuple, outputs = _engine.as_tuple(outputs, "outputs of the user-provided function", "batch_jacobian")
        blocks = _blocks(outputs, inputs, create_graph, refusal or reason)
        return _nest(blocks, is_outputs_tuple, is_inputs_tuple)  # type: ignore[arg-type]
    finally:
        torch._C._set_grad_enabled(grad_mode)


def _blocks(
    outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], create_graph: bool, reason: str | None
) -> list[list[Tensor]]:
    """Blocks without gaps, on the engine or from PyTorch."""
    native = _engine.native_batch_jacobian
    met: CoupledSamples | None = None
    blocks = None
    if reason is None:
        try:
            blocks = native(outputs, inputs, create_graph, check=True)
        except CoupledSamples as error:
            met = error.with_traceback(None)  # which holds this frame: a cycle, with the graph and the blocks in it
        except Refused as error:
            reason = str(error)
    if blocks is None:
        size = _batch_size(inputs, outputs)
        if met is not None:  # the sums over samples, which need no structure, and then numbers instead of a proof
            try:
                blocks = native(outputs, inputs, create_graph, check=False)
            except Refused as error:
                reason = str(error)
        if blocks is None:
            blocks = [_engine.summed_rows(out, inputs, create_graph) for out in outputs]
        _check_independence(outputs, inputs, size, met)
    _engine.count("batch_jacobian", reason)
    for i, row in enumerate(blocks):
        for j, block in enumerate(row):
            if block is None:
                row[j] = inputs[j].new_zeros(outputs[i].shape + inputs[j].shape[1:])
    return blocks  # type: ignore[return-value]


def _batch_size(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> int:
    tensors = (*inputs, *outputs)
    size = tensors[0].size(0) if tensors and tensors[0].dim() else None
    if size is None or not all(t.dim() and t.size(0) == size for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"batch_jacobian needs inputs and outputs with the same batch size in front, but got shapes {shapes}")
    return size


def _rounding(out: Tensor, inputs: tuple[Tensor, ...], factor: Tensor, inner: Tensor) -> list[Tensor]:
    """How much of a product is rounding, for each input, with a margin: what moves when the cotangent is tripled, say.

    Of terms that cancel nothing else may be left.
    """
    once = _product(out, inputs, factor, inner)
    worst = [torch.zeros((), dtype=torch.float64) for _ in inputs]
    for times in (3, 5, 7):
        for j, (a, b) in enumerate(zip(once, _product(out, inputs, factor * times, inner))):
            if a is None or b is None or not a.numel():
                continue
            moved = (b / times - a).abs()
            worst[j] = worst[j].to(moved).maximum(torch.where(moved.isfinite(), moved, 0).amax())
    return [64 * w for w in worst]


def _check_independence(
    outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], size: int, met: CoupledSamples | None
) -> None:
    """Raise where a sample of an output depends on another sample of an input; `met`: where the engine saw samples meet.

    Scaling the cotangent of sample b by a power of two scales the gradient of an independent sample b by the same, without
    any rounding, and changes no other sample's.  The digits of b in base `_SCALES` are the exponents, one vector-Jacobian
    product each, so that any two samples are told apart by one of them.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # whatever the default device
    count = max(1, math.ceil(math.log(max(size, 1), _SCALES)))
    samples = torch.arange(size, device="cpu")
    factors = [torch.exp2((samples // _SCALES**k % _SCALES).double() - _SCALES // 2) for k in range(count)]
    for i, out in enumerate(outputs):
        if not out.requires_grad or not out.numel():
            continue
        inner = torch.rand(out.shape[1:], dtype=torch.float64, generator=generator, device="cpu") + 0.5
        plain = _product(out, inputs, torch.ones_like(factors[0]), inner)
        for factor in factors:
            for j, (once, scaled) in enumerate(zip(plain, _product(out, inputs, factor, inner))):
                if once is None or scaled is None or not once.numel():
                    continue
                expected = once * factor.to(once).reshape(-1, *(1,) * (once.dim() - 1))
                known = expected.isfinite() & scaled.isfinite()
                size_of = torch.where(known, torch.maximum(expected.abs(), scaled.abs()), 0).amax()
                # Where samples are known to meet, only the rounding of terms that cancel is to be excused.
                eps = torch.finfo(once.dtype).eps
                slack = size_of * (64 * eps if met is not None and met.read else eps**0.5)
                differs = torch.where(known, (scaled - expected).abs(), 0).amax()
                if bool(differs <= slack) or bool(differs <= slack + _rounding(out, inputs, factor, inner)[j]):
                    continue
                where = "" if met is None else f" (the samples meet in {met.node})"
                raise ValueError(f"batch_jacobian: output {i} of one sample depends on input {j} of another sample{where}")


_SCALES = 8  # exponents, few enough for half precision


def _product(
    out: Tensor, inputs: tuple[Tensor, ...], of_samples: Tensor, of_elements: Tensor
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product with a cotangent that is an outer product."""
    cotangent = torch.tensordot(of_samples, of_elements, 0).to(out)
    return _engine.torch_grad(out, inputs, cotangent, retain_graph=True, allow_unused=True)
