"""What holds for every file of kernels that nvcc compiles."""

import pathlib
import re

import ptx
import pytest

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


def test_every_file_is_tested():
    assert FILES == sorted(path.stem for path in (CSRC / "kernels/cuda").glob("*.cu"))


def test_headers_are_light():
    """Files that nvcc compiles include no torch headers, and nothing waits for the device."""
    for path in (CSRC / "kernels/cuda").glob("*.cu*"):
        text = path.read_text()
        assert not re.search(r"#include <(torch|ATen|c10|pybind11)", text)
        assert not re.search(r"cuda(Device|Stream|Event)Synchronize|cudaMemcpy\b|cudaMalloc\b", text)
