"""check_against_torch: one universal check that every function of the suite goes through.

Each *mode* compares one promise of the public interface with torch's own result on the same function and inputs:

    value         wengert.func.vjp / grad_and_value leave the function's value alone
    jacobian      functional form; the same bits on a second call; the user's tensors untouched
    graph         graph form on computed tensors; the graph stays usable afterwards
    func          wengert.func.jacrev
    forward       wengert.func.jacfwd
    hessian       functional, graph and func forms, of the function itself or of a weighted sum of its outputs
    products      vjp, jvp, vhp, hvp
    gradient      wengert.grad, plain and with is_grads_batched
    create_graph  differentiate the Jacobian and the Hessian again
    history       what results taken with create_graph lead to (support.histories)
    strided       the same with inputs that are strided, transposed windows of larger storage
    float32       aggregate bounds (relative L2, signed bias) against float64
    gradcheck     gradcheck and gradgradcheck through our results (slow: ask for it)
"""

# ruff: noqa: B023 - every function made in a loop is called within the same iteration

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import wengert
from torch.autograd import functional as torch_functional
from torch.torch_version import TorchVersion

from support.compare import Outcome, Tolerance, assert_same, assert_same_call, given, leaves
from support.histories import as_tuple, assert_same_histories, weights_like

DEVICE = torch.device(os.environ.get("WENGERT_TEST_DEVICE", "cpu"))
BEFORE_2_13 = TorchVersion(torch.__version__) < "2.13"  # signatures and texts compared are those of 2.13

MODES = (
    "value",
    "jacobian",
    "graph",
    "func",
    "forward",
    "hessian",
    "products",
    "gradient",
    "create_graph",
    "history",
    "strided",
    "float32",
)
DEFAULT_TOLERANCE = Tolerance()
EXTRA_MODES = ("gradcheck",)

Function = Callable[..., Any]
Inputs = Any  # one tensor, or a tuple of tensors


def check_against_torch(
    fn: Function,
    inputs: Inputs,
    *,
    modes: Iterable[str] = MODES,
    single: tuple[Function, Inputs] | None = None,
    tol: Tolerance = DEFAULT_TOLERANCE,
) -> None:
    """Compare every mode with torch.

    Args:
        fn: takes the inputs one by one; returns a tensor or a tuple of tensors.
        inputs: a float64 tensor or a tuple of them. The same tensor may stand in several places.
        modes: which of the checks above to run.
        single: the same function and inputs in float32, for the mode `float32`; without it the mode
            casts the inputs, which suits functions that hold no tensors of their own.
        tol: float64 tolerances.
    """
    for mode in modes:
        if mode == "float32":
            _check_float32(fn, inputs, single or (fn, _convert(inputs, lambda t: t.float())))
        else:
            _CHECKS[mode](fn, inputs, tol)


def _convert(inputs: Inputs, convert: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """Convert floating inputs, keeping repeated tensors repeated."""
    seen: dict[int, torch.Tensor] = {}

    def one(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        return seen.setdefault(id(t), convert(t.detach()))

    return tuple(one(t) for t in inputs) if isinstance(inputs, tuple) else one(inputs)


def fresh(inputs: Inputs) -> Inputs:
    """Leaves with the same values, that require grad."""
    return _convert(inputs, lambda t: t.clone().requires_grad_())


def strided(inputs: Inputs) -> Inputs:
    """The same values in windows with transposed, stepped storage."""

    def window(t: torch.Tensor) -> torch.Tensor:
        room = t.new_full([2 * n + 1 for n in reversed(t.shape)], math.nan)
        view = room.permute(tuple(reversed(range(t.dim()))))
        for axis in range(t.dim()):
            view = view.narrow(axis, 1, 2 * t.shape[axis])
            view = view[(slice(None),) * axis + (slice(None, None, 2),)]
        view.copy_(t)
        return view.requires_grad_()

    return _convert(inputs, window)


def weighted_sum(tree: Any) -> torch.Tensor:
    return sum(((t * weights_like(t)).sum() for t in leaves(tree)), start=torch.zeros((), dtype=torch.float64, device=DEVICE))


def scalarised(fn: Function) -> Function:
    """fn itself where it returns one number, else a weighted sum of its floating outputs."""

    def scalar(*xs: torch.Tensor) -> torch.Tensor:
        out = fn(*xs)
        if isinstance(out, torch.Tensor) and out.numel() == 1:
            return out
        return sum((t * weights_like(t)).sum() for t in as_tuple(out) if t.is_floating_point())

    return scalar


def bits(tree: Any) -> list[tuple[torch.dtype, bytes]]:
    return [(t.dtype, t.detach().cpu().contiguous().numpy().tobytes()) for t in leaves(tree)]


def _check_value(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    xs = as_tuple(fresh(inputs))
    assert_same_call(lambda: wengert.func.vjp(fn, *xs)[0], lambda: torch.func.vjp(fn, *xs)[0], "func.vjp value", tol)
    scalar = scalarised(fn)
    if all(x.is_floating_point() for x in xs):
        where = tuple(range(len(xs)))
        assert_same_call(
            lambda: wengert.func.grad_and_value(lambda *a: scalar(*a).reshape(()), where)(*xs),
            lambda: torch.func.grad_and_value(lambda *a: scalar(*a).reshape(()), where)(*xs),
            "func.grad_and_value",
            tol,
        )


def _check_jacobian(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    xs = fresh(inputs)
    before = bits(xs)
    expected = assert_same_call(lambda: wengert.jacobian(fn, xs), lambda: torch_functional.jacobian(fn, xs), "jacobian", tol)
    if expected is None:
        return
    first, second = wengert.jacobian(fn, xs), wengert.jacobian(fn, xs)
    assert bits(first) == bits(second), "a second call gave other bits"
    assert not any(t.requires_grad for t in leaves(first)), "create_graph=False returned tensors that require grad"
    assert bits(xs) == before, "the inputs were changed"
    assert all(x.grad is None for x in as_tuple(xs) if x.is_leaf), "a .grad field was filled"
    assert_same_call(
        lambda: wengert.jacobian(fn, xs, strict=True),
        lambda: torch_functional.jacobian(fn, xs, strict=True),
        "jacobian strict",
        tol,
    )
    # torch cannot vectorise every function (custom backwards, data-dependent shapes); ours may, and then must be right.
    vectorised = Outcome.of(lambda: wengert.jacobian(fn, xs, vectorize=True))
    peer = Outcome.of(lambda: torch_functional.jacobian(fn, xs, vectorize=True))
    if vectorised.error is not None and peer.error is None:
        raise vectorised.error
    if vectorised.error is None:
        assert_same(vectorised.value, expected, "jacobian vectorize", tol)


def _check_graph(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    expected = torch_functional.jacobian(fn, fresh(inputs))
    xs = fresh(inputs)
    outputs = fn(*as_tuple(xs))
    assert_same(wengert.jacobian(outputs, xs), expected, "jacobian of computed tensors", tol)
    assert_same(wengert.jacobian(outputs, xs), expected, "the same graph a second time", tol)
    total = sum(y.sum() for y in as_tuple(outputs))
    torch.autograd.grad(total, [x for x in as_tuple(xs) if x.requires_grad], allow_unused=True)


def _check_func(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    _check_transform(wengert.func.jacrev, torch.func.jacrev, "func.jacrev", fn, inputs, tol)


def _check_forward(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    _check_transform(wengert.func.jacfwd, torch.func.jacfwd, "func.jacfwd", fn, inputs, tol)


def _check_transform(ours: Any, theirs: Any, name: str, fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    """Where torch.func cannot run the function at all, ours may refuse too or give the functional result."""
    xs = as_tuple(_convert(inputs, torch.clone))
    for argnums in (0, tuple(range(len(xs)))):
        expected = Outcome.of(lambda: theirs(fn, argnums)(*xs))
        got = Outcome.of(lambda: ours(fn, argnums)(*xs))
        if expected.error is None:
            if got.error is not None:
                raise got.error
            if Outcome.of(lambda: assert_same(got.value, expected.value, "", tol)).error is None:
                continue
            # Some of torch's batching rules are wrong (cdist's): where torch disagrees with its own row loop, the loop decides.
            rows = torch_functional.jacobian(fn, xs) if argnums else torch_functional.jacobian(lambda x: fn(x, *xs[1:]), xs[0])
            if Outcome.of(lambda: assert_same(leaves(expected.value), leaves(rows), "", tol)).error is None:
                assert_same(got.value, expected.value, f"{name} argnums={argnums}", tol)
            assert_same(leaves(got.value), leaves(rows), f"{name} mending torch's", tol)
        elif got.error is None and isinstance(argnums, tuple):
            assert_same(leaves(got.value), leaves(torch_functional.jacobian(fn, xs)), f"{name} beyond torch's", tol)


def _check_hessian(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    scalar = scalarised(fn)
    xs = fresh(inputs)
    expected = assert_same_call(lambda: wengert.hessian(scalar, xs), lambda: torch_functional.hessian(scalar, xs), "hessian", tol)
    if expected is None:
        return
    assert bits(wengert.hessian(scalar, xs)) == bits(wengert.hessian(scalar, xs)), "a second call gave other bits"
    assert not any(t.requires_grad for t in leaves(wengert.hessian(scalar, xs)))
    value = scalar(*as_tuple(xs))
    assert_same(wengert.hessian(value, xs), expected, "hessian of a computed tensor", tol)
    assert_same(wengert.hessian(value, xs), expected, "hessian of the same graph again", tol)
    plain = _convert(inputs, torch.clone)
    argnums = tuple(range(len(as_tuple(plain))))
    reference = Outcome.of(lambda: torch.func.hessian(scalar, argnums)(*as_tuple(plain)))
    if reference.error is None:
        got = wengert.func.hessian(scalar, argnums)(*as_tuple(plain))
        # torch's two families disagree in places (forward over reverse of an affine layer norm is wrong): either will do.
        if Outcome.of(lambda: assert_same(reference.value, _nested(expected), "", tol)).error is None:
            assert_same(got, reference.value, "func.hessian", tol)
        else:
            accepted = (Outcome.of(lambda: assert_same(got, r, "", tol)).error for r in (reference.value, _nested(expected)))
            assert not all(accepted), "func.hessian agrees with neither torch.func.hessian nor functional.hessian"


def _nested(hessian: Any) -> Any:
    """functional.hessian's nesting for one tensor, in the nesting of a tuple of argnums."""
    return ((hessian,),) if isinstance(hessian, torch.Tensor) else hessian


def _check_products(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    xs = fresh(inputs)
    out = fn(*as_tuple(xs))
    ct = tuple(weights_like(t) for t in out) if isinstance(out, tuple) else weights_like(out)
    dx = tuple(weights_like(t) for t in xs) if isinstance(xs, tuple) else weights_like(xs)
    one = torch.ones_like(scalarised(fn)(*as_tuple(xs)))
    for name, f, v in (
        ("vjp", fn, ct),
        ("jvp", fn, dx),
        ("vjp", scalarised(fn), one),
        ("vhp", scalarised(fn), dx),
        ("hvp", scalarised(fn), dx),
    ):
        for create_graph in (False, True):
            ours = Outcome.of(lambda: getattr(wengert, name)(f, xs, v, create_graph=create_graph))
            if name == "hvp" and not create_graph and ours.error is None:
                vhp = Outcome.of(lambda: torch_functional.vhp(f, xs, v))
                if _agree(ours.value, vhp.value, tol):
                    continue  # the Hessian is symmetric: where torch's hvp is another number, it is wrong
            assert_same_call(
                lambda: given(ours),
                lambda: getattr(torch_functional, name)(f, xs, v, create_graph=create_graph),
                f"{name} create_graph={create_graph}",
                tol,
            )


def _agree(ours: Any, ref: Any, tol: Tolerance) -> bool:
    return Outcome.of(lambda: assert_same(ours, ref, tol=tol)).error is None


def _check_gradient(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    xs = [x for x in dict.fromkeys(as_tuple(fresh(inputs))) if x.requires_grad]
    full = as_tuple(fresh(inputs))
    positions = [next(k for k, x in enumerate(full) if x is y) for y in dict.fromkeys(full) if y.requires_grad]

    def outputs() -> list[torch.Tensor]:
        by_identity = dict(zip((id(full[p]) for p in positions), xs))
        out = fn(*(by_identity.get(id(x), x) for x in full))
        return [y for y in as_tuple(out) if y.requires_grad]

    ys = outputs()
    if not ys:
        return
    seeds = [weights_like(y) for y in ys]
    batch = [torch.stack([s, 2 * s.flip(tuple(range(s.dim()))), torch.zeros_like(s)]) for s in seeds]
    for options in (
        {"grad_outputs": seeds, "allow_unused": True},
        {"grad_outputs": seeds, "materialize_grads": True},
        {"grad_outputs": batch, "is_grads_batched": True, "allow_unused": True},
        {"grad_outputs": seeds, "allow_unused": True, "create_graph": True},
    ):
        label = {k: v for k, v in options.items() if k != "grad_outputs"}
        assert_same_call(
            lambda: wengert.grad(ys, xs, retain_graph=True, **options),
            lambda: torch.autograd.grad(ys, xs, retain_graph=True, **options),
            f"grad {label}",
            tol,
        )


def _check_create_graph(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    xs = fresh(inputs)
    active = [x for x in dict.fromkeys(as_tuple(xs)) if x.requires_grad]
    pairs: Sequence[tuple[str, Any, Any, Function]] = (
        ("jacobian", wengert.jacobian, torch_functional.jacobian, fn),
        ("hessian", wengert.hessian, torch_functional.hessian, scalarised(fn)),
    )
    for name, ours, theirs, f in pairs:
        reference = Outcome.of(lambda: theirs(f, xs, create_graph=True))
        if reference.error is not None:
            continue
        result = ours(f, xs, create_graph=True)
        assert_same(result, reference.value, f"{name} create_graph", tol)
        expected = Outcome.of(lambda: _second_derivative(reference.value, active)).value
        if expected is None:  # torch has no derivative of this derivative
            continue
        assert_same(_second_derivative(result, active), expected, f"derivative of the {name}", tol)
        if name == "jacobian" and any(t.requires_grad for t in leaves(result)):
            total = weighted_sum(result)
            again = wengert.grad(total, active, retain_graph=True, materialize_grads=True)
            assert_same(again, tuple(expected), "wengert.grad of our own Jacobian", tol)


def _check_history(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    assert_same_histories(fn, scalarised, as_tuple(inputs), tol)


def _second_derivative(tree: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradient of a weighted sum of a derivative; zeros where nothing depends on the inputs any more."""
    total = weighted_sum(tree)
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True))


def _check_strided(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    xs = strided(inputs)
    assert_same_call(lambda: wengert.jacobian(fn, xs), lambda: torch_functional.jacobian(fn, xs), "strided jacobian", tol)
    scalar = scalarised(fn)
    assert_same_call(lambda: wengert.hessian(scalar, xs), lambda: torch_functional.hessian(scalar, xs), "strided hessian", tol)


def _check_float32(fn: Function, inputs: Inputs, single: tuple[Function, Inputs]) -> None:
    fn32, inputs32 = single
    for name, ours, theirs, wrap in (
        ("jacobian", wengert.jacobian, torch_functional.jacobian, lambda f: f),
        ("hessian", wengert.hessian, torch_functional.hessian, scalarised),
    ):
        exact = Outcome.of(lambda: theirs(wrap(fn), fresh(inputs)))
        peer = Outcome.of(lambda: theirs(wrap(fn32), fresh(inputs32)))
        if exact.error is not None or peer.error is not None:
            continue
        result = ours(wrap(fn32), fresh(inputs32))
        assert_same(result, peer.value, f"float32 {name}", Tolerance(rtol=2e-3, atol=2e-4))
        for k, (a, b, c) in enumerate(zip(leaves(result), leaves(peer.value), leaves(exact.value))):
            assert_aggregate(a, b, c, f"float32 {name}[{k}]")


def assert_aggregate(ours: torch.Tensor, peer: torch.Tensor, exact: torch.Tensor, where: str) -> None:
    """Relative L2 error and signed bias stay near torch's own, whatever single entries do.

    An element bound must be loose enough for the worst cancellation; a wrong accumulation type or a
    truncated polynomial hides below it but shows in the norm of the error or in its mean sign.
    """
    keep = exact.isfinite() & ours.isfinite() & peer.isfinite()
    if not keep.any():
        return
    e = exact[keep].double()
    ours_error, peer_error = ours[keep].double() - e, peer[keep].double() - e
    norm = float(e.norm()) or 1.0
    relative, torch_relative = float(ours_error.norm()) / norm, float(peer_error.norm()) / norm
    assert relative <= 4 * torch_relative + 2e-6, f"{where}: relative L2 {relative:.2e}, torch's {torch_relative:.2e}"
    magnitude = float(e.abs().sum()) or 1.0
    bias, torch_bias = abs(float(ours_error.sum())) / magnitude, abs(float(peer_error.sum())) / magnitude
    assert bias <= 4 * torch_bias + 1e-6, f"{where}: signed bias {bias:.2e}, torch's {torch_bias:.2e}"


def _check_gradcheck(fn: Function, inputs: Inputs, tol: Tolerance) -> None:
    del tol
    xs = as_tuple(fresh(inputs))

    def ours(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = leaves(wengert.jacobian(fn, args, create_graph=True))
        return tuple(t for t in found if t.requires_grad)

    if ours(*xs):
        assert torch.autograd.gradcheck(ours, xs)
        assert torch.autograd.gradgradcheck(ours, xs)


_CHECKS: dict[str, Callable[[Function, Inputs, Tolerance], None]] = {
    "value": _check_value,
    "jacobian": _check_jacobian,
    "graph": _check_graph,
    "func": _check_func,
    "forward": _check_forward,
    "hessian": _check_hessian,
    "products": _check_products,
    "gradient": _check_gradient,
    "create_graph": _check_create_graph,
    "history": _check_history,
    "strided": _check_strided,
    "gradcheck": _check_gradcheck,
}
