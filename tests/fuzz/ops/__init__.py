"""The operations of random programs, a file per family. Importing this package registers all of them.

An operation takes a value `x` and its draws `d` and returns a new value. Whatever it cannot take it may refuse by raising:
programs are tried once when they are made, and a step that raises there is another operation from then on.
"""

from . import algebra, control, conv, index, inplace, losses, norms, pointwise, reductions, rollouts, stencils, views

__all__ = [
    "algebra",
    "control",
    "conv",
    "index",
    "inplace",
    "losses",
    "norms",
    "pointwise",
    "reductions",
    "rollouts",
    "stencils",
    "views",
]
