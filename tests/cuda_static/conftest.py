"""Compiles csrc/kernels/cuda/*.cu to PTX, once per file and session, and runs launches of their kernels on the CPU."""

from __future__ import annotations

import functools
import pathlib
import subprocess

import ptx
import pytest
from support.toolkit import find_tool

CSRC = pathlib.Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="session")
def ptx_of(tmp_path_factory):
    """The PTX of a file, by its stem, for the oldest architecture that is built for."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("ptx")

    @functools.cache
    def compile(stem: str) -> str:
        target, source = folder / f"{stem}.ptx", CSRC / f"kernels/cuda/{stem}.cu"
        subprocess.run([nvcc, "-std=c++17", "-ptx", "-arch=compute_80", f"-I{CSRC}", source, "-o", target], check=True)
        return target.read_text()

    return compile


@pytest.fixture(scope="session")
def execute(ptx_of):
    """Runs a launch of a file's kernel; `memory` is all that it may touch."""

    def run(stem: str, launch: dict, memory, order: int = 0, seed: int = 0) -> None:
        assert launch is not None, "the kernel does not take this case"
        if launch["grid"][0] == 0:
            return
        ptx.run(
            ptx_of(stem),
            launch["entry"],
            [launch["parameters"]],
            launch["grid"],
            launch["block"],
            shared_bytes=launch["shared_bytes"],
            memory=memory,
            order=order,
            seed=seed,
        )

    return run
