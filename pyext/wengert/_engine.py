"""Routing: decides whether a call runs on the C++ engine, runs it, and continues with torch.autograd where it cannot.

Lists in and out; ``None`` stands for "not connected".  Inputs and outputs here are tensors of a graph that exists already:
when the engine refuses, the same graph is differentiated by PyTorch, so a user's function never runs twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.functional import _as_tuple, _construct_standard_basis_for, _grad_preprocess
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ._native import C, Refused
from ._stats import fallback_calls, native_calls

Blocks = list[list[Tensor | None]]

torch_grad = torch.autograd.grad  # kept from before any patching
_strided = torch.strided


# Graphs of which something is computed again when it is needed (checkpointing): below vmap there is no telling with what.
SAVED_THROUGH_HOOKS = "saved tensors with hooks"

# What the engine says where it judges by time alone.
SHORTER = "PyTorch's way to a result with a history is shorter"

DETACHED = "an argument that is detached in place"
NO_INPUTS = "no inputs"  # whatever PyTorch has to say to that

# What code raises for arguments of another kind than it was written for.
_DUE_TO_ARGUMENTS = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AssertionError, AttributeError, NameError)

HARMLESS_MODES: set[type] = {DeviceContext}  # torch function modes that change no derivative


def refusal() -> str | None:
    """Why no call of this moment can run on the engine, or None.  Costs well below a microsecond."""
    if _len_torch_function_stack() and not all(type(m) in HARMLESS_MODES for m in _get_current_function_mode_stack()):
        return "a torch function mode is active"
    return C.refusal()


def is_plain(t: object) -> bool:
    """A real, dense tensor on a device the engine knows, of no subclass but Parameter."""
    kind = type(t)
    return (kind is Tensor or kind is Parameter) and (t.is_cpu or t.is_cuda) and t.layout is _strided  # type: ignore[attr-defined]


def is_ordinary(t: object) -> bool:
    """A plain tensor that a function can be differentiated by: of no transform of another thread, not of inference mode."""
    return is_plain(t) and not (is_functorch_wrapped_tensor(t) or t.is_inference())  # type: ignore[attr-defined]


HALF = "second derivatives in half precision"


def is_half(t: Any) -> bool:
    """A tensor of numbers of 16 bits."""
    return isinstance(t, Tensor) and t.dtype.itemsize < 4 and t.is_floating_point()


def as_tuple(given: Any, what: str, caller: str) -> tuple[bool, tuple[Tensor, ...]]:
    """Whether a tuple was given, and what was given as a tuple; torch.autograd.functional's TypeError where it is neither."""
    return (False, (given,)) if type(given) is Tensor else _as_tuple(given, what, caller)


def fresh_leaves(inputs: tuple[Tensor, ...], create_graph: bool) -> tuple[Tensor, ...]:
    """The inputs as new tensors that require grad, attached to the caller's graph where the result is to be."""
    if len(inputs) == 1 and not create_graph:
        return (inputs[0].detach().requires_grad_(),)
    return _grad_preprocess(inputs, create_graph, True)


def of_function(name: str, method: Callable[..., Any], func: Callable[..., Any], inputs: Any, special: bool) -> Any:
    """The function form in one native call, counted under `name`: the result where it is that of one plain tensor.

    None where nothing has been done, as for whatever is `special`; a list (leaves, output, reason) for `values` where the
    function has run all the same.
    """
    if special or (type(inputs) is not Tensor and type(inputs) is not tuple):
        return None
    result = method(func, inputs)
    if result is not None and type(result) is not list:
        native_calls[name] += 1
    return result


def values(
    name: str, func: Callable[..., Any], inputs: Any, create_graph: bool, begun: list[Any] | None
) -> tuple[bool, tuple[Tensor, ...], Any, str | None]:
    """Whether a tuple of inputs was given, fresh leaves of their values, what the function gives for them, and why the
    engine has refused that already."""
    if begun is not None:
        return type(inputs) is tuple, *begun
    is_tuple, given = as_tuple(inputs, "inputs", name)
    leaves = fresh_leaves(given, create_graph)
    out = func(*leaves)
    return is_tuple, leaves, out, None if all(leaf.requires_grad for leaf in leaves) else DETACHED


def refusal_of(strategy: str, inputs: Any) -> str | None:
    """Why nothing of this moment can run on the engine with these arguments of a function form, or None."""
    if strategy != "reverse-mode":
        return "forward-mode strategy"
    return NO_INPUTS if type(inputs) is tuple and not inputs else refusal()


def count_fallback(name: str, reason: str) -> None:
    fallback_calls[name, reason] += 1


def count(name: str, reason: str | None) -> None:
    """One call, native unless there is a reason why not."""
    if reason is None:
        native_calls[name] += 1
    else:
        fallback_calls[name, reason] += 1


def native_jacobian(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    create_graph: bool,
    none_is_zero: bool = True,
    vectorize: bool = False,
    by_sample: bool = False,
) -> Blocks:
    """``[i][j]`` of shape ``outputs[i].shape + inputs[j].shape``; the graph is never freed.

    Like the other native functions: not counted, and raises Refused; with `by_sample` also where each of the samples that the
    first axis of the outputs counts would take a pass over all of them.
    """
    return C.jacobian(outputs, inputs, create_graph, none_is_zero, vectorize, by_sample)


def native_hessian(output: Tensor, inputs: Sequence[Tensor], create_graph: bool, vectorize: bool = False) -> Blocks:
    """``[i][j]`` of shape ``inputs[i].shape + inputs[j].shape`` for a one-element output; the graph is never freed."""
    return C.hessian(output, inputs, create_graph, vectorize)


def native_batch_jacobian(outputs: Sequence[Tensor], inputs: Sequence[Tensor], create_graph: bool, check: bool) -> Blocks:
    """``[i][j]`` of shape ``(B, *out, *in)`` for outputs ``(B, *out)`` and inputs ``(B, *in)``.

    With `check`, raises CoupledSamples unless the samples are seen to be independent; without it they are taken to be.
    """
    return C.batch_jacobian(outputs, inputs, create_graph, check)


def native_vjp(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    retain_graph: bool,
    create_graph: bool,
    is_grads_batched: bool = False,
    asked: bool = False,
) -> Sequence[Tensor | None]:
    """torch.autograd.grad with ``allow_unused=True`` and explicit cotangents, on outputs that require grad.

    `asked`: whether `C.refusal_of_history` was.
    """
    return C.grad(outputs, inputs, cotangents, retain_graph, create_graph, is_grads_batched, asked)


def attempt(name: str, reason: str | None, method: Callable[..., Any], *args: Any) -> Any:
    """What a native function returns, or None where PyTorch has to do it; counted under `name` either way."""
    if reason is None:
        try:
            result = method(*args)
            native_calls[name] += 1
            return result
        except Refused as error:
            reason = str(error)
    fallback_calls[name, reason] += 1
    return None


def jacobian(
    name: str,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    create_graph: bool,
    *,
    reason: str | None = None,
    vectorize: bool = False,
    none_is_zero: bool = True,
) -> Blocks:
    """`native_jacobian`, or the same from PyTorch's engine.

    Like the next two functions: counted under `name`; `reason`, what `refusal` said, keeps the call off the engine.
    """
    result = attempt(name, reason, C.jacobian, outputs, inputs, create_graph, none_is_zero, vectorize)
    return result if result is not None else _torch_jacobian(outputs, inputs, create_graph, vectorize)


def hessian(
    name: str,
    output: Tensor,
    inputs: Sequence[Tensor],
    create_graph: bool,
    *,
    reason: str | None = None,
    vectorize: bool = False,
) -> Blocks:
    """`native_hessian`, or the same from PyTorch's engine."""
    result = attempt(name, reason, native_hessian, output, inputs, create_graph, vectorize)
    if result is not None:
        return result
    gradient: Sequence[Tensor | None] = [None] * len(inputs)
    if output.requires_grad:
        gradient = torch_grad(output.squeeze(), inputs, create_graph=True, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradient, inputs)]
    return _torch_jacobian(filled, inputs, create_graph, vectorize)


def vjp(
    name: str,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    retain_graph: bool,
    create_graph: bool,
    is_grads_batched: bool = False,
    *,
    reason: str | None = None,
    asked: bool = False,
) -> Sequence[Tensor | None]:
    """`native_vjp`, or the same from PyTorch's engine; `asked` whether the history was asked about before."""
    reason = reason if inputs else NO_INPUTS
    if create_graph and not asked and not is_grads_batched and reason is None:
        reason = C.refusal_of_history(outputs, inputs)
    if reason is None:  # as `attempt` does; a frame less, which a small graph feels
        try:
            result = C.grad(outputs, inputs, cotangents, retain_graph, create_graph, is_grads_batched, True)
            native_calls[name] += 1
            return result
        except Refused as error:
            reason = str(error)
    fallback_calls[name, reason] += 1
    return torch_grad(
        outputs,
        inputs,
        cotangents or None,
        retain_graph=retain_graph,
        create_graph=create_graph,
        allow_unused=True,
        is_grads_batched=is_grads_batched,
    )


def check_used(gradients: Iterable[Tensor | None]) -> None:
    """Raise as torch.autograd.grad does without `allow_unused` if a gradient is None."""
    for index, gradient in enumerate(gradients):
        if gradient is None:
            raise RuntimeError(
                f"The differentiated Tensor at index {index} appears to not have been used in the graph. "
                "Set allow_unused=True if this is the desired behavior."
            )


def zeros(output: Tensor, wrt: Tensor) -> Tensor:
    """The block of a pair that is not connected."""
    return wrt.new_zeros(output.shape + wrt.shape)


def have_other_leaves(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], begun: int, attached: Sequence[Tensor] = ()
) -> list[bool]:
    """Of each output, whether its graph reaches a leaf that is not one of `inputs` (leaves too): a captured parameter, say.

    What is older than `begun`, a `C.sequence_number()` from before the inputs were made, does; so do those of the inputs that
    are `attached` to such a leaf.
    """
    return C.have_other_leaves(outputs, inputs, attached, begun)


def forward_mode(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[str, bool]:
    """A node between them whose operator has another derivative in PyTorch's forward mode, or ""; whether some operator leaves
    values out."""
    return C.forward_mode(list(outputs), list(inputs))


def may_run_again(error: BaseException, handled: BaseException | None) -> bool:
    """Whether a function that raised `error` may have done so because of how it was run.

    Not where a handler of signals raised it, say; `handled` is what was being handled before.
    """
    return isinstance(error, _DUE_TO_ARGUMENTS) and not C.ends_a_program(error, handled)


def random_state(tensors: Sequence[Tensor]) -> Any:
    """What a function of these tensors does to the random generators until its `end()` is undone by `restore()`, unless other
    threads have drawn since."""
    return C.RandomState(tensors[0].device, threading.active_count() > 1)


def _stack(rows: list[Tensor | None], prefix: torch.Size, wrt: Tensor) -> Tensor | None:
    if all(row is None for row in rows) and rows:
        return None
    # An empty list raises what PyTorch raises for an output without elements.
    return torch.stack([torch.zeros_like(wrt) if row is None else row for row in rows]).view(prefix + wrt.shape)


def _torch_jacobian(outputs: Sequence[Tensor], inputs: Sequence[Tensor], create_graph: bool, vectorize: bool) -> Blocks:
    if vectorize:
        return _rows_at_once(outputs, inputs, create_graph)
    return torch_rows(outputs, inputs, create_graph)


def torch_rows(outputs: Sequence[Tensor], inputs: Sequence[Tensor], create_graph: bool) -> Blocks:
    """Row after row by PyTorch's engine."""
    return [_rows(out, inputs, create_graph) for out in outputs]


def _rows_at_once(outputs: Sequence[Tensor], inputs: Sequence[Tensor], create_graph: bool) -> Blocks:
    """All rows of all outputs under vmap, by PyTorch's engine."""
    sizes = [out.numel() for out in outputs]
    seeds = _construct_standard_basis_for(tuple(outputs), tuple(sizes))
    pairs = [(out.reshape(-1), seed) for out, seed in zip(outputs, seeds) if out.requires_grad]
    if not pairs:
        return [[None] * len(inputs) for _ in outputs]
    connected, cotangents = zip(*pairs)
    options = {"create_graph": create_graph, "allow_unused": True, "is_grads_batched": True}
    found = torch_grad(connected, inputs, cotangents, True, **options)
    columns = [[None] * len(outputs) if whole is None else whole.split(sizes) for whole in found]
    return [
        [None if rows is None else rows.view(out.shape + wrt.shape) for rows, wrt in zip(row, inputs)]
        for out, row in zip(outputs, zip(*columns))
    ]


def _rows(out: Tensor, inputs: Sequence[Tensor], create_graph: bool) -> list[Tensor | None]:
    """One row of the Jacobian of `out` after the other, by PyTorch's engine."""
    if not out.requires_grad:
        return [None if out.numel() else _stack([], out.shape, wrt) for wrt in inputs]
    rows = [
        torch_grad(element, inputs, retain_graph=True, create_graph=create_graph, allow_unused=True)
        for element in (out.reshape(-1)[j] for j in range(out.numel()))
    ]
    return [_stack([row[k] for row in rows], out.shape, wrt) for k, wrt in enumerate(inputs)]


def summed_rows(out: Tensor, inputs: Sequence[Tensor], create_graph: bool) -> list[Tensor | None]:
    """Per-sample Jacobian of independent samples: the gradient of a sum over samples holds each sample's own row."""
    if not out.requires_grad:
        return [None] * len(inputs)
    batch, inner = out.shape[0], out.shape[1:]
    columns = out.reshape(batch, inner.numel())
    rows = [
        torch_grad(columns[:, k].sum(), inputs, retain_graph=True, create_graph=create_graph, allow_unused=True)
        for k in range(inner.numel())
    ]
    result: list[Tensor | None] = []
    for j, wrt in enumerate(inputs):
        parts = [row[j] for row in rows]
        if all(part is None for part in parts):
            result.append(None)
            continue
        stacked = torch.stack([torch.zeros_like(wrt) if part is None else part for part in parts], 1)
        result.append(stacked.reshape(batch, *inner, *wrt.shape[1:]))
    return result
