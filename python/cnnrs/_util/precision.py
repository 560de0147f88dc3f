"""The switches of a process by which PyTorch chooses its kernels, in the words of old torches and of new ones.

Torch 2.9 has a second interface for the precision of float32, ``fp32_precision``. Reading the first one, ``allow_tf32``
and ``get_float32_matmul_precision``, raises once the two say different things: where there is the second, that is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_backends: Any = torch.backends


def _settings() -> list[Any]:
    """What has a ``fp32_precision``; empty before torch 2.9."""
    if not hasattr(_backends.cudnn, "conv"):
        return []
    cuda = [_backends.cuda.matmul, _backends.cudnn.conv, _backends.cudnn.rnn]
    return [*cuda, _backends.mkldnn.matmul, _backends.mkldnn.conv, _backends.mkldnn.rnn]


def precisions() -> tuple[Any, ...]:
    """Equal as long as float32 is computed as precisely."""
    settings = _settings()
    if settings:
        return tuple(setting.fp32_precision for setting in settings)
    return (torch.get_float32_matmul_precision(), _backends.cudnn.allow_tf32)


def uses_tf32() -> bool:
    """Whether products or convolutions of float32 on a GPU may round their factors to 10 bits."""
    if _settings():
        return "tf32" in (_backends.cuda.matmul.fp32_precision, _backends.cudnn.conv.fp32_precision)
    return bool(_backends.cuda.matmul.allow_tf32 or _backends.cudnn.allow_tf32)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products and convolutions of float32 on a GPU with or without it, for the time being."""
    older: list[tuple[Any, str, Any]] = [
        (_backends.cuda.matmul, "allow_tf32", allowed),
        (_backends.cudnn, "allow_tf32", allowed),
    ]
    newer: list[tuple[Any, str, Any]] = [
        (setting, "fp32_precision", "tf32" if allowed else "ieee") for setting in _settings()[:3]
    ]
    try:
        # Both, so that the user's code can go on reading both.
        changes = older + newer
        before = [(setting, name, getattr(setting, name)) for setting, name, _ in changes]
    except RuntimeError:
        changes = newer
        before = [(setting, name, getattr(setting, name)) for setting, name, _ in changes]
    try:
        for setting, name, value in changes:
            setattr(setting, name, value)
        yield
    finally:
        for setting, name, value in before:
            setattr(setting, name, value)


def kernel_switches() -> tuple[Any, ...]:
    """Equal as long as PyTorch would choose the same kernels on a GPU for the same operation."""
    matmul, cudnn = _backends.cuda.matmul, _backends.cudnn
    return (
        precisions(),
        torch.are_deterministic_algorithms_enabled(),
        (cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        # Of newer torches.
        getattr(matmul, "allow_fp16_accumulation", None),
        getattr(_backends.cuda, "preferred_blas_library", lambda: None)(),
    )
