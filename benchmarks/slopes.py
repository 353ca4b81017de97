"""How cost grows with size: exponents fitted to log time over log N.

The dense Jacobian of a pointwise function has N^2 entries whatever one does; what should grow linearly is the
arithmetic. It is isolated by a paired difference: a function of many operations minus one of a single operation.
Both fill the same dense result, so the fill cancels.
"""

# ruff: noqa: B023 - every function made in a loop is called within the same iteration

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import wengert
from device import Device
from timer import Timing, race
from torch.autograd import functional as torch_functional

DEPTH = 24
SIZES = (500, 1000, 2000, 4000)


def deep(x: torch.Tensor) -> torch.Tensor:
    for _ in range(DEPTH):
        x = torch.sin(x) * 1.1 + torch.tanh(x * x)
    return x


def shallow(x: torch.Tensor) -> torch.Tensor:
    return x * 1.1


@dataclasses.dataclass
class Slope:
    name: str
    sizes: list[int]
    seconds: list[float]  # arithmetic alone
    exponent: float


def arithmetic(jacobian: Callable[[Any, torch.Tensor], Any], sizes: tuple[int, ...], device: Device, seconds: float) -> Slope:
    times = []
    for n in sizes:
        x = torch.linspace(0.1, 0.9, n, device=device.tensors)
        busy, fill = Timing("deep", 0.01), Timing("shallow", 0.01)
        calls = [lambda: jacobian(deep, x), lambda: jacobian(shallow, x)]
        for call in calls:
            call()
        samples = race(busy, calls[0], [(fill, calls[1])], device, seconds)
        times.append(max(1e-7, float(np.median(samples["deep"] - samples["shallow"]))))
    exponent = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
    return Slope("", list(sizes), times, exponent)


def pointwise_slopes(device: Device, seconds: float) -> list[Slope]:
    ours = arithmetic(wengert.jacobian, SIZES, device, seconds)
    ours.name = "wengert"
    peer = arithmetic(lambda f, x: torch_functional.jacobian(f, x, vectorize=True), SIZES[:2], device, seconds)
    peer.name = "functional vectorised"
    return [ours, peer]
