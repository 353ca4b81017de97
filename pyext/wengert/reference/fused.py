"""The twin of ``torch.ops.wengert.fused``: interprets a program's text with torch operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "b8": torch.bool,
}


def _truth(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: fn(*args).to(args[0].dtype)


def _elu(x: Tensor, negcoef: Tensor, poscoef: Tensor, negiptcoef: Tensor) -> Tensor:
    scale, input_scale = poscoef.item(), negiptcoef.item()
    return torch.ops.aten.elu(x, negcoef.item() / scale, scale, input_scale)


def _clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.clamp(x, low.expand_as(x), high.expand_as(x))


def _pow(base: Tensor, exponent: Tensor) -> Tensor:
    """A literal is a Python scalar, for which torch has formulas of its own."""
    if exponent.dim() == 0:
        return torch.pow(base, exponent.item())
    return torch.pow(base.item() if base.dim() == 0 else base, exponent)


#: name -> torch function with the same value and the same derivatives
PRIMITIVES: dict[str, Callable[..., Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in (
            "add sub mul div atan2 hypot logaddexp logaddexp2 maximum minimum fmax fmin fmod remainder copysign "
            "heaviside xlogy neg abs sign reciprocal square sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin "
            "acos atan sinh cosh tanh asinh acosh atanh sigmoid erf erfc erfinv lgamma digamma sinc floor ceil round trunc relu"
        ).split()
    },
    **{name: _truth(getattr(torch, name)) for name in "lt le gt ge eq ne logical_and logical_or logical_not isnan".split()},
    **{name: getattr(F, name) for name in "logsigmoid silu mish selu relu6 hardsigmoid hardswish tanhshrink softsign".split()},
    "pow": _pow,
    "xlog1py": torch.special.xlog1py,
    "cbrt": lambda x: torch.sign(x) * x.abs() ** (1 / 3),
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "trigamma": lambda x: torch.polygamma(1, x),
    "polygamma": lambda n, x: torch.polygamma(int(n.item()), x),
    "where": lambda c, a, b: torch.where(c != 0, a, b),
    "clamp": _clamp,
    "hardtanh": lambda x, low, high: F.hardtanh(x, low.item(), high.item()),
    "softplus": lambda x, beta, threshold: F.softplus(x, beta.item(), threshold.item()),
    "elu": _elu,
    "celu": lambda x, alpha: F.celu(x, alpha.item()),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope.item()),
}


@dataclass
class Program:
    rank: int
    operands: int
    compute: torch.dtype
    values: list[tuple[str, list[str]]] = field(default_factory=list)
    outputs: list[tuple[str, torch.dtype, tuple[int, ...]]] = field(default_factory=list)


def parse(text: str) -> Program:
    """Reads a well-formed program text."""
    header, *lines = text.strip().split("\n")
    fields = dict(item.split("=") for item in header.split()[2:])
    program = Program(int(fields["rank"]), int(fields["operands"]), DTYPES[fields["compute"]])
    for line in lines:
        head, *rest = line.split()
        if head == "out":
            axes = tuple(int(axis) for axis in rest[2][4:].split(",")) if len(rest) > 2 else ()
            program.outputs.append((rest[0], DTYPES[rest[1]], axes))
        else:
            program.values.append((rest[1], rest[2:]))
    return program


def evaluate(operands: Sequence[Tensor], text: str) -> list[Tensor]:
    """Same arguments and results as ``torch.ops.wengert.fused``, differentiable through torch's own autograd."""
    program = parse(text)
    shape = torch.broadcast_shapes(*(operand.shape for operand in operands)) if operands else (1,) * program.rank
    device = operands[0].device if operands else None
    values: list[Tensor] = []

    def read(token: str) -> Tensor:
        if token[0] == "a" and token[1:].isdigit():
            return operands[int(token[1:])].to(program.compute)
        if token[0] == "t" and token[1:].isdigit():
            return values[int(token[1:])]
        return torch.tensor(0.0 if token == "zero" else float(token), dtype=program.compute, device=device)

    for name, args in program.values:
        values.append(PRIMITIVES[name](*(read(arg) for arg in args)))
    results = []
    for token, dtype, axes in program.outputs:
        value = read(token).expand(shape)
        results.append((value.sum(axes, keepdim=True) if axes else value.clone()).to(dtype))
    return results
