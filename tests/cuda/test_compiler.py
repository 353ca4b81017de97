"""Compilation with NVRTC and the cache of its results: damage, strangers, permissions, size, several processes."""

import os
import re
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
        for name in (f"{age}.kernel", f"{age}.kernel.Ab12Cd"):  # the second was left by a process that died
            (folder / name).write_bytes(bytes(300 << 10))
            os.utime(folder / name, (time.time() - 100 - age,) * 2)
    (folder / "notes.txt").write_bytes(bytes(3 << 20))
    cuda.compile(source(), 80)
    left = {path.name for path in folder.iterdir()}
    assert {"0.kernel", "1.kernel", "2.kernel", "notes.txt"} <= left
    assert not {"4.kernel", "4.kernel.Ab12Cd", "3.kernel"} & left
    assert sum(path.stat().st_size for path in folder.iterdir() if ".kernel" in path.name) <= 2 << 20
    assert len(left) == 8  # six of the ten, ours, and the stranger's
    cuda.forget_compiled()
    cuda.compile(source(), 80)
    assert statistics() == (0, 1, 0)


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
