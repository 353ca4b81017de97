"""Shared set-up: one place decides threads, device, seeds and the hypothesis profile for the whole suite."""

import os
import pathlib
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

# The support package and the benchmark's problems are importable whatever import mode pytest runs in.
_HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "benchmarks")]

# What the engine can do it does, however small the example; tests/contract/test_routes.py is about the choice.
os.environ.setdefault("WENGERT_COMPARE_WAYS", "0")

torch.set_num_threads(int(os.environ.get("WENGERT_TEST_THREADS", "2")))

_QUIET = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
DEVICE = torch.device(os.environ.get("WENGERT_TEST_DEVICE", "cpu"))
# On a GPU every random program has kernels to be compiled.
_EXAMPLES = 60 if DEVICE.type == "cpu" else 12
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=_EXAMPLES, suppress_health_check=_QUIET)
settings.register_profile("brief", deadline=None, derandomize=True, max_examples=5, suppress_health_check=_QUIET)
settings.register_profile("explore", deadline=None, max_examples=2000, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("WENGERT_HYPOTHESIS_PROFILE", "suite"))

if DEVICE.type != "cpu":
    # What tests make without naming a device lies there too. The tests of the host's part would be the same ones once more.
    if torch.cuda.is_available():
        torch.set_default_device(DEVICE)
    collect_ignore = ["benchmarks", "cuda", "cuda_build", "cuda_static", "fused", "packaging", "ptx", "tape/test_gpu_nodes.py"]


def pytest_report_header():
    return f"device: {torch.cuda.get_device_name(DEVICE) if DEVICE.type == 'cuda' and torch.cuda.is_available() else DEVICE}"


def pytest_collection_modifyitems(items):
    """A suite asked to run on a GPU never passes by running elsewhere."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"WENGERT_TEST_DEVICE={DEVICE}, but there is no GPU"))


@pytest.fixture(autouse=True, scope="session")
def session_cache(tmp_path_factory):
    """Compiled kernels of tests are kept for the session only, not among the user's; parallel workers share them.

    WENGERT_TEST_CACHE_DIR names a folder that several sessions share.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WENGERT_CACHE_DIR", os.environ.get("WENGERT_TEST_CACHE_DIR", str(folder / "kernels")))
        yield


@pytest.fixture(autouse=True)
def ambient_state():
    """Every test starts from the same seed and must leave torch's ambient state as it found it."""
    torch.manual_seed(0)
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    yield
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert after == before, f"a test changed torch's ambient state from {before} to {after}"
