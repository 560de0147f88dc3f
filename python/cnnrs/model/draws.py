"""What draws random numbers: an operation of the graph, or a frozen model, whose features are then one draw of many."""

from __future__ import annotations

import torch
from torch import nn

from cnnrs._records import Attributes, OpKind
from cnnrs._util.generators import Drawing
from cnnrs.model.lowering import Lowered


def is_own(kind: OpKind, attributes: Attributes) -> bool:
    """Whether it is a draw in the code of ``forward``, which nothing keeps from it, also where it keeps all."""
    return kind == "StochasticDepth" and attributes["keep"] is not None


def is_drawn(kind: OpKind, attributes: Attributes) -> bool:
    """Whether an operation draws."""
    drops = kind in ("Dropout", "StochasticDepth") and attributes.get("training", True) and attributes["p"] > 0.0
    return drops or is_own(kind, attributes)


def of_graph(lowered: Lowered) -> str:
    """Which operation of the graph draws, in words; "" when none does."""
    active = [name for name, kind, _, attributes in lowered.operations if is_drawn(kind, attributes)]
    return f"dropout that is always on ({active[0]})" if active else ""


def does_draw(model: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether the model itself draws from PyTorch's generator, whatever other threads do; calls it once more."""
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), Drawing() as drawing:
        model(inputs)
    return bool(drawing.drew)
