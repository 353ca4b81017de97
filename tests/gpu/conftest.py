"""Tests that need a GPU; elsewhere each is skipped."""

import pytest
import torch
from wengert import _build_info


@pytest.fixture(scope="session")
def gpu():
    if not _build_info.CUDA:
        pytest.skip("wengert was built for the CPU only")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda")
