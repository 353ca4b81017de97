"""Gradients, Jacobians and Hessians behind PyTorch's own signatures, on a structured C++ engine.

Same names, arguments, results and errors as ``torch.autograd.grad``, ``torch.autograd.functional`` and ``torch.func``;
what the engine does not understand takes PyTorch's own path.  Importing this package changes nothing in torch.

>>> import torch, wengert
>>> x = torch.tensor([1.0, 2.0, 3.0])
>>> wengert.jacobian(lambda x: x**2, x)
tensor([[2., 0., 0.],
        [0., 4., 0.],
        [0., 0., 6.]])
"""

from . import func
from ._stats import Stats, clear_caches, reset_stats, stats
from ._version import __version__
from .autograd import grad
from .batch import batch_jacobian
from .explain import Report, explain
from .functional import hessian, hvp, jacobian, jvp, vhp, vjp
from .patching import install, patched, uninstall

__all__ = [
    "Report",
    "Stats",
    "__version__",
    "batch_jacobian",
    "clear_caches",
    "explain",
    "func",
    "grad",
    "hessian",
    "hvp",
    "install",
    "jacobian",
    "jvp",
    "patched",
    "reset_stats",
    "stats",
    "uninstall",
    "vhp",
    "vjp",
]
