"""Features on engine ``cpu``: the frozen graph in native code, without libtorch."""

from __future__ import annotations

import torch

from cnnrs import _cnnrs
from cnnrs.errors import UnsupportedModelError
from cnnrs.graph import Lowered


def obstacle(lowered: Lowered, images: torch.Tensor) -> str | None:
    """Why engine ``cpu`` cannot compute features of ``images``; None where it can.

    Args:
        lowered: the frozen model.
        images: a batch, (N, C, H, W) or (N, F).
    """
    parameters = [(f"a parameter of shape {list(t.shape)}", t) for t in lowered.tensors]
    for name, tensor in [("the batch", images), *parameters]:
        # Counters of batch norm are integers, and nobody reads them here.
        if tensor.device.type != "cpu" or (tensor.dtype != torch.float32 and tensor.is_floating_point()):
            return f"it computes in float32 on the CPU, but {name} is {tensor.dtype} on {tensor.device}"
    if images.dtype != torch.float32 or images.ndim not in (2, 4) or images.numel() == 0:
        return f"it reads float32 images (N, C, H, W) or vectors (N, F), not {images.dtype} {list(images.shape)}"
    return _cnnrs.CpuNetwork.obstacle(lowered.graph, lowered.tensors, list(images.shape))


def network(
    lowered: Lowered, images: torch.Tensor, *, required: bool = False, exact: bool = False
) -> _cnnrs.CpuNetwork | None:
    """The engine that computes features of batches like ``images``, or None where libtorch is to do it.

    It is taken wherever it can run: its rounding is libtorch's, its convolutions are faster.

    Args:
        lowered: the frozen model.
        images: the first batch; what the engine can run depends on its type and size.
        required: engine="cpu" was asked for.
        exact: no Winograd convolution.

    Returns:
        A callable from (N, C, H, W) to (N, ...) float32, or None.

    Raises:
        UnsupportedModelError: ``required``, but it cannot run; the message names the operation.
    """
    reason = obstacle(lowered, images)
    if reason is None:
        return _cnnrs.CpuNetwork(lowered.graph, lowered.tensors, exact)
    if required:
        raise UnsupportedModelError(f"engine 'cpu' cannot run this model: {reason}")
    return None
