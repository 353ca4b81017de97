"""What the build with CUDA adds.  Elsewhere these tests are skipped, except for those of the sources."""

import shutil
import sysconfig
from pathlib import Path

import pytest


def built_with_cuda() -> bool:
    from wengert import _build_info

    return _build_info.CUDA


@pytest.fixture(scope="session")
def cuda_build():
    if not built_with_cuda():
        pytest.skip("wengert was built for the CPU only")


@pytest.fixture(scope="session")
def gpu(cuda_build):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def tool(cuda_build):
    """Finds a program of the CUDA toolkit: on the PATH, beside nvcc, or among what PyTorch's compiler brings."""
    homes = (Path("/usr/local/cuda/bin"), Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/bin")

    def find(name: str) -> str:
        path = shutil.which(name) or next((str(home / name) for home in homes if (home / name).exists()), None)
        if path is None:
            pytest.skip(f"{name} was not found")
        return path

    return find


@pytest.fixture(autouse=True, scope="session")
def session_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WENGERT_CACHE_DIR", str(tmp_path_factory.mktemp("kernels", numbered=True)))
        yield
