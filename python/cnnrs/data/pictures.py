"""Images in memory, of whatever kind, as the pictures that a file would give."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cnnrs.image.reading import to_rgb

_CHANNELS = (1, 3, 4)


def is_picture(value: Any) -> bool:
    """Whether it is an image, or a batch of them: of Pillow, an array or a tensor."""
    from PIL import Image

    return isinstance(value, (Image.Image, np.ndarray, torch.Tensor))


def pictures(value: Any, exif: bool = False, scale: str = "none") -> list[Any]:
    """PIL images in mode RGB, of one image or a batch.

    Args:
        value: a PIL image; an (H, W) or (H, W, C) array or an (N, H, W, C) batch of them; an (H, W) or (C, H, W) tensor
            or an (N, C, H, W) batch; C is 1 (gray), 3, or 4 (the last is left out); uint8, or floats from 0 to 1.
        exif: whether PIL images are turned upright as their EXIF data say.
        scale: how samples of more than 8 bits of PIL images become bytes, as for :class:`cnnrs.ImageFolder`. Once its
            pixels are loaded, a PIL image no longer knows of 16-bit colours: they stay the high bytes.

    Raises:
        ValueError: the shape, the type or the numbers are not those of an image.
    """
    from PIL import ExifTags, Image, ImageOps

    if isinstance(value, Image.Image):
        # Before it is turned, for then it has forgotten how deep its file is.
        image = to_rgb(value, scale)
        if exif:
            # Of a picture in memory only it has what it was given.
            orientation = ExifTags.Base.Orientation
            image.getexif()[orientation] = value.getexif().get(orientation, 1)
            image = ImageOps.exif_transpose(image)
        return [image]
    if isinstance(value, torch.Tensor):
        pixels = value.detach().cpu()
        # Which NumPy does not have.
        pixels = pixels.float() if pixels.dtype == torch.bfloat16 else pixels
        shape = "an (H, W), (C, H, W) or (N, C, H, W) tensor"
        fits = pixels.dim() == 2 or (pixels.dim() in (3, 4) and pixels.shape[-3] in _CHANNELS)
        array = (pixels if pixels.dim() < 3 else pixels.movedim(-3, -1)).numpy() if fits else np.empty(0)
    else:
        array = value
        shape = "an (H, W), (H, W, C) or (N, H, W, C) array"
        fits = array.ndim == 2 or (array.ndim in (3, 4) and array.shape[-1] in _CHANNELS)
    if not fits or 0 in array.shape[-3:]:
        raise ValueError(f"an image is {shape} with C = 1, 3 or 4, got shape {tuple(value.shape)}")
    levels = _levels(array)
    batch = levels if levels.ndim == 4 else levels[None]
    return [_picture(image) for image in batch]


def _picture(levels: np.ndarray) -> Any:
    from PIL import Image

    squeezed = levels[..., 0] if levels.ndim == 3 and levels.shape[-1] == 1 else levels
    return Image.fromarray(np.ascontiguousarray(squeezed)).convert("RGB")


def _levels(array: np.ndarray) -> np.ndarray:
    """As bytes."""
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8, copy=False)
    if array.dtype.kind != "f":
        raise ValueError(f"an image holds uint8, or floats from 0 to 1, got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    # Also where one of them is NaN.
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"an image of floats holds 0 to 1, got {low:g} to {high:g}: divide by 255, or give it as it was before it "
            "was normalised"
        )
    # What ToTensor made of a byte becomes that byte.
    levels: np.ndarray = np.rint(array * 255).astype(np.uint8)
    return levels
