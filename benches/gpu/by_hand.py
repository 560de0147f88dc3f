"""Features in plain PyTorch, as one writes it who knows CUDA: what `preconv` must not be slower than."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn

from gpu.scale import Scale

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Network = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def precisely(precision: str) -> Iterator[None]:
    """TF32 or not, and cuDNN's search for the fastest kernel."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    try:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        cudnn.allow_tf32, cudnn.benchmark = precision == "tf32", True
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32, cudnn.benchmark = before


def tuned(model: nn.Module, scale: Scale, precision: str, compiled: bool = False, cast: bool = False) -> Network:
    """``model`` in channels-last order without gradients.

    Args:
        model: stays as it is; the order of its weights changes.
        scale: says which backend compiles.
        precision: as for ``preconv``.
        compiled: by ``torch.compile``.
        cast: the weights once, in place of autocast at every call.
    """
    dtype = AUTOCAST.get(precision)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if cast:
        model = model.to(dtype)
    network = torch.compile(model, backend=scale.backend) if compiled else model

    def run(images: torch.Tensor) -> torch.Tensor:
        images = images.to(dtype if cast else images.dtype, memory_format=torch.channels_last)
        autocast = torch.autocast(scale.device, dtype, enabled=dtype is not None and not cast)
        with torch.inference_mode(), precisely(precision), autocast:
            return network(images)

    return run


def collected(network: Network, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: str) -> torch.Tensor:
    """Features of all batches on the CPU: while one is computed, the last one is copied."""
    rows: list[torch.Tensor] = []
    flying: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []

    def land() -> None:
        host, event = flying.pop(0)
        if event is not None:
            event.synchronize()
        rows.append(host.clone())

    for images, _ in batches:
        features = network(images.to(device, non_blocking=True))
        host = torch.empty(features.shape, dtype=features.dtype, pin_memory=device == "cuda")
        host.copy_(features, non_blocking=True)
        event = None
        if device == "cuda":
            event = torch.cuda.Event()
            event.record()
        flying.append((host, event))
        if len(flying) > 1:
            land()
    while flying:
        land()
    return torch.cat(rows)


def compiler_is_missing(scale: Scale) -> str:
    """Why ``torch.compile`` cannot be tried, "" when it can."""
    if scale.backend == "eager":
        return ""
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "no C compiler"
    return "" if find_spec("triton") else "no Triton"
