"""What torch.compile sees of the public functions: a graph break before the call, or PyTorch's own function in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

F = TypeVar("F", bound=Callable[..., Any])


def eager(fn: F) -> F:
    """Mark `fn`, and all it calls, as never compiled.

    Same effect as torch.compiler.disable, without its two costs: the import of torch._dynamo (a second) and a wrapper
    around every eager call.  The attribute makes the tracer break its graph at a call of `fn`; the strategy makes the
    frame hook skip `fn` and the frames below it, so that user functions are differentiated as eager code.
    """
    fn._torchdynamo_disable = True  # type: ignore[attr-defined]
    return _skipped(fn)


def traced_as(other: Callable[..., Any]) -> Callable[[F], F]:
    """Mark a function in whose place the tracer sees `other`, PyTorch's own; called as eager code it is like one of `eager`."""

    def mark(fn: F) -> F:
        fn._torchdynamo_inline = other  # type: ignore[attr-defined]
        return _skipped(fn)

    return mark


def _skipped(fn: F) -> F:
    set_code_exec_strategy(fn.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return fn
