"""Devices that users name, and what their libraries say when memory runs out."""

from __future__ import annotations

import torch

#: In errors that are no ``OutOfMemoryError``: of CUDA itself, of its libraries, and of the CPU's allocator.
_NO_MEMORY = (
    "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "unable to find an engine to execute this computation", "can't allocate memory", "not enough memory",
)  # fmt: skip


def usable(device: str | torch.device) -> torch.device:
    """The device of this name; of CUDA's with its number.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{device!r} is no device: expected cpu, cuda or cuda:0") from None
    if found.type != "cuda":
        return found
    if not torch.cuda.is_available():
        raise ValueError(f"there is no {device}: torch {torch.__version__} finds no usable CUDA device; see cnnrs info")
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= (count := torch.cuda.device_count()):
        raise ValueError(f"there is no {device}: there are the devices cuda:0 to cuda:{count - 1}; see cnnrs info")
    return torch.device("cuda", index)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, on a device or on the host: with fewer samples at a time there may be."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
