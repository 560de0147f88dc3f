"""Where a job computes."""

from __future__ import annotations

import torch

from cnnrs._util.devices import usable


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
    try:
        return usable(device)
    except ValueError as error:
        raise ValueError(f"--device {name}: {error}") from None
