"""Loads the C++ extension, or refuses with one sentence; ``WENGERT_DISABLE=1`` leaves it out altogether."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
from typing import Any

import torch

DISABLED = os.environ.get("WENGERT_DISABLE", "0") not in ("", "0")


def _load() -> Any:
    try:
        from ._build_info import TORCH_MINOR
    except ImportError:
        raise ImportError("wengert's C++ extension has not been built; run `pip install . --no-build-isolation`.") from None
    check_torch(TORCH_MINOR, torch.__version__)
    from . import _C

    if torch.version.cuda is not None:
        major = int(torch.version.cuda.split(".")[0])
        _C.cuda.set_nvrtc(find_nvrtc(major) or f"libnvrtc.so.{major}")  # opened when the first kernel is compiled
    return _C


def check_torch(built_for: str, installed: str) -> None:
    """Raise ImportError unless `installed` is a patch release of the minor version `built_for`.

    >>> check_torch("2.13", "2.13.1+cpu")
    >>> check_torch("2.13", "2.14.0")
    Traceback (most recent call last):
    ImportError: this copy of wengert was built for PyTorch 2.13 but 2.14.0 is installed; reinstall wengert.
    """
    if ".".join(installed.split(".")[:2]) != built_for:
        raise ImportError(
            f"this copy of wengert was built for PyTorch {built_for} but {installed} is installed; reinstall wengert."
        )


def find_nvrtc(major: int | None = None) -> str | None:
    """The compiler of CUDA kernels that PyTorch's own dependencies bring, or None: the system's may do.

    Args:
        major: of the CUDA version, which has to be PyTorch's; without it, the newest.
    """
    found: dict[int, str] = {}
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for pattern in ("cu*/lib/libnvrtc.so.*", "cuda_nvrtc/lib/libnvrtc.so.*"):
            for path in sorted(pathlib.Path(root).glob(pattern)):
                version = re.fullmatch(r"libnvrtc\.so\.(\d+)[.\d]*", path.name)
                if version:
                    found.setdefault(int(version.group(1)), str(path))
    return found.get(max(found, default=0) if major is None else major)


class _Disabled:
    """Stands in for the extension under WENGERT_DISABLE=1: refuses every call."""

    class Unsupported(RuntimeError):
        pass

    class CoupledSamples(Unsupported):
        pass

    @staticmethod
    def jacobian_of(func: Any, inputs: Any) -> None:
        """None of the work is done."""

    hessian_of = batch_jacobian_of = jacobian_of

    jacobian = hessian = batch_jacobian = grad = explain = ends_a_program = None  # never called: every call is refused before

    @staticmethod
    def refusal() -> str:
        return "WENGERT_DISABLE is set"

    @staticmethod
    def counters() -> dict[str, int]:
        return {}

    cache_bytes = counters

    @staticmethod
    def reset_counters() -> None:
        pass

    clear_caches = reset_counters


C: Any = _Disabled if DISABLED else _load()
Refused: type[Exception] = C.Unsupported  # the engine cannot do it; the message is the reason
# A Refused of batch_jacobian: samples meet in `node`; `read` says whether that operator is known exactly.
CoupledSamples: type[Exception] = C.CoupledSamples
