"""Where a job computes."""

from __future__ import annotations

import torch


def device_of(name: str | None) -> torch.device:
    """The device of this name; None: CUDA where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no usable CUDA device; see cnnrs info")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device {name}: there are the devices cuda:0 to cuda:{count - 1}; see cnnrs info")
    return device
