"""What ptxas makes of the kernels, on each architecture: registers, spills, shared memory, and 128-bit accesses in machine code.

With 32 registers a thread a multiprocessor runs as many threads as it can hold, 2048; with 64 half of them.  Bounds are close to
what is used: a change that needs fewer registers moves them.
"""

import os
import pathlib
import random
import re
import subprocess

import pytest
from support import ptx_device
from wengert import _C

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
STATIC_SOURCES = sorted((CSRC / "kernels/cuda").glob("*.cu"))
ARCHS = (80, 90)
BASE = 1 << 32  # an address aligned to everything
SLACK = 8  # registers, between architectures and patch releases of the compiler


def contiguous(extents):
    strides = [1]
    for extent in reversed(extents[1:]):
        strides.insert(0, strides[0] * extent)
    return strides


def nest(body, extents, operands, outputs):
    """Text and views of a program: `operands` are types or (type, strides), `outputs` lines without their `out`."""
    compute = "f64" if any("f64" in line for line in outputs) else "f32"
    text = f"fused v1 rank={len(extents)} operands={len(operands)} compute={compute}\n{body}"
    text += "".join(f"out {line}\n" for line in outputs)
    views = [given if isinstance(given, tuple) else (given, contiguous(extents)) for given in operands]
    operands = [(BASE + (k << 32), dtype, strides) for k, (dtype, strides) in enumerate(views)]
    targets = []
    for k, line in enumerate(outputs):
        _, dtype, *rest = line.split()
        summed = [int(axis) for axis in rest[0].removeprefix("sum=").split(",")] if rest else []
        kept = [1 if axis in summed else extent for axis, extent in enumerate(extents)]
        targets.append((BASE + (64 + k << 32), dtype, contiguous(kept), False))
    return _C.cuda.plan(text, extents, operands, targets)


CHAIN = "t0 = sin a0\nt1 = mul t0 a1\nt2 = tanh t1\nt3 = mul t2 a2\n"
LENGTH = 300


def product(functions):
    """Of the functions, one after the other, of as many operands."""
    steps = (f"t{k} = {functions(k)} a{(k + 1) // 2}\nt{k + 1} = mul t{k - 1} t{k}\n" for k in range(1, 2 * LENGTH - 1, 2))
    return f"t0 = cos a0\n{''.join(steps)}"


def chain(functions):
    return nest(product(functions), [1 << 20], ["f32"] * LENGTH, [f"t{2 * LENGTH - 2} f32"])


MIXED = random.Random(0).choices(["cos", "tanh", "exp", "sigmoid", "digamma"], k=2 * LENGTH)
SIDES = [4096, 4096]
# name: (plan, registers of each launch at most, whether memory is accessed 128 bits at a time)
CASES = {
    "vectors f32": (lambda: nest("t0 = square a0\n", [1 << 20], ["f32"], ["t0 f32"]), [22], True),
    "vectors f64": (lambda: nest("t0 = square a0\n", [1 << 20], ["f64"], ["t0 f64"]), [22], True),
    "vectors bf16": (lambda: nest("t0 = square a0\n", [1 << 20], ["bf16"], ["t0 bf16"]), [22], True),
    "a chain of four": (lambda: nest(CHAIN, SIDES, ["f32"] * 3, ["t3 f32", "t1 f32"]), [32], True),
    "a chain of 300 alike": (lambda: chain(lambda k: "cos"), [36], True),
    "a chain of 300 others": (lambda: chain(lambda k: MIXED[k]), [44], False),
    "a transposed operand": (lambda: nest("t0 = mul a0 a1\n", SIDES, ["f32", ("f32", [1, 4096])], ["t0 f32"]), [32], False),
    "sum of rows": (lambda: nest("t0 = square a0\n", SIDES, ["f32"], ["t0 f32 sum=1"]), [32], True),
    "sum of columns": (lambda: nest("t0 = square a0\n", SIDES, ["f32"], ["t0 f32 sum=0"]), [32, 26], False),
    "sum of everything": (lambda: nest("t0 = square a0\n", SIDES, ["f32"], ["t0 f32 sum=0,1"]), [40, 30], True),
}


def resources(report):
    """Per kernel of a `ptxas -v` report: registers, bytes spilled, bytes of static shared memory."""
    found = {}
    for block in re.split(r"Compiling entry function '", report)[1:]:
        name = block.split("'")[0]
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", block)))
        shared = re.search(r"(\d+) bytes smem", block)
        found[name] = (int(re.search(r"Used (\d+) registers", block)[1]), spilled, int(shared[1]) if shared else 0)
    return found


def ptxas(tool, path, arch, output):
    done = subprocess.run([tool("ptxas"), "-v", f"-arch=sm_{arch}", path, "-o", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return resources(done.stderr)


@pytest.fixture(scope="module")
def nvrtc(cuda_build):
    return ptx_device.nvrtc()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_generated_kernels(name, arch, nvrtc, tool, tmp_path):
    make, bounds, vectors = CASES[name]
    launches = make()["launches"]
    used = []
    for k, launch in enumerate(launches):
        (tmp_path / f"{k}.ptx").write_bytes(_C.cuda.compile(launch["source"], arch, "ptx"))
        ((registers, spilled, shared),) = ptxas(tool, tmp_path / f"{k}.ptx", arch, tmp_path / f"{k}.cubin").values()
        assert spilled == 0 and shared <= 16 * 1024, launch["source"]
        used.append(registers)
    assert len(used) == len(bounds) and all(most - SLACK <= n <= most for n, most in zip(used, bounds)), used
    if vectors:
        (tmp_path / "first.cubin").write_bytes(_C.cuda.compile(launches[0]["source"], arch, "cubin"))
        code = subprocess.run([tool("cuobjdump"), "-sass", tmp_path / "first.cubin"], capture_output=True, text=True).stdout
        assert re.search(r"LDG\.E\.(\w+\.)*128", code), code
        if "sum" not in name:
            assert re.search(r"STG\.E\.(\w+\.)*128", code), code


def test_the_linked_kernels_of_every_architecture(tool):
    """All static kernels are linked for the same architectures, and on none of them a thread needs memory of its own."""
    dump = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", _C.__file__], capture_output=True, text=True).stdout
    archs, stacks = {}, {}
    for arch, text in re.findall(r"arch = (sm_\w+)\n(.*?)(?=\nFatbin|\Z)", dump, re.DOTALL):
        for kernel, stack in re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+)", text):
            archs.setdefault(kernel, set()).add(arch)
            if int(stack):
                stacks[kernel, arch] = int(stack)
    expected = {name for path in STATIC_SOURCES for name in re.findall(r"WENGERT_NAMED\((\w+)\)", path.read_text())}
    assert set(archs) == expected
    assert len({frozenset(found) for found in archs.values()}) == 1
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert archs[min(archs)] >= {"sm_80", "sm_90"}
    assert stacks == {}
