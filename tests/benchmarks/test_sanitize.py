"""benchmarks/sanitize.sh with stand-ins for compute-sanitizer and for a Python that has a GPU."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "sanitize.sh"
BASH = shutil.which("bash")
TIMEOUT = f'exec {shutil.which("timeout")} "$@"'
pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


@pytest.fixture
def sanitize(tmp_path):
    """Runs the script; `sanitizer` and `python` are the stand-ins' shell lines, None for a machine that lacks the program."""

    def run(*tools, sanitizer='echo "$WENGERT_TEST_DEVICE $PYTORCH_NO_CUDA_MEMORY_CACHING $*"', python="exit 0", **environment):
        programs = {"compute-sanitizer": sanitizer, "python": python, "dirname": 'echo "${1%/*}"', "timeout": TIMEOUT}
        for name, line in programs.items():
            if line is not None:
                program = tmp_path / name
                program.write_text(f"#!{BASH}\n{line}\n")
                program.chmod(0o755)
        environment = {"PATH": str(tmp_path), **environment}
        return subprocess.run([BASH, SCRIPT, *tools], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_all_tools_run_the_suite_on_the_gpu(sanitize):
    done = sanitize(WENGERT_SANITIZE_TESTS="tests/a.py tests/b.py")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[::2] == ["== memcheck", "== racecheck", "== synccheck", "== initcheck", lines[-1]]
    for tool, line in zip(("memcheck", "racecheck", "synccheck", "initcheck"), lines[1::2]):
        assert line.startswith(f"cuda 1 --tool {tool} ")
        assert "--error-exitcode 99" in line
        for name in ("wengert", "materialize", "segment_sum", "small_matmul"):
            # What PyTorch's kernels have not been seen to write would count as never written.
            assert (f"--kernel-name kernel_substring={name} " in line) == (tool != "initcheck")
        assert line.endswith("python -m pytest -q -p no:cacheprovider tests/a.py tests/b.py")
    assert lines[-1] == "sanitize.sh: clean under memcheck racecheck synccheck initcheck"


def test_the_tools_and_the_kernels_can_be_chosen(sanitize):
    done = sanitize("racecheck", WENGERT_SANITIZE_KERNELS="", PYTHON="python")
    assert done.returncode == 0
    assert done.stdout.count("== ") == 1 and "--tool racecheck" in done.stdout
    assert "--kernel-name" not in done.stdout


def test_an_error_under_one_tool_does_not_stop_the_others(sanitize):
    done = sanitize("memcheck", "racecheck", "initcheck", sanitizer='[ "$2" != racecheck ] || exit 99')
    assert done.returncode == 1
    assert "== initcheck" in done.stdout
    assert done.stderr == "sanitize.sh: failed under racecheck\n"


MISSING = [
    ({"sanitizer": None}, "compute-sanitizer was not found"),
    ({"python": "exit 1"}, "'python' has no PyTorch that can use a GPU here"),
    ({"PYTHON": "nowhere"}, "'nowhere' was not found"),
]


@pytest.mark.parametrize("lacking, message", MISSING)
def test_what_is_missing_is_named(sanitize, lacking, message):
    done = sanitize(**lacking)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sanitize.sh: ") and message in done.stderr


def test_a_tool_that_is_not_one(sanitize):
    done = sanitize("memcheck", "leakcheck")
    assert done.returncode == 2
    assert "no tool is called 'leakcheck'; there are: memcheck racecheck synccheck initcheck" in done.stderr


def test_the_default_tests_exist_and_the_default_kernels_are_all_there_are():
    text = SCRIPT.read_text()
    root = SCRIPT.parents[1]
    assert (root / re.search(r"WENGERT_SANITIZE_TESTS:-([^}]+)}", text).group(1)).exists()
    kernels = re.search(r"WENGERT_SANITIZE_KERNELS-([^}]+)}", text).group(1).split()
    assert set(kernels) == {"wengert", *(path.stem for path in (root / "csrc/kernels/cuda").glob("*.cu"))}


def test_a_tool_that_takes_too_long_has_failed(sanitize):
    done = sanitize("racecheck", sanitizer="sleep 60", SECONDS_EACH="0.2")
    assert done.returncode == 1 and "failed under racecheck" in done.stderr


def test_the_script_can_be_run_as_it_is():
    assert os.access(SCRIPT, os.X_OK)
