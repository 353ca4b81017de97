"""The rows of the benchmark: which problem, at which size, in which form, against which peers, with which floor.

A form is how a person would ask for the derivative:

    functional   wengert.jacobian(f, x) / wengert.hessian(f, x)
    graph        wengert.jacobian(y, x) on tensors already computed (the graph is built beforehand on both sides)
    vmap         wengert.func.vmap(wengert.func.jacrev(f))(x)
    batch        wengert.batch_jacobian(f, x)
    grad         forward and wengert.grad
    persample    wengert.func.vmap(wengert.func.grad(loss), (None, 0, 0))

Peers marked as counted decide the ratio (the fastest of them does); the others are shown for orientation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import wengert
from problems import LIBRARY
from torch.autograd import functional as torch_functional

Call = Callable[[], Any]
DENSE_LIMIT = 60_000_000  # entries; a peer that must build more is left out
ROW_LIMIT = 20_000  # passes a Python row loop may take


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. `read` adds a pass over the whole result to both sides (zeros may be lazy memory)."""

    problem: str
    size: Any
    form: str
    floor: float | None = None
    read: bool = False

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.size)) if isinstance(self.size, tuple) else str(self.size)
        return f"{self.problem}_{size}/{self.form}{'+read' if self.read else ''}"


ROWS = [
    Row("two_variables", 2, "graph", 6),
    Row("two_variables", 2, "functional", 4),
    Row("notebook_10x2", 10, "functional", 5),
    Row("notebook_10x2", 10, "graph"),
    Row("linear_ab", 1000, "functional", 10),
    Row("linear_ab", 1000, "graph"),
    Row("linear_xab", 1000, "functional", 6),
    Row("pointwise", 1000, "functional", 6),
    Row("pointwise", 4000, "functional", 20),
    Row("pointwise", 4000, "functional", read=True),
    Row("rosenbrock", 10, "functional", 3),
    Row("rosenbrock", 100, "functional", 4),
    Row("rosenbrock", 1000, "functional", 10),
    Row("rosenbrock", 100, "graph"),
    Row("lorenz96", 1000, "functional", 8),
    Row("heat2d", 34, "functional", 8),
    Row("softmax_ce", (50, 20), "functional", 5),
    Row("logistic", (1000, 50), "functional"),
    Row("cartpole", 1, "vmap", 2.5),
    Row("cartpole", 1000, "vmap", 3),
    Row("cartpole", 100000, "vmap", 4),
    Row("cartpole", 1, "batch", 4.5),
    Row("cartpole", 1000, "batch", 5),
    Row("cartpole", 100000, "batch", 4),
    Row("pendulum", 1000, "vmap"),
    Row("pendulum", 1000, "batch"),
    Row("bottleneck", (64, 256), "vmap"),
    Row("bottleneck", (64, 256), "batch"),
    Row("mlp", 1000, "vmap", 1.3),
    Row("mlp", 1000, "batch", 1.3),
    Row("mlp", 10000, "vmap", 1.15),
    Row("mlp", 10000, "batch", 1.15),
    Row("mlp_deep", 1000, "batch", 1.3),
    Row("mlp_deep", 10000, "batch", 1.15),
    Row("chain", 1000, "grad"),
    Row("chain", 1000000, "grad", 1.2),
    Row("chain", 10000000, "grad", 1.5),
    Row("persample_mlp", 1000, "persample", 1.5),
]


class Numbers:
    """Seeded float32 numbers, as torch tensors on a device or as arrays of another namespace."""

    def __init__(self, convert: Callable[[np.ndarray], Any]) -> None:
        self._random = np.random.RandomState(0)
        self._convert = convert
        self.bytes = 0  # of all the numbers drawn: a problem's inputs, data and weights

    def randn(self, *shape: int) -> Any:
        return self._draw(self._random.randn(*shape))

    def positive(self, *shape: int) -> Any:
        return self._draw(self._random.rand(*shape) + 0.5)

    def _draw(self, values: np.ndarray) -> Any:
        drawn = np.ascontiguousarray(values, dtype="float32")
        self.bytes += drawn.nbytes
        return self._convert(drawn)


@dataclasses.dataclass
class Peer:
    name: str
    call: Call
    counted: bool = True
    compiles: bool = False  # in its first call


def compiled_peer(name: str, call: Callable[..., Any], *arguments: Any, convert: Callable[[Any], Any] = lambda r: r) -> Peer:
    """torch.compile of a peer's function, for orientation."""
    fast = torch.compile(call)
    return Peer(f"compiled {name}", lambda: convert(fast(*arguments)), counted=False, compiles=True)


@dataclasses.dataclass
class Prepared:
    """Everything a row needs to be timed; `ours` and the peers return comparable nested tensors.

    `input_bytes` is what any method must read; None where that cannot be said from outside.
    """

    ours: Call
    peers: list[Peer]
    input_bytes: int | None = None
    reads_result: bool = False


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def prepare(row: Row, device: torch.device, *, compiled: bool = False) -> Prepared:
    if compiled:
        torch.compiler.reset()  # all rows compile the same wrapper, which PyTorch stops doing after a few times
    problem = LIBRARY[row.problem]
    numbers = Numbers(lambda a: torch.from_numpy(a).to(device))
    f, x = problem.build(numbers.randn, numbers.positive, row.size)
    prepared = _PREPARE[row.form](problem.kind, f, x, compiled)
    if (other := jax_peer(row, device)) is not None:
        prepared.peers.append(other)
    if row.form != "graph":  # which starts from whatever the graph saved
        prepared.input_bytes = numbers.bytes
    if row.read:
        prepared.ours = reading(prepared.ours)
        prepared.peers = [dataclasses.replace(p, call=reading(p.call)) for p in prepared.peers]
        prepared.reads_result = True
    return prepared


def reading(call: Call) -> Call:
    def read() -> Any:
        result = call()
        return result, sum(t.sum() for t in as_tuple(result))

    return read


def _functional(kind: str, f: Any, x: Any, compiled: bool) -> Prepared:
    where = tuple(range(len(x))) if isinstance(x, tuple) else 0
    name = "hessian" if kind == "hess" else "jacobian"
    theirs = getattr(torch_functional, name)
    peers = [
        Peer("functional loop", lambda: theirs(f, x)),
        Peer("functional vectorised", lambda: theirs(f, x, vectorize=True)),
    ]
    transforms = ("hessian",) if kind == "hess" else ("jacrev", "jacfwd")
    for transform in transforms:
        run = getattr(torch.func, transform)(f, where)
        peers.append(Peer(f"func.{transform}", lambda run=run: run(*as_tuple(x))))
        if compiled:
            peers.append(compiled_peer(f"func.{transform}", run, *as_tuple(x)))
    ours = getattr(wengert, name)
    return Prepared(lambda: ours(f, x), peers)


def _graph(kind: str, f: Any, x: Any, compiled: bool) -> Prepared:
    """Both sides start from the same ready tensors; for a Hessian from the ready gradient."""
    xs = tuple(t.requires_grad_() for t in as_tuple(x))
    y = f(*xs)
    if kind == "hess":
        (y,) = torch.autograd.grad(y, xs, create_graph=True)
    inputs = xs if isinstance(x, tuple) else xs[0]
    flat = y.reshape(-1)
    eye = torch.eye(flat.numel(), device=flat.device)

    def shaped(rows: Any) -> Any:
        blocks = tuple(r.reshape(y.shape + t.shape) for r, t in zip(rows, xs))
        return blocks if isinstance(x, tuple) else blocks[0]

    def loop() -> Any:
        rows = [torch.autograd.grad(v, xs, retain_graph=True) for v in flat.unbind(0)]
        return shaped([torch.stack([r[k] for r in rows]) for k in range(len(xs))])

    def batched() -> Any:
        return shaped(torch.autograd.grad(flat, xs, eye, retain_graph=True, is_grads_batched=True))

    peers = [Peer("stack of row gradients", loop), Peer("is_grads_batched", batched)]
    try:
        from torch._vmap_internals import _vmap
    except ImportError:
        return Prepared(lambda: wengert.jacobian(y, inputs), peers)

    def vmapped() -> Any:
        return shaped(_vmap(lambda v: torch.autograd.grad(flat, xs, v, retain_graph=True))(eye))

    peers.append(Peer("_vmap of row gradients", vmapped))
    return Prepared(lambda: wengert.jacobian(y, inputs), peers)


def batched_peers(f: Any, single: Any, x: torch.Tensor, compiled: bool) -> list[Peer]:
    """Per-sample Jacobians in torch of f, which is `single` on each of a batch.

    The dense functional forms compute all pairs of samples and keep the diagonal.
    """
    peers = []
    for transform in ("jacrev", "jacfwd"):
        run = torch.func.vmap(getattr(torch.func, transform)(single))
        peers.append(Peer(f"vmap(func.{transform})", lambda run=run: run(x)))
        if compiled:
            peers.append(compiled_peer(f"vmap(func.{transform})", run, x))
    out = f(x)
    if out.numel() * x.numel() <= DENSE_LIMIT and out.numel() <= ROW_LIMIT:
        batch = x.shape[0]

        def own(dense: torch.Tensor) -> torch.Tensor:
            return dense.diagonal(dim1=0, dim2=out.dim()).movedim(-1, 0).reshape(batch, *out.shape[1:], *x.shape[1:])

        peers.append(Peer("functional loop", lambda: own(torch_functional.jacobian(f, x))))
        peers.append(Peer("functional vectorised", lambda: own(torch_functional.jacobian(f, x, vectorize=True))))
    summed = lambda z: f(z).sum(0)
    peers.append(
        Peer("functional of the batch sum", lambda: torch_functional.jacobian(summed, x).movedim(-x.dim(), 0), counted=False)
    )
    return peers


def _vmap(kind: str, f: Any, x: Any, compiled: bool) -> Prepared:
    run = wengert.func.vmap(wengert.func.jacrev(f))
    return Prepared(lambda: run(x), batched_peers(f, f, x, compiled))


def _batch(kind: str, f: Any, x: Any, compiled: bool) -> Prepared:
    return Prepared(lambda: wengert.batch_jacobian(f, x), batched_peers(f, f, x, compiled))


def _grad(kind: str, f: Any, x: Any, compiled: bool) -> Prepared:
    """Forward by torch on both sides (wengert records nothing of its own), then the gradient."""
    x = x.requires_grad_()
    func_grad = torch.func.grad(lambda z: f(z).sum())
    peers = [
        Peer("autograd.grad", lambda: torch.autograd.grad(f(x).sum(), x)[0]),
        Peer("func.grad", lambda: func_grad(x.detach())),
    ]
    if compiled:
        peers.append(compiled_peer("func.grad", func_grad, x.detach()))
    return Prepared(lambda: wengert.grad(f(x).sum(), x)[0], peers)


def _persample(kind: str, loss: Any, x: Any, compiled: bool) -> Prepared:
    params, inputs, targets = x
    ours = wengert.func.vmap(wengert.func.grad(loss), (None, 0, 0))
    theirs = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    values = lambda gradients: tuple(gradients.values())
    peers = [Peer("vmap(func.grad)", lambda: values(theirs(params, inputs, targets)))]
    if compiled:
        peers.append(compiled_peer("vmap(func.grad)", theirs, params, inputs, targets, convert=values))
    return Prepared(lambda: values(ours(params, inputs, targets)), peers)


_PREPARE: dict[str, Callable[[str, Any, Any, bool], Prepared]] = {
    "functional": _functional,
    "graph": _graph,
    "vmap": _vmap,
    "batch": _batch,
    "grad": _grad,
    "persample": _persample,
}


def jax_peer(row: Row, device: torch.device) -> Peer | None:
    """jax.jit of jax's own transform, for orientation, where jax is installed for the same kind of device."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    if (jax.default_backend() == "gpu") != (device.type == "cuda"):
        return None
    problem = LIBRARY[row.problem]
    numbers = Numbers(jnp.asarray)
    f, x = problem.build(numbers.randn, numbers.positive, row.size, jnp)
    where = tuple(range(len(x))) if isinstance(x, tuple) else 0
    if row.form in ("functional", "graph"):
        run = jax.jit((jax.hessian if problem.kind == "hess" else jax.jacrev)(f, where))
        arguments = as_tuple(x)
    elif row.form in ("vmap", "batch"):
        run, arguments = jax.jit(jax.vmap(jax.jacrev(f))), (x,)
    elif row.form == "grad":
        run, arguments = jax.jit(jax.grad(lambda z: f(z).sum())), (x,)
    else:
        run, arguments = jax.jit(jax.vmap(jax.grad(f), (None, 0, 0))), x

    def call() -> Any:
        result = jax.block_until_ready(run(*arguments))
        return tuple(result[k] for k in x[0]) if row.form == "persample" else result

    return Peer("jax.jit", call, counted=False, compiles=True)


def selected(only: str | None) -> list[Row]:
    """Rows whose name contains one of the parts; raises ValueError for a part that no name contains."""
    if only is None:
        return ROWS
    wanted = [part.strip() for part in only.split(",")]
    for part in wanted:
        if not part or not any(part in row.name for row in ROWS):
            raise ValueError(f"no row's name contains {part!r}; --list shows the names")
    return [row for row in ROWS if any(part in row.name for part in wanted)]
