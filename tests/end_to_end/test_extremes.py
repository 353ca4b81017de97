"""Derivatives at zeros of both signs, kinks, ties, under- and overflow, infinities and nan: every function with a reader, up to
the third order, by every public function, against PyTorch's counterpart of each."""

import warnings

import pytest
import torch
import wengert
from support.extremes import AROUND, BINARY, GRID, KEPT, ORDER, POINTS, UNARY, agreement, forms, points, sizes

REVERSE = [name for name in ORDER if name not in ("jacrev", "jacfwd", "func.hessian")]
PRODUCTS = [name for name in REVERSE if name not in ("jacobian", "hessian")]
MASKED = [
    *("elu", "selu", "celu", "norm of two", "norm 3", "std of same", "std of two", "normalize of equal", "pairwise eps 0"),
    *("0.0 ** x", "zeros ** x", "x ** x", "x ** -1", "x ** 0.5", "atan2 self", "atan2 0", "relu then sqrt", "where log", "sinc"),
    *("copysign -1", "masked_fill", "where", "softplus", "hardswish", "remainder 1.5", "abs", "cosine of same"),
]
# These run other formulas in PyTorch (forward mode, decompositions); where those disagree with reverse mode, ours are those
# of reverse mode. A Hessian is symmetric, but where PyTorch's hvp is nan its vhp may be a number.
SAME = {"jacrev": "jacobian", "jacfwd": "jacobian", "func.hessian": "hessian", "hvp": "vhp"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def results(call):
    try:
        return call()
    except (RuntimeError, NotImplementedError) as error:
        return error


def check(f, xs, names=tuple(ORDER), noise=0.0):
    theirs = forms(f, xs, torch.autograd.functional, torch.autograd.grad, torch.func)
    ours = forms(f, xs, wengert, wengert.grad, wengert.func)
    scale = sizes(f, xs)
    lines = []
    for name in names:
        accepted = [r for n in {name, SAME.get(name, name)} if not isinstance(r := results(theirs[n]), Exception)]
        found = results(ours[name])
        if not accepted:
            assert isinstance(found, Exception), f"{name}: a result where torch raises"
            continue
        assert not isinstance(found, Exception), f"{name}: {found}"
        for k, mine in enumerate(found):
            agree = torch.stack([agreement(mine, reference[k], scale[ORDER[name]], noise) for reference in accepted]).any(0)
            lines += [
                f"{name}[{k}] at {[x[i].item() for x in xs]}: {mine[i].item()}, torch {[r[k][i].item() for r in accepted]}"
                for i in (~agree).nonzero().flatten().tolist()
            ]
    assert not lines, f"{len(lines)} entries\n" + "\n".join(lines[:12])


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@DTYPES
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_argument(name, dtype):
    x = points(POINTS, dtype)
    names = tuple(ORDER) if dtype == torch.float64 else PRODUCTS
    check(UNARY[name], (x[KEPT[name](x)] if name in KEPT else x,), names)


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_arguments(name):
    x = points(GRID, torch.float64)
    pairs = tuple(t.reshape(-1).contiguous() for t in torch.meshgrid(x, x, indexing="ij"))
    check(BINARY[name], pairs, PRODUCTS, noise=1e-9 if name == "std" else 1e-12)


@pytest.mark.parametrize("around", sorted(set(AROUND) - {"alone"}))
@pytest.mark.parametrize("name", MASKED)
def test_masks_inside_other_functions(name, around):
    """Finite points: zeros, ties, and where what is masked is infinite."""
    x = points([v for v in POINTS if abs(v) < 1e4], torch.float64)
    check(AROUND[around](UNARY[name]), (x[x.abs() < 700],), PRODUCTS)


@pytest.mark.parametrize("large", [1e100, 1e200, -1e200])
def test_batch_norm_of_data_whose_variance_overflows(large):
    """The weight meets data / deviation = 0 there, and so do derivatives of what it meets."""
    x, w, b = (t.double().requires_grad_() for t in (torch.randn(3, 2), torch.rand(2), torch.randn(2)))
    with torch.no_grad():
        x[0, 0] = large
    y = torch.nn.functional.batch_norm(x, None, None, w, b, training=True)
    theirs = torch.stack([torch.autograd.grad(v, w, create_graph=True)[0] for v in y.flatten()]).reshape(3, 2, 2)
    ours = wengert.jacobian(y, w, create_graph=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(t.sin().sum(), x)[0] for t in (ours, theirs)))
