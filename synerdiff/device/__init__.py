"""Lanes that work runs on, on a CPU (`lanes`) or a GPU (`cuda`), and links between processes (`link`)."""

from __future__ import annotations

import torch

from synerdiff.device.cuda import CudaDevice
from synerdiff.device.lanes import CpuDevice, Device, find_device


def open_device(name: str | torch.device) -> Device:
    """Open the lanes of `cpu`, `cuda` or `cuda:N`. Raises InputError as `find_device` does."""
    device = find_device(name)
    if device.type == "cpu":
        return CpuDevice()
    return CudaDevice(device)
