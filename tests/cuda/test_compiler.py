"""Compilation with NVRTC and the cache of its results: damage, strangers, permissions, size, several processes."""

import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import time

import pytest
from support import ptx_device
from wengert import _C

cuda = _C.cuda


def source(name="probe"):
    return f'extern "C" __global__ void {name}(float* x) {{ x[threadIdx.x] *= 2.5f; }}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    ptx_device.nvrtc()
    monkeypatch.setenv("WENGERT_CACHE_DIR", str(tmp_path / "kernels"))
    cuda.forget_compiled()
    yield tmp_path / "kernels"
    cuda.forget_compiled()


def statistics():
    counts = cuda.cache_stats()
    return counts["compiled"], counts["from_disk"], counts["from_memory"]


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def test_memory_then_disk(folder):
    first = cuda.compile(source(), 80, "ptx")
    assert b".entry probe" in first and statistics() == (1, 0, 0)
    assert cuda.compile(source(), 80, "ptx") == first and statistics() == (1, 0, 1)
    cuda.forget_compiled()
    assert cuda.compile(source(), 80, "ptx") == first and statistics() == (0, 1, 0)
    assert cuda.cache_stats()["folder"] == str(folder)


def test_every_target_has_an_entry(folder):
    results = {cuda.compile(source(), arch, kind) for arch in (80, 90) for kind in ("ptx", "cubin")}
    assert len(results) == len(list(folder.iterdir())) == 4
    assert sum(result.startswith(b"\x7fELF") for result in results) == 2
    for arch in (80, 90):
        assert f".target sm_{arch}" in cuda.compile(source(), arch, "ptx").decode()


def test_folder_and_files_are_private(folder):
    before = os.umask(0)
    try:
        cuda.compile(source(), 80)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(only_file(folder).stat().st_mode) == 0o600


def test_a_folder_others_may_write_to_is_not_used(folder):
    folder.mkdir()
    folder.chmod(0o777)
    cuda.compile(source(), 80)
    assert list(folder.iterdir()) == [] and statistics() == (1, 0, 0)


DAMAGE = {
    "empty": lambda content: b"",
    "short header": lambda content: content[:20],
    "truncated": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "a bit of the payload": lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    "a bit of the key": lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
    "magic": lambda content: b"X" + content[1:],
    "huge length": lambda content: content[:8] + b"\xff" * 8 + content[16:],
    "noise": lambda content: os.urandom(3000),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_damaged_entries_are_built_again(folder, damage):
    first = cuda.compile(source(), 80)
    path = only_file(folder)
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    cuda.forget_compiled()
    assert cuda.compile(source(), 80) == first and statistics() == (1, 0, 0)
    assert only_file(folder).read_bytes() == whole


@pytest.mark.parametrize("other", [("other", 80, "ptx"), ("probe", 90, "ptx"), ("probe", 80, "cubin")], ids=str)
def test_entries_of_another_key_are_not_taken(folder, other):
    """Also where two keys had one file name: another source, architecture or kind under this one's name."""
    first = cuda.compile(source(), 80, "ptx")
    mine = only_file(folder)
    cuda.compile(source(other[0]), *other[1:])
    (foreign,) = set(folder.iterdir()) - {mine}
    foreign.replace(mine)
    cuda.forget_compiled()
    assert cuda.compile(source(), 80, "ptx") == first and statistics() == (1, 0, 0)


def test_no_folder_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for value in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), "/proc/kernels"):
        monkeypatch.setenv("WENGERT_CACHE_DIR", value)
        cuda.forget_compiled()
        assert b".entry probe" in cuda.compile(source(), 80)
        assert statistics() == (1, 0, 0)


def test_default_folders(monkeypatch):
    monkeypatch.delenv("WENGERT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cuda.cache_stats()["folder"] == "/somewhere/wengert/kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cuda.cache_stats()["folder"] == "/home/someone/.cache/wengert/kernels"
    monkeypatch.delenv("HOME")
    assert cuda.cache_stats()["folder"] == ""
    assert b".entry probe" in cuda.compile(source(), 80)


def test_the_oldest_entries_go_first(folder, monkeypatch):
    monkeypatch.setenv("WENGERT_CACHE_MEGABYTES", "2")
    folder.mkdir(mode=0o700)
    for age in range(5):
        for name in (f"{age:032x}.kernel", f"{age:032x}.kernel.Ab12Cd"):  # the second was left by a process that died
            (folder / name).write_bytes(bytes(300 << 10))
            os.utime(folder / name, (time.time() - 100 - age,) * 2)
    (folder / "notes.txt").write_bytes(bytes(3 << 20))
    cuda.compile(source(), 80)
    left = {path.name for path in folder.iterdir()}
    assert {f"{age:032x}.kernel" for age in range(3)} | {"notes.txt"} <= left
    assert not {f"{4:032x}.kernel", f"{4:032x}.kernel.Ab12Cd", f"{3:032x}.kernel"} & left
    assert sum(path.stat().st_size for path in folder.iterdir() if ".kernel" in path.name) <= 2 << 20
    assert len(left) == 8  # six of the ten, ours, and the stranger's
    cuda.forget_compiled()
    cuda.compile(source(), 80)
    assert statistics() == (0, 1, 0)


STRANGERS = ["popcorn.kernel", "notes.kernel.txt", "0" * 32 + ".kernel.bak", "A" * 32 + ".kernel", "0" * 33 + ".kernel"]


def test_files_of_others_stay(folder, monkeypatch):
    monkeypatch.setenv("WENGERT_CACHE_MEGABYTES", "0")
    folder.mkdir(mode=0o700)
    for name in STRANGERS:
        (folder / name).write_bytes(bytes(1000))
    (folder / ("1" * 32 + ".kernel")).mkdir()
    (folder / ("2" * 32 + ".kernel")).write_bytes(bytes(1000))
    cuda.compile(source(), 80)
    assert {path.name for path in folder.iterdir()} == {*STRANGERS, "1" * 32 + ".kernel"}


@pytest.mark.parametrize("obstacle", ["directory", "fifo", "unreadable", "dangling"])
def test_what_cannot_be_read_is_no_error(folder, obstacle):
    first = cuda.compile(source(), 80)
    path = only_file(folder)
    path.unlink()
    if obstacle == "directory":
        path.mkdir()
    elif obstacle == "fifo":
        os.mkfifo(path)
    elif obstacle == "dangling":
        path.symlink_to(folder / "nothing")
    else:
        path.symlink_to("/proc/self/mem")  # opens, and gives EIO
    cuda.forget_compiled()
    assert cuda.compile(source(), 80) == first and statistics() == (1, 0, 0)
    assert all(p.is_file() or p.is_dir() for p in folder.iterdir()), "no unfinished file"
    assert len(list(folder.iterdir())) == 1


def test_a_limit_of_nothing_keeps_nothing(folder, monkeypatch):
    monkeypatch.setenv("WENGERT_CACHE_MEGABYTES", "0")
    assert b".entry probe" in cuda.compile(source(), 80)
    assert list(folder.iterdir()) == []


def test_processes_share_the_folder(folder):
    script = f"""
        import sys
        sys.path[:0] = {[path for path in sys.path if path]!r}
        from wengert import _C
        _C.cuda.set_nvrtc({ptx_device.nvrtc()!r})
        for k in range(6):
            text = 'extern "C" __global__ void k%d(float* x) {{{{ x[0] = %d; }}}}' % (k, k)
            assert b'.entry k%d' % k in _C.cuda.compile(text, 80)
    """
    command = [sys.executable, "-c", textwrap.dedent(script.replace("{{{{", "{").replace("}}}}", "}"))]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    names = [path.name for path in folder.iterdir()]
    assert len(names) == 6 and all(re.fullmatch(r"[0-9a-f]{32}\.kernel", name) for name in names)


# ------------------------------------------------------------------------------------------------------------------------ errors
def test_errors_show_the_log():
    with pytest.raises(cuda.CompileError, match=r"NVRTC_ERROR_COMPILATION(.|\n)*undeclared_thing"):
        cuda.compile('extern "C" __global__ void f() { undeclared_thing(); }', 80)
    assert statistics() == (0, 0, 0)
    with pytest.raises(cuda.CompileError, match="compute_1"):
        cuda.compile(source(), 1)


def test_a_failure_is_not_tried_again():
    bad = 'extern "C" __global__ void f() { undeclared_thing(); }'
    messages = []
    for _ in range(3):
        with pytest.raises(cuda.CompileError) as error:
            cuda.compile(bad, 80)
        messages.append(str(error.value))
    assert len(set(messages)) == 1 and statistics() == (0, 0, 2)
    assert 0 < len(messages[0]) < cuda.cache_stats()["bytes"]
    with pytest.raises(cuda.CompileError, match="compute_90"):  # another question
        cuda.compile(bad, 90)
    cuda.forget_compiled()
    with pytest.raises(cuda.CompileError):
        cuda.compile(bad, 80)
    assert statistics() == (0, 0, 0)


def test_a_missing_library_is_not_looked_for_again(tmp_path):
    real, path = ptx_device.find_nvrtc(), tmp_path / "libnvrtc.so.13"
    try:
        cuda.set_nvrtc(str(path))
        for attempt in range(2):
            with pytest.raises(cuda.CompileError, match="not found"):
                cuda.compile(source(), 80)
            if attempt == 0:
                path.symlink_to(real)
        cuda.set_nvrtc(str(path))
        assert b".entry probe" in cuda.compile(source(), 80)
    finally:
        cuda.set_nvrtc(real)


FAKE = """
#include <stddef.h>
#include <string.h>
static const char* text = TEXT;
int nvrtcVersion(int* a, int* b) { *a = 13; *b = 0; return 0; }
const char* nvrtcGetErrorString(int status) { return "FAKE_ERROR"; }
int nvrtcCreateProgram(void** p, const char* s, const char* n, int c, const char* const* t, const char* const* m)
{ *p = &text; return 0; }
int nvrtcDestroyProgram(void** p) { return 0; }
int nvrtcCompileProgram(void* p, int c, const char* const* o) { return STATUS; }
int nvrtcGetPTXSize(void* p, size_t* n) { *n = strlen(text) + 1; return 0; }
int nvrtcGetPTX(void* p, char* out) { strcpy(out, text); return 0; }
int nvrtcGetCUBINSize(void* p, size_t* n) { *n = strlen(text); return 0; }
int nvrtcGetCUBIN(void* p, char* out) { memcpy(out, text, strlen(text)); return 0; }
int nvrtcGetProgramLogSize(void* p, size_t* n) { *n = 1; return 0; }
int nvrtcGetProgramLog(void* p, char* out) { *out = 0; return 0; }
"""


@pytest.fixture
def fake_nvrtc(tmp_path):
    """Makes a library with NVRTC's interface, of a build of its own."""
    compiler = shutil.which("cc") or shutil.which("gcc") or pytest.skip("needs a C compiler")

    def make(name, build, status=0):
        path = tmp_path / f"{name}.so"
        link = f"-Wl,--build-id={build}"
        flags = [f'-DTEXT="{name}"', f"-DSTATUS={status}", "-shared", "-fPIC", link, "-x", "c", "-", "-o", path]
        subprocess.run([compiler, *flags], input=FAKE, text=True, check=True)
        return str(path)

    yield make
    cuda.set_nvrtc(ptx_device.find_nvrtc())


@pytest.mark.parametrize("builds", [("0x01", "0x02"), ("none", "none")], ids=["builds", "files"])
def test_another_build_of_one_version_compiles_anew(fake_nvrtc, builds):
    one, other = (fake_nvrtc(name, build) for name, build in zip(("one", "other"), builds))
    for path, text, counts in ((one, b"one", (1, 0, 0)), (other, b"other", (1, 0, 0)), (one, b"one", (0, 1, 0))):
        cuda.set_nvrtc(path)
        cuda.forget_compiled()
        assert cuda.compile(source(), 80) == text and statistics() == counts


@pytest.mark.parametrize("status, remembered", [(1, False), (5, True), (6, True)], ids=["out of memory", "option", "source"])
def test_which_failures_are_remembered(fake_nvrtc, status, remembered):
    cuda.set_nvrtc(fake_nvrtc(f"status{status}", "0x03", status))
    for _ in range(2):
        with pytest.raises(cuda.CompileError, match="FAKE_ERROR"):
            cuda.compile(source(), 80)
    assert statistics() == (0, 0, int(remembered))


def test_a_missing_library_is_an_error():
    path = ptx_device.find_nvrtc()
    try:
        cuda.set_nvrtc("/nowhere/libnvrtc.so.13")
        with pytest.raises(cuda.CompileError, match=r"NVRTC(.|\n)*not found(.|\n)*/nowhere/libnvrtc.so.13"):
            cuda.compile(source(), 80)
        cuda.set_nvrtc("libc.so.6")
        with pytest.raises(cuda.CompileError, match="has no nvrtcVersion"):
            cuda.compile(source(), 80)
    finally:
        cuda.set_nvrtc(path)
    assert b".entry probe" in cuda.compile(source(), 80)
