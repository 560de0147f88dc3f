"""torchvision's operations on one PIL image, as the records that Rust reads.

One function per class of torchvision, v1 or v2: it gets the object and the number of channels of the image (3 or 1)
and returns what Rust runs instead, or None where that would not be exactly the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from cnnrs._records import Adjust, Filter, Op, PadMode, RandomCrop, RandomResizedCrop, Range
from cnnrs._util.notes import note

Specs = tuple[Op, ...]

FILTERS: dict[Any, Filter] = {
    "nearest": "nearest",
    # Pillow has one nearest filter; torchvision maps both names to it.
    "nearest-exact": "nearest",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "box": "box",
    "hamming": "hamming",
    "lanczos": "lanczos",
}
# Pillow's own numbers, which torchvision accepts too.
PILLOW_FILTERS: dict[int, Filter] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Those that Pillow has for maps as well.
MAP_FILTERS = ("nearest", "bilinear", "bicubic")
PADDING_MODES: dict[Any, PadMode] = {
    "constant": "constant",
    "edge": "edge",
    "reflect": "reflect",
    "symmetric": "symmetric",
}


def _is_v2(step: Any) -> bool:
    return type(step).__module__.startswith("torchvision.transforms.v2")


def _filter(step: Any) -> Filter | None:
    return _filter_name(step.interpolation, _is_v2(step))


def _filter_name(interpolation: Any, v2: bool) -> Filter | None:
    if isinstance(interpolation, int):
        return PILLOW_FILTERS.get(interpolation)
    if isinstance(interpolation, str) and not v2:
        # An error in v1.
        return None
    return FILTERS.get(getattr(interpolation, "value", interpolation))


def _sizes(values: Any) -> bool:
    return all(type(v) is int and v > 0 for v in values)


def _fill(fill: Any, channels: int) -> list[int] | None:
    """Three bytes of colour."""
    if isinstance(fill, dict):
        return None
    values = list(fill) if isinstance(fill, (list, tuple)) else [0 if fill is None else fill]
    if len(values) not in (1, channels) or not all(isinstance(v, (int, float)) and 0 <= v < 256 for v in values):
        return None
    return [int(v) for v in values] * (3 if len(values) == 1 else 1)


def _center(center: Any) -> Range | None:
    return None if center is None else (float(center[0]), float(center[1]))


def _range(pair: Any) -> Range | None:
    low, high = (float(v) for v in pair)
    return (low, high) if low <= high else None


def _note_antialias(step: Any) -> None:
    if step.antialias is False:
        # torchvision's words: filters that users have set keep working.
        note("Anti-alias option is always applied for PIL Image input. Argument antialias is ignored.")


# -- sizes and windows -------------------------------------------------------------------------------------------------


def _resize(step: Any, _channels: int) -> Specs | None:
    size = [step.size] if isinstance(step.size, int) else step.size
    name = _filter(step)
    if size is None or name is None or not _sizes(size):
        return None
    _note_antialias(step)
    if len(size) == 2:
        if step.max_size is not None:
            return None
        return ({"kind": "resize", "height": size[0], "width": size[1], "filter": name},)
    if step.max_size is not None and not (type(step.max_size) is int and step.max_size > size[0]):
        return None
    return ({"kind": "resize_shorter", "edge": size[0], "max_size": step.max_size, "filter": name},)


def _center_crop(step: Any, _channels: int) -> Specs | None:
    size = list(step.size)
    if len(size) != 2 or not _sizes(size):
        return None
    return ({"kind": "center_crop", "height": size[0], "width": size[1]},)


def _border(padding: Any) -> list[int] | None:
    """Left, top, right, bottom; negative ones would crop."""
    values = list(padding) if isinstance(padding, (list, tuple)) else [padding]
    if len(values) not in (1, 2, 4) or not all(type(v) is int and v >= 0 for v in values):
        return None
    return values * (4 // len(values))


def _pad(step: Any, channels: int) -> Specs | None:
    border, fill, mode = _border(step.padding), _fill(step.fill, channels), PADDING_MODES.get(step.padding_mode)
    if border is None or fill is None or mode is None:
        return None
    return ({"kind": "pad", "border": border, "fill": fill, "mode": mode},)


def _random_crop(step: Any, channels: int) -> Specs | None:
    size = list(step.size)
    fill, mode = _fill(step.fill, channels), PADDING_MODES.get(step.padding_mode)
    if len(size) != 2 or not _sizes(size) or fill is None or mode is None:
        return None
    crop: RandomCrop = {
        "kind": "random_crop", "height": size[0], "width": size[1], "pad_if_needed": bool(step.pad_if_needed),
        "fill": fill, "mode": mode,
    }  # fmt: skip
    if step.padding is None:
        return (crop,)
    padding = step.padding
    if _is_v2(step):
        if step.pad_if_needed and step.padding_mode in ("reflect", "symmetric"):
            # v2 pads once for both reasons, which mirrors the image otherwise than padding twice.
            return None
        # v2 keeps left, right, top, bottom.
        padding = [padding[i] for i in (0, 2, 1, 3)]
    border = _border(padding)
    return None if border is None else ({"kind": "pad", "border": border, "fill": fill, "mode": mode}, crop)


def _random_resized_crop(step: Any, _channels: int) -> Specs | None:
    crop = _drawn_crop(step, _filter(step))
    if crop is None:
        return None
    _note_antialias(step)
    return (crop,)


def _drawn_crop(step: Any, name: Filter | None) -> RandomResizedCrop | None:
    size, scale, ratio = list(step.size), _range(step.scale), _range(step.ratio)
    if len(size) != 2 or not _sizes(size) or name is None or scale is None or ratio is None:
        return None
    if not (scale[0] >= 0 and ratio[0] > 0):
        return None
    return {
        "kind": "random_resized_crop", "height": size[0], "width": size[1], "scale": scale, "ratio": ratio,
        "filter": name,
    }  # fmt: skip


def _flip(kind: Literal["horizontal_flip", "vertical_flip"]) -> Callable[[Any, int], Specs | None]:
    return lambda step, _channels: ({"kind": kind, "p": float(step.p)},)


# -- maps --------------------------------------------------------------------------------------------------------------


def _rotation(step: Any, channels: int) -> Specs | None:
    name, degrees, fill = _filter(step), _range(step.degrees), _fill(step.fill, channels)
    if name is None or name not in MAP_FILTERS or degrees is None or fill is None:
        return None
    return (
        {
            "kind": "rotation", "low": degrees[0], "high": degrees[1], "filter": name, "expand": bool(step.expand),
            "center": _center(step.center), "fill": fill,
        },
    )  # fmt: skip


def _affine(step: Any, channels: int) -> Specs | None:
    name, degrees, fill = _filter(step), _range(step.degrees), _fill(step.fill, channels)
    scale = (1.0, 1.0) if step.scale is None else _range(step.scale)
    shear = [0.0, 0.0, 0.0, 0.0] if step.shear is None else [float(v) for v in step.shear]
    shear += [0.0] * (4 - len(shear))
    if name is None or name not in MAP_FILTERS or degrees is None or fill is None or scale is None:
        return None
    ranges = [found for pair in (shear[:2], shear[2:]) if (found := _range(pair)) is not None]
    if len(ranges) != 2:
        return None
    translate = (0.0, 0.0) if step.translate is None else (float(step.translate[0]), float(step.translate[1]))
    return (
        {
            "kind": "affine", "degrees": degrees, "translate": translate, "scale": scale, "shear": ranges,
            "filter": name, "center": _center(step.center), "fill": fill, "form": "v2" if _is_v2(step) else "v1",
        },
    )  # fmt: skip


# -- colours -----------------------------------------------------------------------------------------------------------


def _grayscale(step: Any, _channels: int) -> Specs | None:
    channels = step.num_output_channels
    return ({"kind": "grayscale", "channels": channels},) if channels in (1, 3) else None


def _rgb(_step: Any, channels: int) -> Specs | None:
    return ({"kind": "grayscale", "channels": 3},) if channels == 1 else ()


def _color_jitter(step: Any, _channels: int) -> Specs | None:
    ranges = [(name, getattr(step, name)) for name in _ADJUSTMENTS]
    parts: list[tuple[Adjust]] = [
        ({"kind": name, "low": pair[0], "high": pair[1]},) for name, pair in ranges if pair is not None
    ]
    return ({"kind": "random_order", "parts": parts},)


_ADJUSTMENTS: tuple[Literal["brightness", "contrast", "saturation", "hue"], ...] = (
    "brightness", "contrast", "saturation", "hue",
)  # fmt: skip


def _maybe(step: Any, op: Op) -> Specs:
    return ({"kind": "random_apply", "p": float(step.p), "ops": [op]},)


def _posterize(step: Any, _channels: int) -> Specs | None:
    bits = step.bits
    return _maybe(step, {"kind": "posterize", "bits": bits}) if type(bits) is int and 1 <= bits <= 8 else None


OPS: dict[str, Callable[[Any, int], Specs | None]] = {
    "Resize": _resize,
    "CenterCrop": _center_crop,
    "Pad": _pad,
    "RandomCrop": _random_crop,
    "RandomResizedCrop": _random_resized_crop,
    "RandomHorizontalFlip": _flip("horizontal_flip"),
    "RandomVerticalFlip": _flip("vertical_flip"),
    "RandomRotation": _rotation,
    "RandomAffine": _affine,
    "Grayscale": _grayscale,
    "RGB": _rgb,
    "RandomGrayscale": lambda step, channels: _maybe(step, {"kind": "grayscale", "channels": channels}),
    "ColorJitter": _color_jitter,
    "RandomAdjustSharpness": lambda step, _channels: _maybe(
        step, {"kind": "sharpness", "factor": float(step.sharpness_factor)}
    ),
    "RandomInvert": lambda step, _channels: _maybe(step, {"kind": "invert"}),
    "RandomSolarize": lambda step, _channels: _maybe(step, {"kind": "solarize", "threshold": float(step.threshold)}),
    "RandomPosterize": _posterize,
    "RandomEqualize": lambda step, _channels: _maybe(step, {"kind": "equalize"}),
    "RandomAutocontrast": lambda step, _channels: _maybe(step, {"kind": "autocontrast"}),
}


# -- timm's ------------------------------------------------------------------------------------------------------------


def _random_resized_crop_and_interpolation(step: Any, channels: int) -> Specs | None:
    """Torchvision's ``RandomResizedCrop``, whose filter may be drawn as well."""
    filters = step.interpolation if isinstance(step.interpolation, (list, tuple)) else [step.interpolation]
    # timm calls the functions of v1.
    found = [_drawn_crop(step, _filter_name(one, v2=False)) for one in filters]
    crops = [crop for crop in found if crop is not None]
    if len(crops) < len(found):
        return None
    if len(crops) == 1:
        return (crops[0],)
    return ({"kind": "random_choice", "weights": [1.0] * len(crops), "branches": [(crop,) for crop in crops]},)


TIMM_OPS: dict[str, Callable[[Any, int], Specs | None]] = {
    "RandomResizedCropAndInterpolation": _random_resized_crop_and_interpolation,
}
