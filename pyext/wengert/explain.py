"""A report on what the engine saw in a computation: which structure it kept, which it lost and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _engine
from ._compile import eager
from ._native import C, Refused
from .functional import Function, Tensors

_COLUMNS = ("node", "kind", "structure", "blocks", "stored", "dense")


@dataclass(frozen=True)
class Report:
    """What `explain` found; prints as a table.

    Attributes:
        rows: one dict per node, from the outputs to the inputs: ``node`` (PyTorch's name), ``kind`` of operator,
            ``structure`` (how it was kept, or why it was lost), ``blocks``, and numbers ``stored`` against ``dense``.
        refused: why the whole computation takes PyTorch's path, or None.
    """

    rows: tuple[dict[str, Any], ...]
    refused: str | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if self.refused is not None:
            return f"PyTorch's path for the whole call: {self.refused}"
        table = [_COLUMNS, *(tuple(_cell(row.get(column, "")) for column in _COLUMNS) for row in self.rows)]
        widths = [max(len(line[k]) for line in table) for k in range(len(_COLUMNS))]
        lines = ["  ".join(_pad(cell, k, widths[k]) for k, cell in enumerate(line)).rstrip() for line in table]
        stored, dense = (sum(int(row.get(key) or 0) for row in self.rows) for key in ("stored", "dense"))
        lines.append(f"{len(self.rows)} nodes; {stored:,} values stored where dense Jacobians would hold {dense:,}")
        return "\n".join(lines)

    __repr__ = __str__


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _pad(cell: str, column: int, width: int) -> str:
    return cell.rjust(width) if _COLUMNS[column] in ("blocks", "stored", "dense") else cell.ljust(width)


@eager
def explain(func: Function | Tensor | Sequence[Tensor], inputs: Tensors) -> Report:
    """How the engine would differentiate a function at `inputs`, node by node.

    Args:
        func: a function of the tensors in `inputs`, or outputs already computed from them.
        inputs: a tensor or a tuple of tensors.

    Returns:
        A report that prints as a table: node, kind, how its structure was kept or why it was lost, blocks, and stored
        values against those of a dense Jacobian.

    Raises:
        TypeError: if inputs or outputs are not tensors.

    >>> report = explain(lambda x: torch.sin(x) ** 2, torch.ones(100))
    >>> print(report)  # doctest: +SKIP
    >>> isinstance(report, Report)
    True
    """
    reason = _engine.refusal()
    _, inputs = _engine.as_tuple(inputs, "inputs", "explain")
    if isinstance(func, (Tensor, tuple, list)):
        outputs: Any = tuple(func) if type(func) is list else func
    else:
        with torch.enable_grad():
            inputs = _engine.fresh_leaves(inputs, False)
            outputs = func(*inputs)
    _, outputs = _engine.as_tuple(outputs, "outputs of the user-provided function", "explain")
    if reason is not None:
        return Report((), reason)
    try:
        return Report(tuple(C.explain(list(outputs), list(inputs))))
    except Refused as error:
        return Report((), str(error))
