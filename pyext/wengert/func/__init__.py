"""Function transforms with the signatures of torch.func.

``grad``, ``grad_and_value``, ``jacrev``, ``jacfwd`` and ``hessian`` return callable objects that `vmap` recognises:
``vmap(jacrev(f))`` then evaluates `f` once for the whole batch and differentiates with the batch axis tied.  A lambda around
such an object hides it, and takes PyTorch's path.  Below an active torch.func transform everything is PyTorch's own, as are
``vjp``, ``jvp`` and ``functional_call``.
"""

from torch.func import functional_call, jvp, vjp

from ._transforms import grad, grad_and_value, hessian, jacfwd, jacrev
from ._vmap import vmap

__all__ = [
    "functional_call",
    "grad",
    "grad_and_value",
    "hessian",
    "jacfwd",
    "jacrev",
    "jvp",
    "vjp",
    "vmap",
]
