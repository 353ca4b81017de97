"""Programs of hundreds of instructions and operands, for their CUDA kernels."""

from __future__ import annotations

import random

import torch

OPERATIONS = {"sin": 1, "cos": 1, "tanh": 1, "neg": 1, "mul": 2, "sub": 2, "maximum": 2, "where": 3}


class Writer:
    """A program's text, line by line."""

    def __init__(self, compute: str = "f64"):
        self.compute, self.lines = compute, []

    def apply(self, prim: str, *arguments: str) -> str:
        self.lines.append(f"t{len(self.lines)} = {prim} {' '.join(arguments)}")
        return f"t{len(self.lines) - 1}"

    def text(self, operands: int, outputs, rank: int = 1) -> str:
        head = f"fused v1 rank={rank} operands={operands} compute={self.compute}"
        return "\n".join([head, *self.lines, *(f"out {output}" for output in outputs)]) + "\n"


def values(count: int, shape=(5,), dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def agree_relatively(mine: torch.Tensor, twin: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Of results that may be tiny, as long products are: their own size is the measure, and none may vanish."""
    size = twin.abs().max().item()
    assert 0 < size < float("inf")
    torch.testing.assert_close(mine, twin, rtol=tolerance, atol=tolerance * size)


def product_of_sines(length: int, compute: str = "f64", rank: int = 1) -> str:
    """The product of sines, each times a number of its own."""
    program = Writer(compute)
    value = program.apply("sin", "a0")
    for k in range(1, length):
        value = program.apply("mul", value, program.apply("add", program.apply("sin", f"a{k}"), "0.5"))
    return program.text(length, [f"{value} {compute}"], rank)


def random_program(seed: int) -> tuple[str, list[torch.Tensor]]:
    """Steps that mostly repeat: some differ in an operation, some of their values are read at the end."""
    rng, program = random.Random(seed), Writer()
    states, body, steps, stride = rng.randint(1, 3), rng.randint(1, 6), rng.randint(30, 60), rng.randint(1, 3)
    first = [program.apply("sin", f"a{k}") for k in range(states)]
    kinds = ["load", "fixed", "constant", "state", "first", "local", "local"]
    picks = [[(rng.choice(kinds), rng.randint(0, 5)) for _ in range(3)] for _ in range(body)]
    prims = [rng.choice(list(OPERATIONS)) for _ in range(body)]
    odd = {rng.randrange(steps) for _ in range(rng.choice([0, 0, 1, 3]))}
    late = {rng.randrange(steps) for _ in range(rng.choice([0, 0, 1]))}
    state, held = first, []
    for k in range(steps):
        local = [program.apply("tanh", state[0])]
        for prim, chosen in zip(prims, picks):
            arguments = [
                {
                    "load": f"a{states + stride * k + index % stride}",
                    "fixed": f"a{index % states}",
                    "constant": str(0.25 * (index + 1)),
                    "state": state[index % states],
                    "first": first[index % states],
                    "local": local[-1 - index % len(local)],
                }[kind]
                for kind, index in chosen[: OPERATIONS[prim]]
            ]
            local.append(program.apply("cos" if OPERATIONS[prim] == 1 and k in odd else prim, *arguments))
        # Every value of the step reaches the next one.
        total = local[0]
        for value in local[1:]:
            total = program.apply("sub", value, program.apply("mul", "0.5", total))
        state = [program.apply("sin", total), *state[:-1]]
        if k in late:
            held.append(total)
    return program.text(states + stride * steps, [f"{value} f64" for value in [state[0], *held]]), values(states + stride * steps)
