"""The demo: four everyday derivative computations on real data, by PyTorch and by wengert, side by side.

    make demo        (or: python examples/quickstart.py [--output demo.png])

(a) the per-row Jacobian of a linear model on 1,000 rows, (b) logistic regression fitted by Newton's method with
standard errors from the inverse Hessian, (c) a Laplace approximation of a small MLP from its batched Jacobian,
(d) the dense Jacobian of a pointwise function of 4,000 numbers. Prints a table and writes a picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import wengert
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_diabetes

INK, OURS, THEIRS, SOFT = "#22333b", "#2a6f97", "#e07a5f", "#d8e2dc"


@dataclasses.dataclass
class Measured:
    """One line of the table: medians in seconds, and the largest difference relative to the largest entry."""

    task: str
    peer: str
    torch_seconds: float
    seconds: float
    difference: float

    @property
    def ratio(self) -> float:
        return self.torch_seconds / self.seconds


def leaves(tree: Any) -> list[torch.Tensor]:
    return [tree] if isinstance(tree, torch.Tensor) else [t for part in tree for t in leaves(part)]


def seconds_of(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compare(task: str, peers: dict[str, Callable[[], Any]], ours: Callable[[], Any], rounds: int = 7) -> Measured:
    """Agreement with every way PyTorch offers first, then interleaved runs against the fastest of them; medians."""
    gap = 0.0
    for theirs in peers.values():
        for a, b in zip(leaves(ours()), leaves(theirs())):
            gap = max(gap, float((a - b).abs().max()) / max(1.0, float(b.abs().max())))
    peer = min(peers, key=lambda name: seconds_of(peers[name]))
    pairs = [(seconds_of(peers[peer]), seconds_of(ours)) for _ in range(rounds)]
    theirs_seconds, seconds = (statistics.median(column) for column in zip(*pairs))
    return Measured(task, peer, theirs_seconds, seconds, gap)


def functional_peers(name: str, *arguments: Any) -> dict[str, Callable[[], Any]]:
    """Both ways of torch.autograd.functional, and torch.func's."""
    call = getattr(torch.autograd.functional, name)
    function, inputs = arguments
    where = tuple(range(len(inputs))) if isinstance(inputs, tuple) else 0
    transform = getattr(torch.func, transform_name(name))(function, where)
    unpacked = inputs if isinstance(inputs, tuple) else (inputs,)
    return {
        f"functional.{name}": lambda: call(function, inputs),
        f"functional.{name}, vectorised": lambda: call(function, inputs, vectorize=True),
        f"func.{transform_name(name)}": lambda: transform(*unpacked),
    }


def transform_name(name: str) -> str:
    return "hessian" if name == "hessian" else "jacrev"


def standardised(x: np.ndarray) -> torch.Tensor:
    return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)


def linear_model() -> list[Measured]:
    """(a) d(a*x + b) / d(a, b) for 1,000 rows of one measurement of the breast cancer data, drawn with replacement."""
    values = standardised(load_breast_cancer().data)[:, 0]
    rows = values[torch.randint(0, len(values), (1000,), generator=torch.Generator().manual_seed(0))].reshape(-1, 1)
    a, b = torch.tensor([1.5]), torch.tensor([-0.3])

    def model(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * rows + b

    task = "(a) linear model, 1,000 rows: Jacobian in a, b"
    return [compare(task, functional_peers("jacobian", model, (a, b)), lambda: wengert.jacobian(model, (a, b)))]


def logistic_regression() -> tuple[list[Measured], dict[str, Any]]:
    """(b) breast cancer: Newton steps on the ridge-penalised negative log likelihood, then standard errors."""
    data = load_breast_cancer()
    columns = [0, 1, 4, 5, 8, 9, 21, 24, 27, 28]
    x = standardised(data.data[:, columns]).double()
    x = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], 1)
    sign = torch.tensor(2.0 * data.target - 1.0, dtype=x.dtype)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(-(x @ w) * sign).sum() + 0.5 * (w * w).sum()

    def newton(hessian: Callable[..., torch.Tensor], grad: Callable[..., Any]) -> torch.Tensor:
        w = torch.zeros(x.shape[1], dtype=x.dtype)
        for _ in range(8):
            w = w.requires_grad_()
            (g,) = grad(loss(w), w)
            w = w.detach()
            w = w - torch.linalg.solve(hessian(loss, w), g)
        return w

    w = newton(wengert.hessian, wengert.grad)
    errors = torch.linalg.inv(wengert.hessian(loss, w)).diagonal().sqrt()
    measured = [
        compare(
            "(b) logistic regression: 8 Newton steps",
            {
                "functional.hessian": lambda: newton(torch.autograd.functional.hessian, torch.autograd.grad),
                "func.hessian": lambda: newton(lambda f, w: torch.func.hessian(f)(w), torch.autograd.grad),
            },
            lambda: newton(wengert.hessian, wengert.grad),
        ),
        compare(
            "(b) logistic regression: Hessian at the fit",
            functional_peers("hessian", loss, w),
            lambda: wengert.hessian(loss, w),
            15,
        ),
    ]
    accuracy = float(((x @ w).sign() == sign).double().mean())
    names = ["intercept", *(data.feature_names[c] for c in columns)]
    return measured, {"names": names, "weights": w.numpy(), "errors": errors.numpy(), "accuracy": accuracy}


def laplace_approximation() -> tuple[list[Measured], dict[str, Any]]:
    """(c) diabetes: a one-hidden-layer net of one feature; its predictive band from J of every sample in the parameters."""
    data = load_diabetes()
    order = np.argsort(data.data[:, 2])
    x = standardised(data.data[:, 2:3])[order]
    y = standardised(data.target[:, None])[order]
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1))
    optimiser = torch.optim.Adam(net.parameters(), 2e-2)
    for _ in range(300):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimiser.step()
    params = {k: p.detach() for k, p in net.named_parameters()}

    def per_sample(lib: Any) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        def one(p: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
            return lib.functional_call(net, p, (sample[None],))[0, 0]

        run = lib.vmap(lib.grad(one), (None, 0))
        return lambda samples: run(params, samples)

    ours, theirs = per_sample(wengert.func), per_sample(torch.func)

    def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([g.flatten(1) for g in gradients.values()], 1)

    with torch.no_grad():
        noise = float((net(x) - y).var())
        grid = torch.linspace(float(x.min()) - 0.8, float(x.max()) + 0.8, 200)[:, None]
        jac = flat(ours(x)).double()
        precision = jac.t() @ jac / noise + torch.eye(jac.shape[1], dtype=jac.dtype)
        on_grid = flat(ours(grid)).double()
        variance = (on_grid * torch.linalg.solve(precision, on_grid.t()).t()).sum(1)
        mean = net(grid)[:, 0]
    net_in = lambda z: net(z)
    measured = [
        compare(
            f"(c) Laplace: {len(x)} samples, {jac.shape[1]} parameters",
            {"vmap(func.grad)": lambda: flat(theirs(x))},
            lambda: flat(ours(x)),
            15,
        ),
        compare(
            f"(c) Laplace: {len(x)} samples, inputs",
            {
                "vmap(func.jacrev)": lambda: torch.func.vmap(torch.func.jacrev(net_in))(x).detach(),
                "vmap(func.jacfwd)": lambda: torch.func.vmap(torch.func.jacfwd(net_in))(x).detach(),
            },
            lambda: wengert.batch_jacobian(net_in, x).detach(),
            15,
        ),
    ]
    band = {"model": variance.sqrt().numpy(), "total": (variance + noise).sqrt().numpy()}
    return measured, {"x": x, "y": y, "grid": grid[:, 0].numpy(), "mean": mean.numpy(), "band": band}


def pointwise() -> list[Measured]:
    """(d) a pointwise function of 4,000 numbers: the Jacobian is a diagonal, and only its fill is quadratic."""
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0)) + 0.5
    f = lambda x: torch.sin(x) ** 2 / x * x**x
    task = "(d) pointwise sin(x)^2 / x * x^x, N = 4,000"
    return [compare(task, functional_peers("jacobian", f, x), lambda: wengert.jacobian(f, x), 3)]


def human(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def show(measured: list[Measured]) -> None:
    table = Table(title=f"wengert {wengert.__version__} against PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    table.add_column("task")
    table.add_column("fastest PyTorch")
    for name in ("PyTorch", "wengert", "ratio", "largest difference"):
        table.add_column(name, justify="right")
    for m in measured:
        colour = "green" if m.ratio >= 1 else "red"
        cells = [human(m.torch_seconds), human(m.seconds), f"[{colour}]{m.ratio:.1f}x[/]", f"{m.difference:.0e}"]
        table.add_row(m.task, m.peer, *cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def draw(measured: list[Measured], logistic: dict[str, Any], laplace: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK})
    figure = plt.figure(figsize=(12.5, 7.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1.0, 1.15])
    _draw_times(figure.add_subplot(grid[0, :]), measured)
    _draw_weights(figure.add_subplot(grid[1, 0]), logistic)
    _draw_band(figure.add_subplot(grid[1, 1]), laplace)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _draw_times(axes: Any, measured: list[Measured]) -> None:
    at = np.arange(len(measured))[::-1]
    axes.barh(at + 0.19, [m.torch_seconds * 1e3 for m in measured], 0.36, color=THEIRS, label="PyTorch")
    axes.barh(at - 0.19, [m.seconds * 1e3 for m in measured], 0.36, color=OURS, label="wengert")
    axes.set_xscale("log")
    shortest, longest = (pick(s * 1e3 for m in measured for s in (m.torch_seconds, m.seconds)) for pick in (min, max))
    axes.set_xlim(shortest / 2, longest * 3)
    for k, m in zip(at, measured):
        axes.text(max(m.torch_seconds, m.seconds) * 1.12e3, k, f"{m.ratio:.1f}x", va="center", fontweight="bold")
    axes.set_yticks(at, [m.task for m in measured])
    axes.set_xlabel("median time, ms (log scale)")
    axes.set_title("Same derivatives, same numbers", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)


def _draw_weights(axes: Any, fit: dict[str, Any]) -> None:
    at = np.arange(len(fit["names"]))[::-1]
    axes.axvline(0, color=SOFT, linewidth=2, zorder=0)
    axes.errorbar(fit["weights"], at, xerr=1.96 * fit["errors"], fmt="o", color=OURS, ecolor=OURS, capsize=2.5, markersize=4)
    axes.set_yticks(at, fit["names"])
    axes.set_xlabel("weight and 95 % interval, from the inverse Hessian")
    title = f"Breast cancer: logistic regression ({100 * fit['accuracy']:.1f} % right)"
    axes.set_title(title, loc="left", fontweight="bold")


def _draw_band(axes: Any, fit: dict[str, Any]) -> None:
    axes.scatter(fit["x"], fit["y"], s=7, color=INK, alpha=0.28, linewidth=0, label="patients")
    for name, shade, label in (("total", 0.16, "with noise"), ("model", 0.42, "of the model")):
        low, high = fit["mean"] - 2 * fit["band"][name], fit["mean"] + 2 * fit["band"][name]
        axes.fill_between(fit["grid"], low, high, color=OURS, alpha=shade, linewidth=0, label=f"two deviations {label}")
    axes.plot(fit["grid"], fit["mean"], color=OURS, linewidth=1.8, label="net")
    axes.set(xlabel="body mass index (standardised)", ylabel="disease progression (standardised)")
    axes.set_title("Diabetes: Laplace approximation", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="demo.png", help="where to write the picture")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(2)
    on_logistic, logistic = logistic_regression()
    on_laplace, laplace = laplace_approximation()
    measured = [*linear_model(), *on_logistic, *on_laplace, *pointwise()]
    show(measured)
    draw(measured, logistic, laplace, arguments.output)
    print(f"wrote {arguments.output}")
    if worst := [m for m in measured if not m.difference < 1e-3]:
        raise SystemExit(f"wengert and PyTorch disagree: {', '.join(m.task for m in worst)}")


if __name__ == "__main__":
    main()
