"""Every primitive, packed into programs of many outputs, so that few kernels are compiled; what results may differ by."""

import torch
from wengert import reference

# operands by domain: a0 in (0, 1), a1 and a2 of either sign, a3 above 1
ARGUMENTS = {
    **dict.fromkeys("asin acos atanh erfinv log1p".split(), "a0"),
    **dict.fromkeys("sqrt rsqrt log log2 log10 digamma trigamma lgamma cbrt reciprocal acosh".split(), "a3"),
    **dict.fromkeys(
        "neg abs sign square exp exp2 expm1 sin cos tan atan sinh cosh tanh asinh sigmoid logsigmoid silu gelu_erf gelu_tanh "
        "mish selu relu relu6 hardsigmoid hardswish tanhshrink softsign erf erfc sinc floor ceil round trunc logical_not "
        "isnan".split(),
        "a1",
    ),
    **dict.fromkeys(
        "add sub mul div maximum minimum fmax fmin copysign lt le gt ge eq ne logical_and logical_or hypot atan2 logaddexp "
        "logaddexp2 heaviside fmod remainder".split(),
        "a1 a2",
    ),
    "pow": "a3 a2",
    "xlogy": "a1 a3",
    "xlog1py": "a1 a3",
    "polygamma": "2 a3",
    "where": "a1 a2 a0",
    "clamp": "a1 -0.5 0.75",
    "hardtanh": "a1 -1 1",
    "softplus": "a1 2 3",
    "elu": "a1 1.5 1 0.5",
    "celu": "a1 1.5",
    "leaky_relu": "a1 0.125",
}
NAMES = sorted(ARGUMENTS)
PACKS = [NAMES[start : start + 16] for start in range(0, len(NAMES), 16)]

N, M = 9, 131  # an odd number of elements, more than a block's
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
# against the CPU kernel, which rounds elementary functions differently
TOLERANCE = {"f32": 4e-6, "f64": 1e-12, "bf16": 2**-7, "f16": 2**-10}
TORCH_TOLERANCE = {**TOLERANCE, "f32": 2e-5, "f64": 1e-8}  # torch's trigamma has ten digits


def domains(shapes, dtype):
    unit, first, second, large = (torch.rand(*shape, dtype=torch.float64) for shape in shapes)
    scaled = (0.02 + 0.96 * unit, 6 * first - 3, 5 * second - 2.6, 1.01 + 4 * large)
    return [x.to(dtype) for x in scaled]


def contiguous(dtype):
    return domains([(N, M)] * 4, dtype)


def strided(dtype):
    return [x.t()[::2, 1::3] for x in domains([(3 * M + 1, 2 * N)] * 4, dtype)]


def broadcast(dtype):
    return domains([(1, M), (N, 1), (N, M), (1, 1)], dtype)


def program(pack, dtype, sums=("",)):
    lines = [f"fused v1 rank=2 operands=4 compute={'f64' if dtype == 'f64' else 'f32'}"]
    lines += [f"t{k} = {name} {ARGUMENTS[name]}" for k, name in enumerate(pack)]
    lines += [f"out t{k} {dtype}{sums[k % len(sums)]}" for k in range(len(pack))]
    return "\n".join(lines) + "\n"


def close(mine, theirs, tolerance, scale=1.0):
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def agree(results, operands, text, dtype, scale=1.0):
    """`results` of a CUDA kernel against the CPU kernel and a twin in plain torch, of the same operands on the CPU."""
    for mine, cpu, twin in zip(results, torch.ops.wengert.fused(operands, text), reference.evaluate(operands, text), strict=True):
        close(mine, cpu, TOLERANCE[dtype], scale)
        close(mine, twin, TORCH_TOLERANCE[dtype], scale)


MANY = 30


def many_operands(dtype, transposed=False):
    """More operands than a thread holds at a time; some of one element or along one axis only."""
    shapes = [(N, M), (1, M), (N, 1), (1, 1), (N, M)]
    operands = [torch.rand(shapes[k % 5], dtype=torch.float64).mul(2).sub(0.5).to(dtype) for k in range(MANY)]
    return [x.t().contiguous().t() for x in operands] if transposed else operands


def long_program(dtype, sums):
    """Uses them one after the other, the first ones again at the end, with more long primitives than are inlined."""
    lines = [f"fused v1 rank=2 operands={MANY} compute={'f64' if dtype == 'f64' else 'f32'}", "t0 = sin a0"]
    for k in range(1, MANY + 5):
        lines.append(f"t{3 * k - 2} = cos a{k % MANY}")
        lines.append(f"t{3 * k - 1} = mul t{3 * k - 2} {'0.5' if k % 7 else f'a{k // 7}'}")
        lines.append(f"t{3 * k} = {'add' if k % 2 else 'atan2'} t{3 * k - 3} t{3 * k - 1}")
    last = 3 * (MANY + 4)
    return "\n".join([*lines, *(f"out t{last - 3 * i} {dtype}{axes}" for i, axes in enumerate(sums))]) + "\n"


LONG_SUMS = [("",), ("", ""), (" sum=0", ""), (" sum=1", ""), (" sum=0,1", " sum=0,1")]
