"""Without the device's garbage collections: one takes a third of a second beside PyTorch's compiler."""

import types

import device
import pytest


@pytest.fixture(autouse=True)
def no_collections(monkeypatch):
    monkeypatch.setattr(device, "gc", types.SimpleNamespace(collect=lambda: 0))
