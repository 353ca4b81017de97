"""What the build with CUDA adds.  Elsewhere these tests are skipped, except for those of the sources."""

import pytest
from support.toolkit import find_tool


def built_with_cuda() -> bool:
    from wengert import _build_info

    return _build_info.CUDA


@pytest.fixture(scope="session")
def cuda_build():
    if not built_with_cuda():
        pytest.skip("wengert was built for the CPU only")


@pytest.fixture(scope="session")
def tool(cuda_build):
    """Finds a program of the CUDA toolkit."""

    def find(name: str) -> str:
        path = find_tool(name)
        if path is None:
            pytest.skip(f"{name} was not found")
        return path

    return find
