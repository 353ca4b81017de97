"""What holds for every file of kernels that nvcc compiles."""

import pathlib
import re
import subprocess

import ptx
import pytest
from support.toolkit import find_tool

CSRC = pathlib.Path(__file__).parents[2] / "csrc"
FILES = ["materialize", "segment_sum", "small_matmul"]


@pytest.mark.parametrize("stem", FILES)
def test_kernels_and_names_agree(ptx_of, stem):
    """The launcher finds each kernel of the file by the name that plans use, and the executor runs all of their instructions."""
    source = (CSRC / f"kernels/cuda/{stem}.cu").read_text()
    planner = (CSRC / f"kernels/cuda/{stem}.cpp").read_text()
    entries = set(ptx.entries(ptx_of(stem)))
    assert entries == set(re.findall(r"WENGERT_NAMED\((\w+)\)", source)) == set(re.findall(rf'"({stem}_\w+)"', planner))
    assert not [reason for entry in entries for reason in ptx.unsupported(ptx_of(stem), entry)]


@pytest.mark.parametrize("stem", FILES)
def test_no_kernel_uses_local_memory(ptx_of, stem):
    assert ".local" not in ptx_of(stem)


@pytest.mark.parametrize("stem", FILES)
def test_registers_and_spills(ptx_of, tmp_path, stem):
    """ptxas for an H100: nothing spills, and registers leave room for the blocks that hide the latency of memory."""
    most = {"materialize": 40, "materialize_wide": 64, "segment_sum": 40, "small_matmul": 48}
    (tmp_path / "kernel.ptx").write_text(ptx_of(stem))
    command = [find_tool("ptxas"), "-v", "-arch=sm_90", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    kernels = re.findall(
        r"entry function '(\w+)'"
        r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert {name for name, *_ in kernels} == set(ptx.entries(ptx_of(stem)))
    for name, *stack, registers in kernels:
        assert stack == ["0"] * 3, name
        assert int(registers) <= most[stem + "_wide" * name.endswith("_wide")], name


def test_every_file_is_tested():
    assert FILES == sorted(path.stem for path in (CSRC / "kernels/cuda").glob("*.cu"))


def test_headers_are_light():
    """Files that nvcc compiles include no torch headers, and nothing waits for the device."""
    for path in (CSRC / "kernels/cuda").glob("*.cu*"):
        text = path.read_text()
        assert not re.search(r"#include <(torch|ATen|c10|pybind11)", text)
        assert not re.search(r"cuda(Device|Stream|Event)Synchronize|cudaMemcpy\b|cudaMalloc\b", text)
