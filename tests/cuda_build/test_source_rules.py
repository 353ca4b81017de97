"""Rules of the CUDA sources that a compiler does not know: nothing waits for the GPU, and every launch is checked."""

import pathlib
import re

import pytest

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"

HOT = sorted(
    {
        *(path for path in (CSRC / "kernels/cuda").glob("*.*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"}),
        *(CSRC / "ops").glob("*_cuda.cpp"),
        *(CSRC / "accumulate").glob("*.*"),
    }
)
WAITS = [
    r"cuda(Device|Stream|Event)Synchronize",
    r"\bsynchronize\(",
    r"\.item\s*(<\w+>)?\(",
    r"_local_scalar_dense|is_nonzero\(|equal\(at::",
    r"cudaMem(cpy|set)(2D|3D)?\s*\(",  # the forms without Async
    r"cuda(Malloc|Free|HostAlloc|MallocHost|FreeHost|MallocManaged)\s*\(",
    r"\.(cpu|to)\((at::kCPU|\))",
]


def code(path):
    """The file without comments and texts."""
    return re.sub(r"//[^\n]*|\"(\\.|[^\"\\\n])*\"", "", path.read_text())


def waits(text):
    return [found.group(0) for rule in WAITS for found in re.finditer(rule, text)]


def test_the_rule_finds_what_it_looks_for():
    assert {path.name for path in HOT} >= {"launcher_cuda.cpp", "fused_cuda.cpp", "execute.cpp"}
    for bad in ("cudaDeviceSynchronize();", "cudaMemcpy(a, b, n, kind);", "x.item<double>()", "cudaMalloc(&p, n)", "t.cpu()"):
        assert waits(bad), bad
    assert not waits("cudaMemcpyAsync(a, b, n, kind, stream); cudaMemsetAsync(p, 0, n, stream);")


@pytest.mark.parametrize("path", HOT, ids=lambda path: str(path.relative_to(CSRC)))
def test_hot_paths_never_wait(path):
    assert waits(code(path)) == []


@pytest.mark.parametrize("path", sorted((CSRC / "ops").glob("*_cuda.cpp")), ids=lambda path: path.name)
def test_every_launch_is_checked(path):
    """The launch itself and what is pending after it."""
    text = code(path)
    launches = [found.end() for found in re.finditer(r"\blaunch(_\w+)?\(", text)]
    assert launches
    for end in launches:
        line = text[text.rfind("\n", 0, end) : end]
        assert re.match(r"\s*check\(", line), line  # PyTorch's work where the device is well, else C10_CUDA_CHECK
        assert re.match(r"[^;]*;\s*C10_CUDA_KERNEL_LAUNCH_CHECK\(\);", text[end:]), line


@pytest.mark.parametrize("path", sorted((CSRC / "ops").glob("*_cuda.cpp")), ids=lambda path: path.name)
def test_launchers_guard_their_device_and_use_the_current_stream(path):
    text = code(path)
    assert re.search(r"CUDAGuard \w+\(", text) and "getCurrentCUDAStream(" in text


@pytest.mark.parametrize(
    "path", sorted(p for p in CSRC.rglob("*") if p.suffix in {".cu", ".cuh"}), ids=lambda path: str(path.relative_to(CSRC))
)
def test_device_files_include_no_torch(path):
    assert not re.search(r"#include [<\"](torch|ATen|c10|pybind11)/", path.read_text())
