"""Compiles the executor once per machine and loads it."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import pathlib
import subprocess
import tempfile

from . import encoding

_SOURCES = pathlib.Path(__file__).parent / "executor"
# -O1 with inlining compiles in two thirds of the time of -O2 and runs kernels as fast. What computes a result must not contract
# a product and a sum into an fma, nor move arithmetic over a change of the rounding mode.
_FLAGS = ["-std=c++20", "-O1", "-finline-small-functions", "-finline-functions", "-fPIC", "-shared", "-Wall", "-Wextra"]
_FLAGS += ["-ffp-contract=off", "-frounding-math", "-fno-strict-aliasing"]


class Launch(ctypes.Structure):
    """The C++ `Launch`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("code", "image", "jumps", "parameters", "ranges")),
        *((name, ctypes.c_uint64) for name in ("local_size", "seed")),
        *((name, ctypes.c_uint32) for name in ("registers", "range_count", "static_shared", "dynamic_shared")),
        *((name, ctypes.c_uint32) for name in ("waits", "check", "order")),
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block")),
    ]


class Range(ctypes.Structure):
    """The C++ `Range`: an array that the kernel may touch."""

    _fields_ = [("begin", ctypes.c_uint64), ("end", ctypes.c_uint64), ("read_only", ctypes.c_uint32)]


class Report(ctypes.Structure):
    """The C++ `Report` of a fault."""

    _fields_ = [
        ("message", ctypes.c_char * 1024),
        ("instruction", ctypes.c_int32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
    ]


def cache_folder():
    """Returns the folder of compiled executors: `WENGERT_PTX_CACHE`, or one in the user's cache folder."""
    if chosen := os.environ.get("WENGERT_PTX_CACHE"):
        return pathlib.Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "wengert" / "ptx"


@contextlib.contextmanager
def _locked(folder):
    """Lets one process at a time compile, so that parallel test workers do not all do it."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(target, header):
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        pathlib.Path(scratch, "encoding.h").write_text(header)
        output = pathlib.Path(scratch, "executor.so")
        sources = [str(path) for path in sorted(_SOURCES.glob("*.cpp"))]
        command = [*compiler.split(), *_FLAGS, f"-I{scratch}", f"-I{_SOURCES}", *sources, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"compiling the PTX executor failed:\n{' '.join(command)}\n{done.stderr}")
        os.replace(output, target)


@functools.cache
def load():
    """Returns the executor's library, compiled if its sources are new."""
    header = encoding.cpp_header()
    digest = hashlib.sha256(" ".join([os.environ.get("CXX", "g++"), *_FLAGS, header]).encode())
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.read_bytes())
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"executor-{digest.hexdigest()[:20]}.so"
    if not target.exists():
        with _locked(folder):
            if not target.exists():
                _compile(target, header)
    library = ctypes.CDLL(str(target))
    library.ptx_operation_name.restype = ctypes.c_char_p
    return library


@functools.cache
def operations():
    """Returns the executor's operations: name -> number."""
    library = load()
    return {library.ptx_operation_name(i).decode(): i for i in range(library.ptx_operation_count())}
