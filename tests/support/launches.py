"""What a call queues on a GPU, as PyTorch's profiler sees it."""

from collections.abc import Callable

import torch
from device import device_work
from torch.profiler import ProfilerActivity, profile


def kernels_of(call: Callable[[], object]) -> list[str]:
    """Names of the kernels, copies and fills that a warm call queues."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [event.name for event in device_work(seen)]
