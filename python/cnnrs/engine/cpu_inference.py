"""Features on engine ``cpu``: the frozen graph in native code, without libtorch."""

from __future__ import annotations

import torch

from cnnrs import _cnnrs
from cnnrs._util import intraop, plain
from cnnrs.model.lowering import Lowered


def obstacle(lowered: Lowered, images: torch.Tensor) -> str | None:
    """Why engine ``cpu`` cannot compute features of ``images``; None where it can.

    Args:
        lowered: the frozen model.
        images: a batch, (N, C, H, W) or (N, F).
    """
    for name, tensor in [
        ("the batch", images),
        *((f"a parameter of shape {list(t.shape)}", t) for t in lowered.tensors),
    ]:
        if not plain.is_plain(tensor):
            return f"it reads ordinary tensors, but {name} is {plain.said(tensor)}"
        # Counters of batch norm are integers, and nobody reads them here.
        if tensor.device.type != "cpu" or (tensor.dtype != torch.float32 and tensor.is_floating_point()):
            return f"it computes in float32 on the CPU, but {name} is {tensor.dtype} on {tensor.device}"
    if images.dtype != torch.float32 or images.ndim not in (2, 4) or images.numel() == 0:
        return f"it reads float32 images (N, C, H, W) or vectors (N, F), not {images.dtype} {list(images.shape)}"
    if lowered.image not in (None, tuple(images.shape[1:])):
        return f"its operations are those for images {list(lowered.image or ())}, not {list(images.shape[1:])}"
    return _cnnrs.CpuNetwork.obstacle(lowered.graph, _in_order(lowered), list(images.shape))


def int8_layers(lowered: Lowered, shape: list[int]) -> tuple[list[str], int]:
    """The layers that ``precision="int8"`` computes in int8, and how many convolutions and linear layers there are.

    Args:
        lowered: the frozen model, which the engine can compute.
        shape: (N, C, H, W) or (N, F) of a batch.
    """
    return _cnnrs.CpuNetwork.byte_layers(lowered.graph, _in_order(lowered), shape, False)


def bf16_layers(lowered: Lowered, shape: list[int]) -> tuple[list[str], int]:
    """The same for ``precision="bf16"``."""
    return _cnnrs.CpuNetwork.byte_layers(lowered.graph, _in_order(lowered), shape, True)


def bf16_is_fast() -> bool:
    """Whether this processor multiplies bfloat16 (AVX512-BF16): without, ``precision="bf16"`` is PyTorch's autocast."""
    return _cnnrs.CpuNetwork.bf16_is_fast()


def _in_order(lowered: Lowered) -> list[torch.Tensor]:
    """The model's tensors; those of a model in channels_last are copied, all others are read where they are."""
    return [tensor.contiguous() for tensor in lowered.tensors]


def network(lowered: Lowered, *, exact: bool = False, beside: bool = False) -> _cnnrs.CpuNetwork:
    """The engine that computes features, where :func:`obstacle` has found none.

    It is taken wherever it can run: its rounding is libtorch's, its convolutions are faster.

    Args:
        lowered: the frozen model.
        exact: no Winograd convolution.
        beside: between operations of PyTorch, whose threads are used: they spin for milliseconds when they have done
            one, on the cores that others would need.

    Returns:
        A callable from (N, C, H, W) to (N, ...) float32.
    """
    library = intraop.library() if beside else None
    return _cnnrs.CpuNetwork(lowered.graph, _in_order(lowered), torch.get_num_threads(), exact, library)
