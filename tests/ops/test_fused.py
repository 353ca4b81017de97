"""The op wengert::fused: geometry, reductions, element types, determinism, derivatives of every kind."""

import pytest
import torch
import wengert  # noqa: F401  (registers the op)
from wengert import reference

fused = torch.ops.wengert.fused

BODY = "t0 = sin a0\nt1 = mul t0 a1\nt2 = exp t1\n"
ALL_SUMS = "out t2 {d}\nout t2 {d} sum=0\nout t2 {d} sum=1\nout t2 {d} sum=0,1\nout t0 {d}\n"


def program(body, outputs, rank=2, operands=2, compute="f64"):
    return f"fused v1 rank={rank} operands={operands} compute={compute}\n{body}{outputs}"


P64 = program(BODY, ALL_SUMS.format(d="f64"))


def agree(operands, text, **tolerance):
    results, expected = fused(operands, text), reference.evaluate(operands, text)
    assert len(results) == len(expected)
    for mine, theirs in zip(results, expected):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, equal_nan=True, **tolerance)


SHAPES = [
    (1, 1), (3, 4), (0, 4), (4, 0), (1, 513), (513, 1), (7, 511), (511, 7), (512, 512), (1000, 64), (64, 1000), (10007, 3),
    (3, 10007), (300, 300), (2, 100003), (100003, 2),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("other", ["full", "row", "column", "scalar"])
def test_geometry(shape, layout, other):
    n, m = shape
    x = {
        "contiguous": lambda: torch.randn(n, m, dtype=torch.float64),
        "transposed": lambda: torch.randn(m, n, dtype=torch.float64).t(),
        "sliced": lambda: torch.randn(2 * n, 3 * m + 1, dtype=torch.float64)[::2, 1::3],
        "expanded": lambda: torch.randn(n, 1, dtype=torch.float64).expand(n, m),
    }[layout]()
    assert x.shape == shape
    sizes = {"full": (n, m), "row": (1, m), "column": (n, 1), "scalar": (1, 1)}[other]
    agree([x, torch.randn(*sizes, dtype=torch.float64)], P64)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (17, 1, 33, 2), (4, 5, 600, 3), (9, 2, 2, 300), (2, 0, 3, 4)], ids=str)
@pytest.mark.parametrize("axes", ["0", "1", "2", "3", "0,2", "1,3", "0,1", "2,3", "0,1,2,3"])
def test_sums_over_any_axes(shape, axes):
    x = torch.randn(*shape, dtype=torch.float64)
    text = program("t0 = mul a0 a1\n", f"out t0 f64 sum={axes}\nout a0 f64\nout t0 f64 sum=1\n", rank=4)
    w = torch.randn(1, shape[1], 1, shape[3], dtype=torch.float64)
    agree([x, w], text)
    agree([x.permute(0, 1, 2, 3).transpose(0, 3).contiguous().transpose(0, 3), w], text)


def test_rank_zero_and_unused_operands():
    x = torch.tensor(0.3, dtype=torch.float64)
    text = "fused v1 rank=0 operands=2 compute=f64\nt0 = exp a0\nout t0 f64\nout 2.5 f64\n"
    agree([x, torch.tensor(1)], text)
    agree([torch.ones(3, 1), torch.ones(1, 4)], program("", "out 2 f32\nout 1 f32 sum=0\nout zero f32\n", compute="f32"))


DTYPES = sorted(reference.fused.DTYPES)


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("compute", ["f32", "f64"])
def test_element_types(given, wanted, compute):
    x = torch.randint(0, 2, (37, 23)) if given == "b8" else torch.randint(0, 90, (37, 23))
    x = x.to(reference.fused.DTYPES[given])
    if x.is_floating_point():
        x = x + 0.37
    text = program("t0 = mul a0 1.25\n", f"out t0 {wanted}\n", operands=1, compute=compute)
    agree([x], text, rtol=0, atol=0)
    agree([x.t()], text, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", ["bf16", "f16"])
def test_rounding_to_16_bits(wanted):
    x = torch.cat(
        [torch.linspace(-70000, 70000, 5003), torch.logspace(-30, 5, 2003), torch.tensor([float("nan"), float("inf"), -0.0])]
    )
    text = program("", f"out a0 {wanted}\n", rank=1, operands=1, compute="f32")
    agree([x], text, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1000, 100003, 3000017])
def test_float32_sums_are_as_accurate_as_torchs(n):
    x = torch.rand(n)
    exact = x.double().sum()
    mine = fused([x], program("", "out a0 f32 sum=0\n", rank=1, operands=1, compute="f32"))[0].double()
    assert (mine - exact).abs() <= max((x.sum().double() - exact).abs(), exact * 2**-24)


@pytest.mark.parametrize("shape", [(100003,), (1000, 333), (333, 1000), (5, 70001), (70001, 5)], ids=str)
def test_same_bits_on_any_number_of_threads(shape):
    rank = len(shape)
    x = torch.randn(*shape)
    text = program("t0 = sin a0\n", "".join(f"out t0 f32 sum={k}\n" for k in range(rank)) + "out t0 f32\n", rank, 1, "f32")
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(fused([x], text))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# ------------------------------------------------------------------------------------------------------------------ derivatives
def inputs():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    return x, y


def call(x, y):
    return tuple(fused([x, y], P64))


def test_gradcheck():
    torch.autograd.gradcheck(
        call, inputs(), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, check_undefined_grad=True
    )
    torch.autograd.gradgradcheck(call, inputs(), check_batched_grad=True, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_third_order():
    x, y = inputs()

    def third(fn):
        value = fn(x, y)[3].sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = (grad * torch.arange(12.0, dtype=torch.float64).view(3, 4)).sum()
        return value

    torch.testing.assert_close(third(call), third(lambda x, y: reference.evaluate([x, y], P64)))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, y: torch.func.jacrev(f)(x, y),
        lambda f, x, y: torch.func.jacfwd(f, argnums=1)(x, y),
        lambda f, x, y: torch.func.hessian(lambda a: f(a, y).sum())(x),
        lambda f, x, y: torch.func.vmap(torch.func.vmap(f, (0, None)), (None, 0))(
            torch.stack([x, -x]), torch.stack([y, 2 * y, 3 * y])
        ),
        lambda f, x, y: torch.func.vmap(torch.func.grad(lambda a, b: f(a, b).sum()), (0, None))(torch.stack([x, 2 * x, -x]), y),
        lambda f, x, y: torch.func.vmap(torch.func.jacrev(f), (1, 1))(torch.stack([x, 2 * x], 1), torch.stack([y, -y], 1)),
        lambda f, x, y: torch.func.jvp(f, (x, y), (x * 2, y + 1)),
        lambda f, x, y: torch.func.jvp(torch.func.grad(lambda a: f(a, y).sum()), (x,), (x + 1,)),
        lambda f, x, y: torch.autograd.functional.jacobian(f, (x, y), vectorize=True),
        lambda f, x, y: torch.autograd.functional.hessian(lambda a, b: f(a, b).sum(), (x, y), vectorize=True),
        lambda f, x, y: torch.autograd.functional.jacobian(f, (x, y), vectorize=True, strategy="forward-mode"),
    ],
)
@pytest.mark.parametrize("output", range(5))
def test_transforms(transform, output):
    x, y = (t.detach() for t in inputs())
    mine = transform(lambda a, b: fused([a, b], P64)[output], x, y)
    theirs = transform(lambda a, b: reference.evaluate([a, b], P64)[output], x, y)
    torch.testing.assert_close(mine, theirs)


def test_batched_gradients_of_a_graph():
    x, y = inputs()
    value = fused([x, y], P64)[0]
    (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    basis = torch.eye(12, dtype=torch.float64).view(12, 3, 4)
    (rows,) = torch.autograd.grad(grad, x, basis, is_grads_batched=True)
    expected = torch.func.hessian(lambda a: reference.evaluate([a, y.detach()], P64)[0].sum())(x.detach()).view(12, 3, 4)
    torch.testing.assert_close(rows, expected)


def test_masks_select_instead_of_multiplying():
    """sqrt(relu(x)) has slope inf at the kink's flat side; torch's gradient there is 0."""
    text = "fused v1 rank=1 operands=1 compute=f64\nt0 = sin a0\nt1 = relu t0\nt2 = sqrt t1\nout t2 f64\n"
    for fn in (lambda x: fused([x], text)[0], lambda x: reference.evaluate([x], text)[0]):
        x = torch.tensor([-1.0, 0.5, -2.0], dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(fn(x).sum(), x)
        expected = [0.0, torch.cos(x[1]).item() * 0.5 / torch.sin(x[1]).sqrt().item(), 0.0]
        torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float64))


def test_integer_operands_and_outputs_do_not_require_grad():
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    text = "fused v1 rank=1 operands=2 compute=f64\nt0 = mul a0 a1\nt1 = gt a0 0\nout t0 f64\nout t1 b8\n"
    product, positive = fused([x, torch.arange(4)], text)
    assert product.requires_grad and not positive.requires_grad
    product.sum().backward()
    torch.testing.assert_close(x.grad, torch.arange(4.0, dtype=torch.float64))


def test_freed_graph_and_modified_operand():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 4, dtype=torch.float64)
    out = fused([x, y], P64)[0].sum()
    out.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        out.backward()
    out = fused([x, y], P64)[0].sum()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_missing_formula_is_an_error():
    x = torch.ones(3, requires_grad=True)
    text = "fused v1 rank=1 operands=2 compute=f32\nt0 = softplus a0 a1 20\nout t0 f32\n"
    with pytest.raises(NotImplementedError, match="no derivative formula for argument 1 of softplus"):
        fused([torch.ones(3), x], text)[0].sum().backward()


def test_opcheck():
    x, y = inputs()
    torch.library.opcheck(fused.default, ([x, y], P64))
    torch.library.opcheck(fused.default, ([x.detach(), y.detach()], P64))


def test_symbolic_sizes():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(torch.randn(5, 4, dtype=torch.float64))
        y = mode.from_tensor(torch.randn(1, 4, dtype=torch.float64))
        shapes = [tuple(map(int, t.shape)) for t in fused([x, y], P64)]
    assert shapes == [(5, 4), (1, 4), (5, 1), (1, 1), (5, 4)]


# -------------------------------------------------------------------------------------------------------------------- bad input
HEAD = "fused v1 rank=1 operands=1 compute=f32\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        ("fused v2 rank=1 operands=1 compute=f32\nout a0 f32\n", "fused v1"),
        ("fused v1 rank=33 operands=1 compute=f32\nout a0 f32\n", "rank 33"),
        ("fused v1 rank=1 operands=1 compute=i32\nout a0 f32\n", "compute"),
        (HEAD, "no outputs"),
        (HEAD + "t0 = sine a0\nout t0 f32\n", "unknown primitive 'sine'"),
        (HEAD + "t0 = add a0\nout t0 f32\n", "too few arguments"),
        (HEAD + "t0 = sin a0 a0\nout t0 f32\n", "too many arguments"),
        (HEAD + "t0 = sin t0\nout t0 f32\n", "'t0' is used before it is defined"),
        (HEAD + "out a1 f32\n", "'a1' is out of range"),
        (HEAD + "out a0 c64\n", "unknown dtype 'c64'"),
        (HEAD + "out a0 f32 sum=1\n", "axis 1 is out of range"),
        (HEAD + "out a0 f32 sum=x\n", "bad axis 'x'"),
        (HEAD + "t0 = sin 1..2\nout t0 f32\n", "bad value '1..2'"),
    ],
)
def test_bad_programs(text, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        fused([torch.ones(3)], text)


def test_bad_operands():
    text = "fused v1 rank=2 operands=2 compute=f32\nt0 = add a0 a1\nout t0 f32\n"
    for operands, message in [
        ([torch.ones(3, 4)], "takes 2 operands, got 1"),
        ([torch.ones(3, 4), torch.ones(4)], "has 1 dimensions"),
        ([torch.ones(3, 4), torch.ones(2, 4)], "along axis 0"),
        ([torch.ones(3, 4), torch.ones(3, 4, dtype=torch.complex64)], "unsupported element type"),
        ([torch.ones(3, 4), torch.ones(3, 4, device="meta")], "operand 1 is on meta, operand 0 on .*; all"),
    ]:
        with pytest.raises(ValueError, match=message):
            fused(operands, text)
