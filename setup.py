"""Builds wengert._C: torch.utils.cpp_extension says where torch is, a small ninja file does the rest.

The ninja file is our own because BuildExtension knows one set of flags per language, while this build needs a precompiled
header for the sources that see torch, none for those that do not, and a different instruction set per kernel file.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SUPPORTED_TORCH = ("2.13", "2.14")  # minors whose autograd node structs the readers know
TORCH_FREE = ("blocks/", "fused/", "kernels/")  # rooms that include no torch headers
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", *AVX2]
X86_64 = platform.machine().lower() in ("x86_64", "amd64")


def fail(sentence: str) -> None:
    sys.exit(f"wengert: {sentence}")


def version() -> str:
    text = (ROOT / "pyext/wengert/_version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text).group(1)


def torch_minor() -> str:
    try:
        import torch
    except ImportError:
        fail(
            "PyTorch is not installed in this environment; install torch==2.13.0 first, "
            "then run `pip install . --no-build-isolation` (or `make demo`, which does both)."
        )
    minor = ".".join(torch.__version__.split(".")[:2])
    if minor not in SUPPORTED_TORCH:
        fail(f"PyTorch {' or '.join(SUPPORTED_TORCH)} is needed to build this version, but {torch.__version__} is installed.")
    return minor


def compiler() -> str:
    cxx = os.environ.get("CXX", "c++" if shutil.which("c++") else "g++")
    if shutil.which(shlex.split(cxx)[0]) is None:
        fail(f"no C++ compiler found ({cxx} is not on the PATH); install g++ 11 or newer, or set CXX.")
    probe = [*shlex.split(cxx), "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    text = "#include <span>\n#include <concepts>\nint main() {}\n"
    if subprocess.run(probe, input=text, text=True, capture_output=True).returncode != 0:
        fail(f"the C++ compiler {cxx} does not understand C++20; install g++ 11 or newer, or set CXX.")
    return cxx


def sources() -> list[str]:
    """csrc/sources.txt, the list that CMakeLists.txt reads too, without the files of other processors."""
    lines = (line.split("#")[0].strip() for line in (CSRC / "sources.txt").read_text().splitlines())
    return [line for line in lines if line and (X86_64 or not is_simd(line))]


def is_simd(source: str) -> bool:
    return source.endswith(("_avx2.cpp", "_avx512.cpp"))


def simd_flags(source: str) -> list[str]:
    if source.endswith("_avx512.cpp"):
        return AVX512
    return AVX2 if source.endswith("_avx2.cpp") else []


def embedded_headers() -> str:
    """What fused/device_headers.cpp embeds as text; the compiler's dependency file does not know it."""
    return " ".join(escape(path) for room in ("common", "fused") for path in sorted((CSRC / room).glob("*.h")))


def quote(words: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(cxx: str, build: Path, library: str) -> str:
    """The text of build.ninja, which makes the shared object `library` in the folder `build`."""
    from torch.utils.cpp_extension import include_paths, library_paths

    base = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-sign-compare"]
    base += [f"-I{CSRC}", f"-I{CSRC}/common/compat", f"-Wa,-I{CSRC}"]  # the assembler embeds headers as text
    base += shlex.split(os.environ.get("CXXFLAGS", ""))
    torch_flags = [word for path in include_paths() for word in ("-isystem", path)]
    torch_flags += ["-isystem", sysconfig.get_path("include"), "-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    if sys.platform != "darwin":
        torch_flags.append("-fopenmp")  # without it at::parallel_for, a template of torch's headers, runs on one thread
    libraries = library_paths()
    ccache = shutil.which("ccache")
    if ccache:
        torch_flags.append("-fpch-preprocess")  # lets ccache see which precompiled header a file was compiled with
    link = ["-shared", *(f"-L{path}" for path in libraries), "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-fopenmp"]
    launcher = "env CCACHE_SLOPPINESS=pch_defines,time_macros ccache " if ccache else ""
    header = build / "torch_pch.h"
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {launcher}{cxx}",
        f"base = {quote(base)}",
        f"torch = {quote(torch_flags)}",
        f"link = {quote(link)}",
        "rule plain",
        "  description = compile $in",
        "  command = $cxx $base $simd -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule header",
        "  description = precompile the torch headers",
        "  command = $cxx $base $torch -x c++-header -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule torch",
        "  description = compile $in",
        f"  command = $cxx $base $torch -include {shlex.quote(str(header))} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  description = link $out",
        f"  command = {cxx} $in $link -o $out",
        f"build {escape(header)}.gch: header {escape(header)}",
    ]
    objects = []
    for source in sources():
        object_file = escape(build / source.replace("/", "_").replace(".cpp", ".o"))
        objects.append(object_file)
        if source.startswith(TORCH_FREE):
            text = f" | {embedded_headers()}" if source == "fused/device_headers.cpp" else ""
            lines += [f"build {object_file}: plain {escape(CSRC / source)}{text}", f"  simd = {quote(simd_flags(source))}"]
        else:
            lines.append(f"build {object_file}: torch {escape(CSRC / source)} | {escape(header)}.gch")
    lines += [f"build {escape(build / library)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class NinjaBuild(build_ext):
    """Builds below build/, whatever temporary folders pip passes in, so that the next build is incremental."""

    def build_extension(self, ext):
        import torch
        from torch.utils.cpp_extension import CUDA_HOME

        if torch.version.cuda and CUDA_HOME is None:
            print("wengert: this PyTorch has CUDA but nvcc was not found; building for the CPU only.", flush=True)
        cxx = compiler()
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        write_if_changed(build / "torch_pch.h", (CSRC / "common/torch_pch.h").read_text())
        write_if_changed(build / "build.ninja", ninja_file(cxx, build, target.name))
        jobs = os.environ.get("MAX_JOBS", "2")  # a translation unit with torch headers takes about 1.5 GiB
        self.run_ninja(["-C", str(build), "-j", jobs])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / target.name, target)
        write_if_changed(target.parent / "_build_info.py", build_info(torch_minor()))

    def run_ninja(self, arguments):
        ninja = shutil.which("ninja", path=os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", ""))
        if ninja is None:
            fail("ninja is not installed; run `pip install ninja`.")
        if subprocess.run([ninja, *arguments]).returncode != 0:
            fail("compiling the extension failed; the compiler's messages stand above.")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        write_if_changed(ROOT / "pyext/wengert/_build_info.py", build_info(torch_minor()))


def build_info(minor: str) -> str:
    return f'"""Written by setup.py: what this copy of wengert was built for."""\n\nTORCH_MINOR = "{minor}"\n'


def main() -> None:
    # Asking for metadata alone (sdist, egg_info in an isolated environment) must not need torch.
    builds = not {"sdist", "egg_info", "clean", "--version", "--name"} & set(sys.argv[1:])
    if not builds:
        setup(version=version(), install_requires=["torch"])
        return
    minor = torch_minor()
    from torch.utils.cpp_extension import CppExtension

    setup(
        version=version(),
        install_requires=[f"torch=={minor}.*"],
        ext_modules=[CppExtension("wengert._C", [f"csrc/{source}" for source in sources()])],
        cmdclass={"build_ext": NinjaBuild},
    )


main()
