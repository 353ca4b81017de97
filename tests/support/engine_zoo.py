"""What the engine is run on with CUDA kernels: the end-to-end zoo and the benchmark's problems, by name."""

import importlib

import pytest
import torch
from problems import LIBRARY

from support.check import check_against_torch
from support.zoo import Source

MODULES = ("architectures", "dynamics", "energies", "linalg", "modules", "semantics", "structure")
CASES = {
    f"{name}-{case.name}": case
    for name in MODULES
    for zoo in [getattr(importlib.import_module(f"end_to_end.test_{name}"), "zoo", ())]
    for case in zoo
}
PROBLEMS = [name for name, problem in LIBRARY.items() if problem.small is not None]


def check_case(name, mode):
    if mode not in CASES[name].modes:
        pytest.skip("torch itself does not serve this mode")
    CASES[name].check(mode)


def check_problem(name):
    problem, source = LIBRARY[name], Source(torch.float64)
    fn, x = problem.build(source, source.positive, problem.small)
    check_against_torch(fn, x, modes=("jacobian",))
