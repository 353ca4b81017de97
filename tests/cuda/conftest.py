"""Compiled kernels of these tests are kept for the session only, not among the user's."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def session_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WENGERT_CACHE_DIR", str(tmp_path_factory.mktemp("kernels", numbered=True)))
        yield
