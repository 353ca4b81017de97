"""Builds wengert._C: torch.utils.cpp_extension says where torch is, a small ninja file does the rest.

The ninja file is our own because BuildExtension knows one set of flags per language, while this build needs a precompiled
header for the sources that see torch, none for those that do not, and a different instruction set per kernel file.

CUDA is built in where this PyTorch has CUDA and nvcc is found.  WENGERT_CUDA=0 leaves it out, WENGERT_CUDA=1 insists on it.
WENGERT_SANITIZE=address or thread builds with that sanitizer, in a build folder of its own (`make asan`, `make tsan`), what
writes memory and what threads share; the rest comes from the normal build, which has to be there.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SUPPORTED_TORCH = ("2.11", "2.13", "2.14")  # minors whose autograd node structs the readers know
TORCH_FREE = ("blocks/", "fused/", "kernels/")  # rooms that include no torch headers
SANITIZED = {  # what a sanitizer watches, by the beginnings of paths; the rest of its library comes from the normal build
    "address": ("accumulate/execute", "accumulate/st", "accumulate/window", "blocks/", "fused/", "kernels/", "ops/"),
    "thread": ("accumulate/", "blocks/", "fused/", "kernels/", "ops/", "tape/ca", "tape/custom", "tape/pass", "tape/table"),
}
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", *AVX2]
CUDA_ARCHS = ("8.0", "9.0", "10.0", "12.0")  # as far as nvcc knows them; TORCH_CUDA_ARCH_LIST says otherwise
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


def runtime_library(cxx: str) -> list[str]:
    """Link flags for the C++ library that PyTorch loads, where the compiler brings only a static one.

    A second copy inside the extension shares some of the symbols of the first and not others: printing a number crashes.
    """
    if sys.platform == "darwin":
        return []
    command = [*shlex.split(cxx), "-print-file-name=libstdc++.so"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ["-l:libstdc++.so.6"] if found == "libstdc++.so" else []


def sanitizer() -> str:
    wanted = os.environ.get("WENGERT_SANITIZE", "")
    if wanted not in ("", *SANITIZED):
        fail(f"WENGERT_SANITIZE is {wanted}; it must be address, thread or unset.")
    return wanted


def optimisation(sanitize: str) -> list[str]:
    """Half the optimisation keeps a sanitizer's build short, line tables make its reports readable."""
    return ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}"] if sanitize else ["-O2"]


@dataclass
class Cuda:
    """What compiling and linking CUDA code takes."""

    nvcc: str
    includes: list[str]  # folders of headers
    runtime: str  # the shared library that the extension links
    archs: list[str]  # flags that say which machine code to make


def cuda() -> Cuda | None:
    """The toolkit, or None where the extension is built for the CPU only."""
    import torch

    wanted = os.environ.get("WENGERT_CUDA", "")
    if wanted not in ("", "0", "1"):
        fail(f"WENGERT_CUDA is {wanted}; it must be 0 (without CUDA), 1 (with CUDA) or unset (with CUDA where it can be built).")
    if wanted == "0":
        return None
    if torch.version.cuda is None:
        if wanted == "1":
            fail(f"WENGERT_CUDA=1, but the PyTorch that is installed ({torch.__version__}) has no CUDA; install one that has.")
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted == "1":
            fail("WENGERT_CUDA=1, but nvcc was not found; install the CUDA toolkit and set CUDA_HOME, or put nvcc on the PATH.")
        print("wengert: this PyTorch has CUDA but nvcc was not found; building for the CPU only.", file=sys.stderr)
        return None
    mismatch = version_mismatch(nvcc, torch.version.cuda)
    if mismatch:
        if wanted == "1":
            fail(f"WENGERT_CUDA=1, but {mismatch}; set CUDA_HOME to a toolkit of PyTorch's version.")
        print(f"wengert: {mismatch}; building for the CPU only.", file=sys.stderr)
        return None
    return toolkit(nvcc)


def version_mismatch(nvcc: str, torch_cuda: str) -> str | None:
    """What is wrong with the toolkit's version: code of one major version cannot rely on the runtime of another."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        return f"{nvcc} does not say its version"
    if release.group(1) == torch_cuda.split(".")[0]:
        return None
    return f"{nvcc} is of CUDA {release.group(1)}.{release.group(2)} and PyTorch was built with CUDA {torch_cuda}"


def find_nvcc() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def toolkit(nvcc: str) -> Cuda:
    """Asks nvcc itself where its toolkit is: the nvcc that was found may be a link or a script."""
    import torch

    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    found = {}
    for name, flag in (("INCLUDES", "-I"), ("LIBRARIES", "-L")):
        line = re.search(rf"^#\$ {name}=(.*)$", dry.stdout + dry.stderr, re.MULTILINE)
        found[flag] = [word.removeprefix(flag) for word in shlex.split(line.group(1))] if line else []
    includes, libraries = found["-I"], found["-L"]
    # The toolkit may lack the math libraries' headers; PyTorch's own dependencies bring them, and the runtime that PyTorch loads.
    packages = Path(torch.__file__).parents[1] / "nvidia"
    includes += [str(folder) for folder in sorted(packages.glob("*/include"))]
    libraries = [*(str(folder) for folder in sorted(packages.glob("*/lib"))), *libraries]
    runtimes = [path for folder in libraries for path in sorted(Path(folder).glob("libcudart.so*"))]
    if not runtimes:
        fail(f"no libcudart.so was found, neither beside {nvcc} nor in PyTorch's packages; the CUDA toolkit is incomplete.")
    return Cuda(nvcc, includes, str(runtimes[0]), arch_flags(nvcc))


def arch_flags(nvcc: str) -> list[str]:
    asked = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked == [""]:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        asked = [arch for arch in CUDA_ARCHS if f"compute_{arch.replace('.', '')}" in known]
        asked[-1:] = [f"{arch}+PTX" for arch in asked[-1:]]
    flags = []
    for arch in asked:
        parsed = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if parsed is None:
            fail(f"TORCH_CUDA_ARCH_LIST has {arch!r}; it must be a list such as '8.0;9.0+PTX'.")
        number = parsed.group(1) + parsed.group(2)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if parsed.group(3):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def sources(with_cuda: bool) -> list[str]:
    """csrc/sources.txt, the list that CMakeLists.txt reads too, without the files of other processors."""
    lines = (line.split("#")[0].strip() for line in (CSRC / "sources.txt").read_text().splitlines())
    return [line for line in lines if line and (X86_64 or not is_simd(line)) and (with_cuda or not is_cuda(line))]


def is_cuda(source: str) -> bool:
    return source.endswith((".cu", "_cuda.cpp"))


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


def ninja_file(cxx: str, build: Path, library: str, gpu: Cuda | None) -> str:
    """The text of build.ninja, which makes the shared object `library` in the folder `build`; `gpu`: with CUDA."""
    from torch.utils.cpp_extension import include_paths, library_paths

    sanitize = sanitizer()
    base = ["-std=c++20", *optimisation(sanitize), "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-sign-compare"]
    base += [f"-I{CSRC}", f"-I{CSRC}/common/compat", f"-Wa,-I{CSRC}"]  # the assembler embeds headers as text
    base += shlex.split(os.environ.get("CXXFLAGS", ""))
    torch_flags = [word for path in include_paths() for word in ("-isystem", path)]
    torch_flags += ["-isystem", sysconfig.get_path("include"), "-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    if sys.platform != "darwin":
        torch_flags.append("-fopenmp")  # without it at::parallel_for, a template of torch's headers, runs on one thread
    ccache = shutil.which("ccache")
    if ccache:
        torch_flags.append("-fpch-preprocess")  # lets ccache see which precompiled header a file was compiled with
    link = ["-shared", *(f"-L{path}" for path in library_paths()), *(f"-l{name}" for name in torch_libraries(gpu))]
    link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-fopenmp"]
    if sanitize:
        link.append(f"-fsanitize={sanitize}")
    link += runtime_library(cxx)
    if gpu:
        link.append(gpu.runtime)
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
        "  command = $cxx $base $more -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule header",
        "  description = precompile the torch headers",
        "  command = $cxx $base $torch -x c++-header -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule torch",
        "  description = compile $in",
        f"  command = $cxx $base $torch -include {shlex.quote(str(header))} $more -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  description = link $out",
        f"  command = {cxx} $in $link -o $out",
        f"build {escape(header)}.gch: header {escape(header)}",
    ]
    if gpu:
        device = ["-std=c++17", "-O3", f"-I{CSRC}", "-ccbin", *shlex.split(cxx)[:1], "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        lines += [
            "rule nvcc",
            "  description = compile $in",
            f"  command = {launcher}{shlex.quote(gpu.nvcc)} {quote(device + gpu.archs)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    objects, unwatched = [], []
    for source in sources(gpu is not None):
        rule = "nvcc" if source.endswith(".cu") else "plain" if source.startswith(TORCH_FREE) else "torch"
        needs = f" | {escape(header)}.gch" if rule == "torch" else ""
        if source == "fused/device_headers.cpp":
            needs = f" | {embedded_headers()}"
        more = simd_flags(source)
        if source.endswith("_cuda.cpp"):
            more = [word for folder in gpu.includes for word in ("-isystem", folder)]
        name = source.replace("/", "_").removesuffix(".cpp") + ".o"
        if sanitize and not source.startswith(SANITIZED[sanitize]):
            unwatched.append(escape(build.with_name(build.name.removesuffix(f"-{sanitize}")) / name))
            continue
        objects.append(escape(build / name))
        lines.append(f"build {objects[-1]}: {rule} {escape(CSRC / source)}{needs}")
        lines += [f"  more = {quote(more)}"] if more else []
    # Of what headers define the linker takes the first copy: one that counts references unseen would hide who let go of what.
    lines += [f"build {escape(build / library)}: link {' '.join(objects + unwatched)}", ""]
    return "\n".join(lines)


def torch_libraries(gpu: Cuda | None) -> list[str]:
    return ["c10", "torch_cpu", "torch", "torch_python", *(["c10_cuda", "torch_cuda"] if gpu else [])]


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class NinjaBuild(build_ext):
    """Builds below build/, whatever temporary folders pip passes in, so that the next build is incremental."""

    def build_extension(self, ext):
        import torch

        cxx = compiler()
        gpu = cuda()
        kind = "".join(f"-{word}" for word in [f"torch{torch.__version__}", sanitizer()] if word)
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}{kind}"
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        write_if_changed(build / "torch_pch.h", (CSRC / "common/torch_pch.h").read_text())
        write_if_changed(build / "build.ninja", ninja_file(cxx, build, target.name, gpu))
        jobs = os.environ.get("MAX_JOBS", "2")  # a translation unit with torch headers takes about 1.5 GiB
        self.run_ninja(["-C", str(build), "-j", jobs])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / target.name, target)
        self.info = build_info(torch_minor(), gpu is not None)
        write_if_changed(target.parent / "_build_info.py", self.info)

    def run_ninja(self, arguments):
        ninja = shutil.which("ninja", path=os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", ""))
        if ninja is None:
            fail("ninja is not installed; run `pip install ninja`.")
        if subprocess.run([ninja, *arguments]).returncode != 0:
            fail("compiling the extension failed; the compiler's messages stand above.")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        write_if_changed(ROOT / "pyext/wengert/_build_info.py", self.info)


def cmake_facts() -> str:
    """Settings for CMakeLists.txt, which thus builds for the same PyTorch and the same GPUs."""
    from torch.utils.cpp_extension import include_paths, library_paths

    gpu = cuda()
    facts = {
        "TORCH_MINOR": [torch_minor()],
        "TORCH_INCLUDES": include_paths(),
        "TORCH_LIBRARY_DIRS": library_paths(),
        "TORCH_LIBRARIES": torch_libraries(gpu),
        "CXX_RUNTIME": runtime_library(compiler()),
        "CUDA_PYTHON": [str(gpu is not None)],
        "CUDA_NVCC": [gpu.nvcc] if gpu else [],
        "CUDA_INCLUDES": gpu.includes if gpu else [],
        "CUDA_RUNTIME": [gpu.runtime] if gpu else [],
        "CUDA_ARCHS": gpu.archs if gpu else [],
    }
    return "".join(f'set({name} "{";".join(values)}")\n' for name, values in facts.items())


def build_info(minor: str, with_cuda: bool) -> str:
    title = '"""Written by setup.py: what this copy of wengert was built for."""'
    return f'{title}\n\nTORCH_MINOR = "{minor}"\nCUDA = {with_cuda}\n'


def main() -> None:
    # Asking for metadata alone (sdist, egg_info in an isolated environment) must not need torch.
    builds = not {"sdist", "egg_info", "clean", "--version", "--name"} & set(sys.argv[1:])
    if not builds:
        setup(version=version(), install_requires=["torch"])
        return
    minor = torch_minor()
    if sys.argv[1:] == ["--cmake"]:
        print(cmake_facts(), end="")
        return
    from torch.utils.cpp_extension import CppExtension

    setup(
        version=version(),
        install_requires=[f"torch=={minor}.*"],
        ext_modules=[CppExtension("wengert._C", [f"csrc/{source}" for source in sources(with_cuda=True)])],
        cmdclass={"build_ext": NinjaBuild},
    )


main()
