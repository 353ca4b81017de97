"""The examples in the docstrings run, and every public name has a docstring."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch
import wengert

MODULES = sorted(
    {"wengert"}
    | {m.name for m in pkgutil.walk_packages(wengert.__path__, "wengert.") if not m.name.endswith(("__main__", "._C"))}
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    with torch.device("cpu"):  # a tensor elsewhere prints its device
        failures, _ = doctest.testmod(
            importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, raise_on_error=False
        )
    assert failures == 0


@pytest.mark.parametrize("module", [wengert, wengert.func], ids=lambda m: m.__name__)
def test_public_names_are_documented(module):
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            assert inspect.getdoc(value), name
    ours = [getattr(module, n) for n in module.__all__ if getattr(getattr(module, n), "__module__", "").startswith("wengert")]
    examples = [f for f in ours if inspect.isfunction(f) and ">>>" in (inspect.getdoc(f) or "")]
    assert len(examples) >= 5


def test_full_type_hints():
    for module in (wengert, wengert.func):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) and value.__module__.startswith("wengert"):
                signature = inspect.signature(value)
                assert signature.return_annotation is not inspect.Signature.empty, name
                assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), name
