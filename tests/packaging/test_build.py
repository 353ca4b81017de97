"""One source list, one version string, flags by file name, and sentences instead of tracebacks."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import wengert

ROOT = pathlib.Path(__file__).resolve().parents[2]


def functions_of(setup):
    """The functions of a setup.py, without running it."""
    text = setup.read_text()
    assert text.endswith("\nmain()\n")
    names = {"__file__": str(setup), "__name__": "setup"}
    exec(compile(text.removesuffix("main()\n"), "setup.py", "exec"), names)
    return names


@pytest.fixture(scope="module")
def build():
    return functions_of(ROOT / "setup.py")


def run(*command, cwd, **env):
    environment = {**os.environ, **env}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build reads, with a source list of its own."""
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pyext/wengert").mkdir(parents=True)
    shutil.copy(ROOT / "pyext/wengert/_version.py", tmp_path / "pyext/wengert")
    (tmp_path / "csrc/common").mkdir(parents=True)
    (tmp_path / "csrc/common/torch_pch.h").write_text("")
    return tmp_path


@pytest.fixture
def gpu(build):
    """A toolkit that need not exist."""
    return build["Cuda"]("/toolkit/nvcc", ["/toolkit/include"], "/toolkit/libcudart.so", ["-gencode=arch=compute_80,code=sm_80"])


def test_the_list_names_exactly_the_sources_that_exist(build):
    on_disk = {str(p.relative_to(ROOT / "csrc")) for kind in ("cpp", "cu") for p in (ROOT / "csrc").rglob(f"*.{kind}")}
    listed = build["sources"](True)
    assert len(listed) == len(set(listed))
    assert set(listed) == {name for name in on_disk if build["X86_64"] or not build["is_simd"](name)}


def test_a_build_for_the_cpu_has_no_cuda_code(build):
    """Neither files nor flags; and what it does compile does not ask whether there is CUDA."""
    everything, without = build["sources"](True), build["sources"](False)
    assert set(everything) - set(without) == {name for name in everything if build["is_cuda"](name)} != set()
    text = build["ninja_file"]("c++", pathlib.Path("/out"), "_C.so", None)
    assert "nvcc" not in text and "cudart" not in text and "c10_cuda" not in text
    pending, seen = list(without), set()
    while pending:  # the sources and all headers that they reach
        name = pending.pop()
        if name in seen or not (ROOT / "csrc" / name).exists():
            continue
        seen.add(name)
        code = (ROOT / "csrc" / name).read_text()
        pending += re.findall(r'#include "([^"]+)"', code)
        assert not re.search(r"#include [<\"](cuda|c10/cuda|ATen/cuda|nvtx)", code), name
        # __CUDACC__ tells device from host compilation in the headers that kernels share.
        assert not re.search(r"#\s*if.*(USE|WITH|HAVE)_CUDA", code), name
    assert "ops/fused.h" in seen


def test_setup_compiles_what_the_list_says(build, gpu, tmp_path):
    def rule(source):
        return "nvcc" if source.endswith(".cu") else "plain" if source.startswith(build["TORCH_FREE"]) else "torch"

    for toolkit in (None, gpu):
        text = build["ninja_file"]("c++", tmp_path, "_C.so", toolkit)
        compiled = re.findall(r"^build \S+\.o: (\w+) (\S+)", text, re.MULTILINE)
        assert compiled == [(rule(s), str(ROOT / "csrc" / s)) for s in build["sources"](toolkit is not None)]


def test_only_cuda_files_see_the_toolkit(checkout, gpu):
    (checkout / "csrc/sources.txt").write_text("ops/a.cpp\nops/a_cuda.cpp\nkernels/cuda/b_cuda.cpp\nkernels/cuda/b.cu\n")
    text = functions_of(checkout / "setup.py")["ninja_file"]("c++", checkout, "_C.so", gpu)
    rows = dict(re.findall(r"^build \S+\.o: \w+ \S+/csrc/(\S+).*\n((?:  .*\n)*)", text, re.MULTILINE))
    assert rows == {
        "ops/a.cpp": "",
        "ops/a_cuda.cpp": "  more = -isystem /toolkit/include\n",
        "kernels/cuda/b_cuda.cpp": "  more = -isystem /toolkit/include\n",
        "kernels/cuda/b.cu": "",
    }
    (nvcc,) = re.findall(r"command = .*/toolkit/nvcc (.*)", text)
    assert gpu.archs[0] in nvcc and "torch" not in nvcc and "fast" not in nvcc
    assert re.search(r"^link = .* -lc10_cuda -ltorch_cuda .*/toolkit/libcudart\.so$", text, re.MULTILINE)


def test_architectures(build, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80\necho compute_90\n")
    nvcc.chmod(0o755)

    def flags(asked):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        return [flag.removeprefix("-gencode=arch=") for flag in build["arch_flags"](str(nvcc))]

    both = ["compute_90,code=sm_90", "compute_90,code=compute_90"]
    assert flags("") == ["compute_80,code=sm_80", *both]  # of the defaults, those this nvcc knows
    assert flags("9.0+PTX") == both
    assert flags("8.6;10.0a") == ["compute_86,code=sm_86", "compute_100a,code=sm_100a"]
    assert flags("8.6 9.0") == ["compute_86,code=sm_86", "compute_90,code=sm_90"]
    with pytest.raises(SystemExit, match="'Hopper'; it must be a list such as"):
        flags("Hopper")


@pytest.mark.parametrize(
    ("cuda_version", "value", "sentence"),
    [("'13.0'", "1", "nvcc was not found"), ("None", "1", "has no CUDA"), ("None", "yes", "WENGERT_CUDA is yes; it must be 0")],
)
def test_cuda_that_cannot_be_built_is_one_sentence(checkout, tmp_path, cuda_version, value, sentence):
    (checkout / "csrc/sources.txt").write_text("")
    path = without_torch(
        tmp_path,
        f"""
        from types import SimpleNamespace
        __version__ = "{torch.__version__}"
        version = SimpleNamespace(cuda={cuda_version})
        """,
    )
    code = (
        "text = open('setup.py').read().removesuffix('main()\\n')\n"
        "exec(text, names := {'__file__': 'setup.py'})\n"
        "names['find_nvcc'] = lambda: None\n"
        "print(names['cuda']())"
    )
    done = run(sys.executable, "-c", code, cwd=checkout, WENGERT_CUDA=value, PYTHONPATH=path)
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr
    for quiet in ("0", ""):
        done = run(sys.executable, "-c", code, cwd=checkout, WENGERT_CUDA=quiet, PYTHONPATH=path)
        assert done.returncode == 0 and done.stdout == "None\n", done.stderr


NVCC_SAYS = "Cuda compilation tools, release {}, V{}.88"


@pytest.mark.parametrize(
    ("release", "torch_cuda", "problem"),
    [
        ("13.0", "13.0", None),
        ("13.2", "13.0", None),
        ("12.8", "13.0", "is of CUDA 12.8 and PyTorch was built with CUDA 13.0"),
        ("13.0", "12.6", "is of CUDA 13.0 and PyTorch was built with CUDA 12.6"),
        ("1.3", "13.0", "is of CUDA 1.3"),
        ("?", "13.0", "does not say its version"),
    ],
)
def test_a_toolkit_of_another_major_version_is_refused_in_one_sentence(
    build, monkeypatch, tmp_path, capsys, release, torch_cuda, problem
):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{NVCC_SAYS.format(release, release)}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setitem(build, "find_nvcc", lambda: str(nvcc))
    monkeypatch.setitem(build, "toolkit", lambda nvcc: "a toolkit")
    monkeypatch.setenv("WENGERT_CUDA", "")
    assert build["cuda"]() == (None if problem else "a toolkit")
    said = capsys.readouterr().err
    assert said.count("\n") == bool(problem) and (problem or "") in said
    monkeypatch.setenv("WENGERT_CUDA", "1")
    if problem is None:
        assert build["cuda"]() == "a toolkit"
    else:
        with pytest.raises(SystemExit, match=re.escape(problem)):
            build["cuda"]()


def test_the_compiler_of_kernels_is_of_pytorchs_major_version(tmp_path, monkeypatch):
    from wengert import _native

    files = ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12", "cu9/lib/libnvrtc.alt.so.9", "cu9/lib/libnvrtc.so.9")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    assert _native.find_nvrtc(12) == str(tmp_path / "cuda_nvrtc/lib/libnvrtc.so.12")
    assert _native.find_nvrtc(13) == _native.find_nvrtc() == str(tmp_path / "cu13/lib/libnvrtc.so.13")
    assert _native.find_nvrtc(9) == str(tmp_path / "cu9/lib/libnvrtc.so.9")
    assert _native.find_nvrtc(14) is None
    spec.submodule_search_locations = None
    assert _native.find_nvrtc() is None


def test_cmake_and_setup_read_the_same_list(checkout):
    """Both builds, pointed at another list, follow it."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    csrc = checkout / "csrc"
    (csrc / "sources.txt").write_text(
        "# a comment\nbind/one.cpp\n\nkernels/two.cpp  # another\nkernels/three_avx2.cpp\n"
        "ops/four_cuda.cpp\nkernels/cuda/five_cuda.cpp\nkernels/cuda/six.cu\n"
    )
    names = functions_of(checkout / "setup.py")
    for name in names["sources"](True):
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text("")
    gpu = names["cuda"]()
    ours = set(names["sources"](gpu is not None))
    assert ours >= {"bind/one.cpp", "kernels/two.cpp"}
    assert ("kernels/cuda/six.cu" in ours) == ("ops/four_cuda.cpp" in ours) == (gpu is not None)
    done = run("cmake", "-B", checkout / "out", f"-DPython_EXECUTABLE={sys.executable}", cwd=checkout)
    assert done.returncode == 0, done.stderr
    commands = (checkout / "out/compile_commands.json").read_text()
    theirs = set(re.findall(r'"file": "[^"]*/csrc/([^"]+\.(?:cpp|cu))"', commands))
    assert theirs == ours
    if names["X86_64"]:
        assert re.search(r"-mavx2[^\n]*three_avx2\.cpp", commands) and not re.search(r"-mavx2[^\n]*two\.cpp", commands)
    if gpu:
        for name in ("four_cuda", "five_cuda"):
            assert re.search(rf"{gpu.includes[0]}[^\n]*{name}\.cpp", commands)
        assert not re.search(rf"{gpu.includes[0]}[^\n]*two\.cpp", commands)
        assert re.search(rf"{gpu.archs[0]}[^\n]*six\.cu", commands)


def test_kernels_get_their_instruction_set_and_only_they(build):
    flags = build["simd_flags"]
    assert flags("kernels/cpu/x.cpp") == []
    assert flags("kernels/cpu/x_avx2.cpp") == ["-mavx2", "-mfma", "-mf16c"]
    assert "-mavx512bw" in flags("kernels/cpu/x_avx512.cpp")
    assert build["is_simd"]("a_avx512.cpp") and not build["is_simd"]("avx512.cpp")


def test_other_processors_leave_the_simd_files_out(build):
    names = functions_of(ROOT / "setup.py")
    names["X86_64"] = False
    assert names["sources"](True) == [name for name in build["sources"](True) if not name.endswith(("_avx2.cpp", "_avx512.cpp"))]


def test_rooms_without_torch_headers_include_none(build):
    for room in build["TORCH_FREE"]:
        for path in (ROOT / "csrc" / room).rglob("*.[ch]*"):  # .cu among them: nvcc then takes seconds
            assert not re.search(r'#include [<"](torch|ATen|c10)/', path.read_text()), path


def test_one_version(build):
    assert wengert.__version__ == build["version"]()
    assert wengert.__version__ not in (ROOT / "pyproject.toml").read_text().replace("requires-python", "")
    assert wengert.__version__ not in (ROOT / "CMakeLists.txt").read_text()


def without_torch(tmp_path, text):
    """Runs setup.py with a torch of our making first on the path."""
    package = tmp_path / "fake/torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(text))
    return str(tmp_path / "fake")


@pytest.mark.parametrize(
    ("torch_text", "sentence"),
    [
        ("raise ImportError('no torch')", "PyTorch is not installed"),
        ("__version__ = '1.13.1'", "is needed to build this version, but 1.13.1 is installed"),
    ],
)
def test_a_missing_or_wrong_torch_is_one_sentence(checkout, tmp_path, torch_text, sentence):
    (checkout / "csrc/sources.txt").write_text("")
    done = run(sys.executable, "setup.py", "build_ext", cwd=checkout, PYTHONPATH=without_torch(tmp_path, torch_text))
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("cxx", "sentence"), [("no-such-compiler", "no C++ compiler found"), ("false", "does not understand C++20")]
)
def test_a_missing_or_old_compiler_is_one_sentence(checkout, cxx, sentence):
    (checkout / "csrc/sources.txt").write_text("")
    done = run(sys.executable, "setup.py", "build_ext", cwd=checkout, CXX=cxx)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "darwin", reason="the C++ library is the system's")
@pytest.mark.parametrize(("answer", "flags"), [("libstdc++.so", ["-l:libstdc++.so.6"]), ("/usr/lib/libstdc++.so", [])])
def test_a_compiler_with_a_static_library_links_pytorchs(build, tmp_path, answer, flags):
    """Two C++ libraries in one process crash in the first message that holds a number."""
    compiler = tmp_path / "a compiler"
    compiler.write_text(f"#!/bin/sh\necho {answer}\n")
    compiler.chmod(0o755)
    cxx = f"'{compiler}' -pipe"
    assert build["runtime_library"](cxx) == flags
    (link,) = re.findall(r"^link = (.*)", build["ninja_file"](cxx, tmp_path, "_C.so", None), re.MULTILINE)
    assert [word for word in link.split() if "stdc++" in word] == flags


def test_metadata_of_a_source_distribution_needs_no_torch(checkout, tmp_path):
    path = without_torch(tmp_path, "raise ImportError('no torch')")
    done = run(sys.executable, "setup.py", "--version", cwd=checkout, PYTHONPATH=path)
    assert done.stdout.strip().endswith(wengert.__version__), done.stderr


def test_another_torch_is_refused_at_import():
    from wengert._native import check_torch

    check_torch("2.13", "2.13.4+cu130")
    with pytest.raises(ImportError, match=r"was built for PyTorch 2\.13 but 2\.14\.1 is installed"):
        check_torch("2.13", "2.14.1")
    minor = ".".join(torch.__version__.split(".")[:2])
    if not os.environ.get("WENGERT_DISABLE"):
        assert runpy.run_path(str(pathlib.Path(wengert.__file__).parent / "_build_info.py"))["TORCH_MINOR"] == minor


def test_typed_package():
    assert (pathlib.Path(wengert.__file__).parent / "py.typed").exists()


def test_import_is_light():
    """No import of torch's compiler, which takes a second, and no change of torch's functions."""
    code = (
        "import sys, torch; names = ('jacobian', 'hessian', 'vjp', 'jvp', 'vhp', 'hvp');"
        "before = [getattr(torch.autograd.functional, n) for n in names] + [torch.func.jacrev, torch.vmap, torch.autograd.grad];"
        "import wengert;"
        "after = [getattr(torch.autograd.functional, n) for n in names] + [torch.func.jacrev, torch.vmap, torch.autograd.grad];"
        "assert all(a is b for a, b in zip(before, after));"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_a_sanitized_build_watches_a_part_and_takes_the_rest_from_the_normal_one(build, monkeypatch, kind):
    normal = build["ninja_file"]("c++", pathlib.Path("/out/normal"), "_C.so", None)
    assert "sanitize" not in normal
    monkeypatch.setenv("WENGERT_SANITIZE", kind)
    text = build["ninja_file"]("c++", pathlib.Path(f"/out/normal-{kind}"), "_C.so", None)
    link = re.search(r"^build \S+: link (.*)$", text, re.MULTILINE).group(1).split()
    own = [name for name in link if name.startswith(f"/out/normal-{kind}/")]
    assert len(link) == len(build["sources"](False)) and 0 < len(own) < len(link)
    assert all(f"build {name}: " in text for name in own) and not any(f"build {name}: " in text for name in set(link) - set(own))
    assert {name for name in link if name not in own} <= set(normal.split())
    assert f"-fsanitize={kind}" in re.search(r"^base = .*$", text, re.MULTILINE).group()
    assert f"-fsanitize={kind}" in re.search(r"^link = .*$", text, re.MULTILINE).group()
    monkeypatch.setenv("WENGERT_SANITIZE", "memory")
    with pytest.raises(SystemExit, match="must be address"):
        build["sanitizer"]()
