"""Jacobians of functions that treat the rows of a batch independently."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _engine
from ._compile import eager
from ._native import C
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
        ValueError: if an output of one sample depends on another sample (the message names the node that couples them), or
            if the batch sizes differ.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> batch_jacobian(lambda x: x.prod(1), x)
    tensor([[2., 1.],
            [4., 3.]])
    >>> batch_jacobian(lambda x: x - x.mean(0), x)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    ValueError: ...
    """
    begun = _engine.of_function("batch_jacobian", C.batch_jacobian_of, func, inputs, create_graph)
    if type(begun) is Tensor:
        return begun
    reason = _engine.refusal()
    grad_mode = torch.is_grad_enabled()
    torch._C._set_grad_enabled(True)
    try:
        is_inputs_tuple, inputs, outputs = _engine.values("batch_jacobian", func, inputs, create_graph, begun)
        is_outputs_tuple, outputs = _engine.as_tuple(outputs, "outputs of the user-provided function", "batch_jacobian")
        blocks = _blocks(outputs, inputs, create_graph, reason)
        return _nest(blocks, is_outputs_tuple, is_inputs_tuple)  # type: ignore[arg-type]
    finally:
        torch._C._set_grad_enabled(grad_mode)


def _blocks(
    outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], create_graph: bool, reason: str | None
) -> list[list[Tensor]]:
    """Blocks without gaps, on the engine or from PyTorch."""
    native = _engine.native_batch_jacobian
    blocks = _engine.attempt("batch_jacobian", reason, native, outputs, inputs, create_graph, True)
    if blocks is None:
        size = _batch_size(inputs, outputs)
        blocks = [_engine.summed_rows(out, inputs, create_graph) for out in outputs]
        _check_independence(outputs, inputs, blocks, size)
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


def _check_independence(
    outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], blocks: _engine.Blocks, size: int
) -> None:
    """Raise where the sums over samples in `blocks` mixed samples.

    With a random weight w_b per sample, a vector-Jacobian product gives sum_b' w_b' dy_b'/dx_b, which equals w_b times the
    unweighted sum for every w only if no other sample contributes.  One more pass through the graph instead of B.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # whatever the default device
    weights = torch.rand(size, dtype=torch.float64, generator=generator, device="cpu") + 0.5
    for i, (out, row) in enumerate(zip(outputs, blocks)):
        if not out.requires_grad or not out.numel():
            continue
        inner = torch.rand(out.shape[1:], dtype=torch.float64, generator=generator, device="cpu") + 0.5
        cotangent = torch.tensordot(weights, inner, 0).to(out)
        products = _engine.torch_grad(out, inputs, cotangent, retain_graph=True, allow_unused=True)
        for j, (product, block) in enumerate(zip(products, row)):
            if product is None or block is None:
                continue
            weighted = block.detach().flatten(1, out.dim() - 1) if out.dim() > 1 else block.detach().unsqueeze(1)
            scaled = weighted * inner.to(weighted).reshape(-1, *(1,) * (weighted.dim() - 2))
            factor = weights.to(scaled).reshape(-1, *(1,) * (scaled.dim() - 2))
            slack = scaled.abs().sum(1).amax() * torch.finfo(scaled.dtype).eps ** 0.5
            if not bool(((product - scaled.sum(1) * factor).abs() <= slack).all() | ~product.isfinite().all()):
                raise ValueError(f"batch_jacobian: output {i} of one sample depends on input {j} of another sample")
