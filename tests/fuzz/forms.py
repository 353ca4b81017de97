"""The forms in which a program is differentiated and compared; each is one small check."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import wengert
from judge import Mismatch, Tolerant, same_calls, weighted_sum, weights
from programs import Program, Tensors
from support.compare import Outcome, leaves
from torch.autograd import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class Case:
    """A program with one content, and PyTorch's results for it."""

    def __init__(self, program: Program, content: int) -> None:
        self.program, self.content = program, content
        self.f = program.function(content)
        self.xs = program.inputs(content)
        self.argnums = tuple(range(len(self.xs)))
        self.tol = Tolerant(program.single)
        self.same = self.tol.same

    def scalar(self, *xs: torch.Tensor) -> torch.Tensor:
        return weighted_sum(self.f(*xs))

    def leaf(self) -> Tensors:
        fresh = {id(x): x.detach().clone().requires_grad_() for x in self.xs}
        return tuple(fresh[id(x)] for x in self.xs)

    def alike(self, leaf: Tensors) -> bool:
        """Strides decide which of several equal entries a kernel takes, and what select_scatter writes into what overlaps."""
        return all(a.stride() == b.stride() for a, b in zip(leaf, self.xs))

    def calls(self, name: str, *args: Any, **options: Any) -> Any:
        """The same function of wengert and of torch.autograd.functional."""
        ours, theirs = getattr(wengert, name), getattr(F, name)
        label = " ".join([name, *(f"{k}={v}" for k, v in options.items())])
        return same_calls(self.tol, lambda: ours(*args, **options), lambda: theirs(*args, **options), label)

    @functools.cached_property
    def jacobian(self) -> Outcome:
        return Outcome.of(lambda: F.jacobian(self.f, self.xs))

    @functools.cached_property
    def samples(self) -> list[Tensors]:
        return [self.program.inputs(self.content + 3 * k) for k in range(3)]

    @functools.cached_property
    def batch(self) -> Tensors:
        return tuple(torch.stack(parts) for parts in zip(*self.samples))


@dataclasses.dataclass(frozen=True)
class Form:
    check: Callable[[Case], None]
    order: int  # of the derivatives looked at
    batched: bool  # also for programs over a batch
    plain: bool  # also for programs that are not


FORMS: dict[str, Form] = {}


def form(order: int, batched: bool = True, plain: bool = True) -> Callable[[Any], Any]:
    def register(check: Callable[[Case], None]) -> Callable[[Case], None]:
        FORMS[check.__name__] = Form(check, order, batched, plain)
        return check

    return register


def overwritten(results: Any) -> list[torch.Tensor]:
    """Copies of the results, which are then filled: nothing else may live in their memory."""
    kept = [t.clone() for t in leaves(results)]
    for t in leaves(results):
        t.fill_(torch.nan)
    for t, copy in zip(leaves(results), kept):
        if copy.numel() and not bool(t.isnan().all()):
            raise Mismatch("results share memory")
    return kept


@form(1)
def jacobian(case: Case) -> None:
    before = [x.clone() for x in case.xs]
    got = wengert.jacobian(case.f, case.xs)
    case.same(got, case.jacobian.value, "jacobian")
    if any(t.requires_grad for t in leaves(got)):
        raise Mismatch("jacobian: requires grad")
    kept = overwritten(got)
    if not all(torch.equal(x, b) for x, b in zip(case.xs, before) if not b.isnan().any()):
        raise Mismatch("jacobian: filling the result changed an input")
    case.same(leaves(wengert.jacobian(case.f, case.xs)), kept, "jacobian after its result was overwritten", exactly=True)


@form(1)
def jacobian_options(case: Case) -> None:
    if len(case.xs) == 1:
        case.calls("jacobian", case.f, case.xs[0])
    case.calls("jacobian", case.f, case.xs, strict=True)
    ours = Outcome.of(lambda: wengert.jacobian(case.f, case.xs, vectorize=True))
    if ours.error is None:
        if not case.tol.agrees(ours.value, case.jacobian.value):
            case.same(ours.value, F.jacobian(case.f, case.xs, vectorize=True), "jacobian vectorize=True")
    elif Outcome.of(lambda: F.jacobian(case.f, case.xs, vectorize=True)).error is None:
        raise ours.error


@form(1)
def graph(case: Case) -> None:
    leaf = case.leaf()
    y = case.f(*leaf)
    if case.program.repeated or not any(t.requires_grad for t in leaves(y)):
        return
    got = wengert.jacobian(y, leaf)
    case.same(got, case.jacobian.value if case.alike(leaf) else F.jacobian(case.f, leaf), "graph form")
    kept = overwritten(got)
    case.same(leaves(wengert.jacobian(y, leaf)), kept, "graph form again", exactly=True)
    total = weighted_sum(y)
    torch.autograd.grad(total, leaf, allow_unused=True)  # the graph is still the user's


@form(2)
def gradient(case: Case) -> None:
    leaf = case.leaf()
    ys = [t for t in leaves(case.f(*leaf)) if t.requires_grad]
    if not ys:
        return
    seeds = [weights(t, 0.1) for t in ys]
    for options in ({"allow_unused": True}, {"materialize_grads": True}):
        same_calls(
            case.tol,
            lambda options=options: wengert.grad(ys, leaf, seeds, retain_graph=True, **options),
            lambda options=options: torch.autograd.grad(ys, leaf, seeds, retain_graph=True, **options),
            f"grad {options}",
        )
    rows = [torch.autograd.grad(ys, leaf, [c * s for s in seeds], retain_graph=True, allow_unused=True) for c in (1, -2, 0)]
    want = tuple(None if row[0] is None else torch.stack(row) for row in zip(*rows))
    batch = [torch.stack([s, -2 * s, 0 * s]) for s in seeds]
    got = Outcome.of(lambda: wengert.grad(ys, leaf, batch, is_grads_batched=True, retain_graph=True, allow_unused=True))
    if got.error is None:
        case.same(got.value, want, "grad of batched cotangents")
    else:
        peer = Outcome.of(
            lambda: torch.autograd.grad(ys, leaf, batch, is_grads_batched=True, retain_graph=True, allow_unused=True)
        )
        if peer.error is None:
            raise got.error


@form(2)
def gradient_twice(case: Case) -> None:
    leaf = case.leaf()
    ys = [t for t in leaves(case.f(*leaf)) if t.requires_grad]
    if not ys:
        return
    seeds = [weights(t, 0.1) for t in ys]
    options = {"create_graph": True, "allow_unused": True}
    theirs = same_calls(
        case.tol,
        lambda: wengert.grad(ys, leaf, seeds, **options),
        lambda: torch.autograd.grad(ys, leaf, seeds, **options),
        "grad create_graph",
    )
    if theirs is None:
        return
    differentiated_again(case, wengert.grad(ys, leaf, seeds, **options), theirs, leaf, "grad create_graph")


def untold(case: Case) -> bool:
    """Whether a custom Function takes part, whose backward is not run once more to learn what PyTorch's results lead to."""
    return any(name.startswith("custom") for name in case.program.names)


def constant(result: torch.Tensor, leaf: Tensors) -> bool:
    found = torch.autograd.grad(result.sum(), leaf, retain_graph=True, allow_unused=True)
    return all(g is None or not bool(g.any()) for g in found)


def differentiated_again(case: Case, ours: Any, theirs: Any, leaf: Tensors, where: str) -> None:
    """Results taken with create_graph require grad where PyTorch's do, and have its derivatives and its None."""
    pairs = [(a, b) for a, b in zip(flat(ours), flat(theirs)) if b is not None]
    for k, (a, b) in enumerate(pairs):
        if a.requires_grad != b.requires_grad and not (b.requires_grad and untold(case) and constant(b, leaf)):
            raise Mismatch(f"{where}: requires_grad is {a.requires_grad} of part {k} for {b.requires_grad}")
    total, peer = weighted_sum([a for a, _ in pairs], 0.2), weighted_sum([b for _, b in pairs], 0.2)
    if not peer.requires_grad or (not total.requires_grad and untold(case)):
        return
    expected = Outcome.of(lambda: torch.autograd.grad(peer, leaf, retain_graph=True, allow_unused=True))
    if expected.error is not None:
        return
    case.same(torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True), expected.value, f"torch's grad of {where}")
    case.same(wengert.grad(total, leaf, retain_graph=True, allow_unused=True), expected.value, f"our grad of {where}")
    case.same(wengert.grad(peer, leaf, retain_graph=True, allow_unused=True), expected.value, f"our grad of torch's {where}")


def flat(tree: Any) -> list[torch.Tensor | None]:
    return [tree] if tree is None or isinstance(tree, torch.Tensor) else [t for part in tree for t in flat(part)]


@form(2)
def hessian(case: Case) -> None:
    theirs = case.calls("hessian", case.scalar, case.xs)
    if theirs is None or case.program.repeated:
        return
    overwritten(wengert.hessian(case.scalar, case.xs))
    leaf = case.leaf()
    value = case.scalar(*leaf)
    if value.requires_grad:
        expected = theirs if case.alike(leaf) else F.hessian(case.scalar, leaf)
        case.same(wengert.hessian(value, leaf), expected, "hessian of a computed tensor")


@form(2)
def products(case: Case) -> None:
    v = tuple(weights(x, 0.7) for x in case.xs)
    out = case.f(*case.xs)
    ct = tuple(weights(t, 0.4) for t in out) if isinstance(out, tuple) else weights(out, 0.4)
    for create_graph in (False, True):
        case.calls("vjp", case.f, case.xs, ct, create_graph=create_graph)
        case.calls("jvp", case.f, case.xs, v, create_graph=create_graph)


@form(2)
def second_products(case: Case) -> None:
    v = tuple(weights(x, 0.7) for x in case.xs)
    for create_graph in (False, True):
        vhp = case.calls("vhp", case.scalar, case.xs, v, create_graph=create_graph)
        try:
            case.calls("hvp", case.scalar, case.xs, v, create_graph=create_graph)
        except Mismatch:
            # PyTorch's hvp differentiates twice and may mask what is infinite or nan in its vhp and Hessian; those will do.
            ours = Outcome.of(lambda create_graph=create_graph: wengert.hvp(case.scalar, case.xs, v, create_graph=create_graph))
            if vhp is None or ours.error is not None or not case.tol.agrees(ours.value, vhp):
                raise


@form(2)
def jacobian_twice(case: Case) -> None:
    _twice(case, "jacobian", case.f)


@form(3)
def hessian_twice(case: Case) -> None:
    _twice(case, "hessian", case.scalar)


def _twice(case: Case, name: str, f: Callable[..., Any]) -> None:
    leaf = case.leaf()
    theirs = case.calls(name, f, leaf, create_graph=True)
    if theirs is not None:
        ours = getattr(wengert, name)(f, leaf, create_graph=True)
        differentiated_again(case, ours, theirs, leaf, f"{name} create_graph")


def _transformed(case: Case, name: str, f: Callable[..., Any], rows: Callable[[], Any]) -> None:
    """torch.func's result; where it raises or differs from its own row loop, the loop's numbers will do."""
    got = Outcome.of(lambda: getattr(wengert.func, name)(f, case.argnums)(*case.xs))
    expected = Outcome.of(rows)
    if got.error is None:
        if expected.error is None and case.tol.agrees(leaves(got.value), leaves(expected.value)):
            return
        peer = Outcome.of(lambda: getattr(torch.func, name)(f, case.argnums)(*case.xs))
        if peer.error is None and case.tol.agrees(got.value, peer.value):
            return
        if expected.error is None:
            case.same(leaves(got.value), leaves(expected.value), f"func.{name}")
        elif peer.error is None:
            case.same(got.value, peer.value, f"func.{name}")
        else:
            raise Mismatch(f"func.{name}: returned where PyTorch {peer.describe()}")
    elif Outcome.of(lambda: getattr(torch.func, name)(f, case.argnums)(*case.xs)).error is None:
        raise Mismatch(f"func.{name}: {got.describe()} where PyTorch returned") from got.error


@form(1)
def func_jacrev(case: Case) -> None:
    _transformed(case, "jacrev", case.f, lambda: case.jacobian.value)


@form(1)
def func_jacfwd(case: Case) -> None:
    _transformed(case, "jacfwd", case.f, lambda: case.jacobian.value)


@form(2)
def func_hessian(case: Case) -> None:
    _transformed(case, "hessian", case.scalar, lambda: F.hessian(case.scalar, case.xs))


@form(1)
def func_grad(case: Case) -> None:
    _transformed(case, "grad", case.scalar, lambda: F.jacobian(case.scalar, case.xs))


def _mapped(case: Case, name: str, f: Callable[..., Any], per_sample: Callable[..., Any], first_shared: bool = False) -> None:
    """A transform over a batch against a loop over its samples; PyTorch's own result will do where it differs from the loop."""
    if case.program.repeated:
        return
    in_dims: Any = 0
    # The loop's samples lie as the batch's do: which of several equal entries a kernel takes depends on strides.
    batch, samples = case.batch, [tuple(sample) for sample in zip(*case.batch)]
    if first_shared and len(batch) > 1:
        in_dims = (None,) + (0,) * (len(batch) - 1)
        batch = (case.samples[0][0], *batch[1:])
        samples = [(batch[0], *s[1:]) for s in samples]
    options = {"in_dims": in_dims, "chunk_size": 2 if case.content % 3 == 1 else None}
    got = Outcome.of(lambda: wengert.func.vmap(getattr(wengert.func, name)(f, case.argnums), **options)(*batch))
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's own kernel need not have a second derivative
        loop = Outcome.of(lambda: [torch.stack(parts) for parts in zip(*(leaves(per_sample(f, s)) for s in samples))])
    if got.error is None and loop.error is None and case.tol.agrees(leaves(got.value), loop.value):
        return
    peer = Outcome.of(lambda: torch.func.vmap(getattr(torch.func, name)(f, case.argnums), **options)(*batch))
    if got.error is not None:
        if peer.error is None:
            raise Mismatch(f"vmap({name}): {got.describe()} where PyTorch returned") from got.error
        return
    if peer.error is None and case.tol.agrees(leaves(got.value), leaves(peer.value)):
        return
    if loop.error is None:
        case.same(leaves(got.value), loop.value, f"vmap({name})")
    raise Mismatch(f"vmap({name}): returned where PyTorch {peer.describe()} and the loop {loop.describe()}")


@form(1, batched=False)
def vmap_jacrev(case: Case) -> None:
    _mapped(case, "jacrev", case.f, F.jacobian)


@form(1, batched=False)
def vmap_jacrev_of_a_shared_input(case: Case) -> None:
    _mapped(case, "jacrev", case.f, F.jacobian, first_shared=True)


@form(1, batched=False)
def vmap_jacfwd(case: Case) -> None:
    _mapped(case, "jacfwd", case.f, F.jacobian)


@form(1, batched=False)
def vmap_grad(case: Case) -> None:
    _mapped(case, "grad", case.scalar, F.jacobian)


@form(2, batched=False)
def vmap_hessian(case: Case) -> None:
    _mapped(case, "hessian", case.scalar, F.hessian)
