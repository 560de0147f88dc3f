"""One stream per device and purpose: every stream keeps a pool of memory of its own."""

from __future__ import annotations

from typing import Any

import torch

_STREAMS: dict[tuple[str, int], Any] = {}


def side_stream(device: torch.device, purpose: str) -> Any:
    """The stream for ``purpose`` on a CUDA device, the same one each time.

    Example:
        >>> stream = side_stream(torch.device("cuda"), "copies")  # doctest: +SKIP
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    if (purpose, index) not in _STREAMS:
        _STREAMS[purpose, index] = torch.cuda.Stream(torch.device("cuda", index))  # type: ignore[no-untyped-call]
    return _STREAMS[purpose, index]
