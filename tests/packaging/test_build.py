"""One source list, one version string, flags by file name, and sentences instead of tracebacks."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import textwrap

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


def test_the_list_names_exactly_the_sources_that_exist(build):
    on_disk = {str(p.relative_to(ROOT / "csrc")) for p in (ROOT / "csrc").rglob("*.cpp")}
    listed = build["sources"]()
    assert len(listed) == len(set(listed))
    assert set(listed) == {name for name in on_disk if build["X86_64"] or not build["is_simd"](name)}


def test_setup_compiles_what_the_list_says(build, tmp_path):
    text = build["ninja_file"]("c++", tmp_path, "_C.so")
    compiled = re.findall(r"^build \S+\.o: (\w+) (\S+)", text, re.MULTILINE)
    expected = [("plain" if s.startswith(build["TORCH_FREE"]) else "torch", str(ROOT / "csrc" / s)) for s in build["sources"]()]
    assert compiled == expected


def test_cmake_and_setup_read_the_same_list(checkout):
    """Both builds, pointed at another list, follow it."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    csrc = checkout / "csrc"
    (csrc / "sources.txt").write_text("# a comment\nbind/one.cpp\n\nkernels/two.cpp  # another\nkernels/three_avx2.cpp\n")
    for name in ("bind/one.cpp", "kernels/two.cpp", "kernels/three_avx2.cpp"):
        (csrc / name).parent.mkdir(exist_ok=True)
        (csrc / name).write_text("")
    names = functions_of(checkout / "setup.py")
    ours = set(names["sources"]())
    assert ours >= {"bind/one.cpp", "kernels/two.cpp"}
    done = run("cmake", "-B", checkout / "out", f"-DPython_EXECUTABLE={sys.executable}", cwd=checkout)
    assert done.returncode == 0, done.stderr
    commands = (checkout / "out/compile_commands.json").read_text()
    theirs = set(re.findall(r'"file": "[^"]*/csrc/([^"]+\.cpp)"', commands))
    assert theirs == ours
    if names["X86_64"]:
        assert re.search(r"-mavx2[^\n]*three_avx2\.cpp", commands) and not re.search(r"-mavx2[^\n]*two\.cpp", commands)


def test_kernels_get_their_instruction_set_and_only_they(build):
    flags = build["simd_flags"]
    assert flags("kernels/cpu/x.cpp") == []
    assert flags("kernels/cpu/x_avx2.cpp") == ["-mavx2", "-mfma", "-mf16c"]
    assert "-mavx512bw" in flags("kernels/cpu/x_avx512.cpp")
    assert build["is_simd"]("a_avx512.cpp") and not build["is_simd"]("avx512.cpp")


def test_other_processors_leave_the_simd_files_out(build):
    names = functions_of(ROOT / "setup.py")
    names["X86_64"] = False
    assert names["sources"]() == [name for name in build["sources"]() if not name.endswith(("_avx2.cpp", "_avx512.cpp"))]


def test_rooms_without_torch_headers_include_none(build):
    for room in build["TORCH_FREE"]:
        for path in (ROOT / "csrc" / room).rglob("*.[ch]*"):
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
