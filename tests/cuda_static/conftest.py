"""Compiles csrc/kernels/cuda/*.cu to PTX, once per file and session, and runs launches of their kernels on the CPU."""

from __future__ import annotations

import functools
import pathlib
import subprocess

import ptx
import pytest
from support import ptx_device
from support.toolkit import find_tool

STEMS = ("materialize", "segment_sum", "small_matmul")
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


def stem_of(launch: dict) -> str:
    return next(stem for stem in STEMS if launch["entry"].startswith(stem))


class Launches(list):
    """Plans of the static kernels' launches; `nests` has the number of launches of every nest."""

    nests: list[int]

    def stems(self) -> list[str]:
        return [stem_of(launch) for launch in self]


@pytest.fixture
def static_launches(execute):
    """The engine runs as on a GPU, every kernel executed on the CPU."""

    launches = Launches()

    def launch(plan: dict, memory) -> None:
        launches.append(plan)
        execute(stem_of(plan), plan, memory)

    ptx_device.nvrtc()
    with ptx_device.evaluating_nests(launch) as launches.nests:
        yield launches
