"""torchvision's deterministic transforms on tensors of a device, for images that are decoded there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from cnnrs._records import Op, Pad
from cnnrs.image.spec import Lowered

#: (C, H, W) uint8 to the same.
OnDevice = Callable[[torch.Tensor], torch.Tensor]
# Pillow's nearest takes the pixel in the middle.
_FILTERS = {"nearest": "NEAREST_EXACT", "bilinear": "BILINEAR", "bicubic": "BICUBIC"}


def steps_of(lowered: Lowered) -> list[OnDevice]:
    """A transform up to the bytes that become numbers.

    Raises:
        ValueError: it has other steps than those that are the same for all images and known here; names them.
    """
    first = lowered.first
    steps = [_step(op) for op in first.ops]
    others = [_named(op) for op, step in zip(first.ops, steps, strict=True) if step is None]
    others += [getattr(step, "__qualname__", type(step).__name__) for step in (*lowered.python, *lowered.rest)]
    if not others and (first.finish is None or first.array):
        others.append("no ToTensor")
    if others:
        raise ValueError(
            'decode="gpu" takes Resize (nearest, bilinear or bicubic), CenterCrop, Pad and Grayscale, then ToTensor or '
            f'PILToTensor, then Normalize; this transform has {", ".join(others)}: leave decode="exact"'
        )
    return [step for step in steps if step is not None]


def _named(op: Op) -> str:
    return f"{op['kind']} ({op['filter']})" if op["kind"] in ("resize", "resize_shorter") else op["kind"]


def _step(op: Op) -> OnDevice | None:
    """Torchvision's own code, which rounds to bytes behind every step as Pillow does, where it has Pillow's numbers."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    if op["kind"] == "resize" or op["kind"] == "resize_shorter":
        name = _FILTERS.get(op["filter"])
        if name is None:
            return None
        size, most = ([op["height"], op["width"]], None) if op["kind"] == "resize" else ([op["edge"]], op["max_size"])
        return lambda image: F.resize(image, size, InterpolationMode[name], max_size=most, antialias=True)
    if op["kind"] == "center_crop":
        return lambda image: F.center_crop(image, [op["height"], op["width"]])
    if op["kind"] == "pad":
        if op["mode"] != "constant":
            return lambda image: _mirrored(image, op)
        return lambda image: F.pad(image, list(op["border"]), [float(v) for v in op["fill"][: len(image)]])
    if op["kind"] == "grayscale":
        return lambda image: _gray(image).expand(op["channels"], -1, -1)
    return None


def _mirrored(image: torch.Tensor, op: Pad) -> torch.Tensor:
    """Padded with its own pixels by NumPy's rule, also beyond its size, which torchvision's tensors do not know."""
    left, top, right, bottom = op["border"]
    for dim, border in ((-2, (top, bottom)), (-1, (left, right))):
        places = torch.from_numpy(np.pad(np.arange(image.shape[dim]), border, op["mode"]))
        image = image.index_select(dim, places.to(image.device))
    return image


def _gray(image: torch.Tensor) -> torch.Tensor:
    """(1, H, W) with Pillow's numbers; torchvision's cut fractions off, so that all is darker and white is 254."""
    if len(image) == 1:
        return image
    red, green, blue = image.to(torch.int32)
    mixed: torch.Tensor = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)
    return mixed[None]
