"""torchvision's transforms, lowered to the operations of the Rust side.

Users never see this module: they write torchvision's own objects, v1 or v2, and `lower` finds out how much of the chain
Rust can run. It is right to refuse: whatever is not lowered runs as the user's own object, in Python.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

# ("resize", height, width, filter) and the like, or ("normalize", mean, std) and the like: what `_cnnrs.Loader` reads.
Spec = tuple[Any, ...]
Step = Callable[[Any], Any]

FILTERS = {
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
PILLOW_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class Native:
    """Steps that Rust runs: operations on pixels, and how the pixels become numbers (None: they stay a PIL image)."""

    ops: tuple[Spec, ...] = ()
    finish: Spec | None = None
    # The user's chain ends in a `tv_tensors.Image`.
    wraps: bool = False


@dataclass(frozen=True)
class Lowered:
    """A transform as Rust - Python - Rust.

    `first` runs in threads. `python` are the user's own objects from the first to the last that Rust does not know.
    `rest` runs in Rust again if those return PIL images (see `lower_rest`), and as the user's objects otherwise.
    """

    first: Native
    python: tuple[Step, ...] = ()
    rest: tuple[Step, ...] = ()


def lower(transform: Step | None, channels: int) -> Lowered:
    """How to run `transform` on PIL images of `channels` channels: 3 (mode RGB) or 1 (mode L)."""
    steps = list(_flatten(transform))
    chain = _Chain(channels)
    known = next((i for i, step in enumerate(steps) if not chain.add(step)), len(steps))
    first = chain.native()
    if known == len(steps):
        return Lowered(first)
    # The shortest Python part: everything behind it is known, if it gets a PIL image.
    end = len(steps)
    if first.finish is None:
        end = next(i for i in range(known + 1, len(steps) + 1) if i == len(steps) or lower_rest(steps[i:], 3))
    _note(steps[known:end])
    return Lowered(first, tuple(steps[known:end]), tuple(steps[end:]))


def lower_rest(steps: Sequence[Step], channels: int) -> Native | None:
    """`steps` on PIL images of `channels` channels, when Rust knows all of them and they end in a tensor."""
    chain = _Chain(channels)
    native = chain.native() if all(chain.add(step) for step in steps) else None
    return native if native is not None and native.finish is not None else None


def pillow13() -> bool:
    """Whether the installed Pillow resizes as Pillow 13 does: it changed the order of the two passes."""
    import PIL

    return int(PIL.__version__.split(".")[0]) >= 13


def wants_info(lowered: Lowered) -> bool:
    """Whether a PIL image meets code that may look at its metadata: anything but torchvision's own operations."""
    if lowered.first.finish is not None:
        return False
    blind = [_kind(step) for step in lowered.python]
    return not blind or any(not kind or kind.partition(".")[2] in _CALLERS for kind in blind)


_CALLERS = {"Lambda", "RandomApply", "RandomChoice", "RandomOrder"}
_noted: set[str] = set()


def _note(steps: Iterable[Step]) -> None:
    names = [_name(step) for step in steps]
    new = [name for name in dict.fromkeys(names) if name not in _noted]
    _noted.update(new)
    if new:
        note(
            f"cnnrs.DataLoader: {', '.join(new)} {'runs' if len(new) == 1 else 'run'} in Python, one sample at a time; "
            "the rest of the transform runs in threads"
        )


def note(message: str) -> None:
    """A warning at the user's line, however deep in cnnrs and torch it is found out."""
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("cnnrs", "torch"):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


def _name(step: Step) -> str:
    named = getattr(step, "__qualname__", None)
    return named if isinstance(named, str) else type(step).__name__


def _flatten(transform: Any) -> Iterable[Step]:
    if transform is None:
        return
    kind = _kind(transform)
    if kind in ("v1.Compose", "v2.Compose", "nn.Sequential"):
        for step in transform if kind == "nn.Sequential" else transform.transforms:
            yield from _flatten(step)
    elif kind == "presets.ImageClassification":
        from torchvision import transforms

        yield transforms.Resize(transform.resize_size, transform.interpolation, antialias=transform.antialias)
        yield transforms.CenterCrop(transform.crop_size)
        yield transforms.PILToTensor()
        yield transforms.ConvertImageDtype(torch.float32)
        yield transforms.Normalize(transform.mean, transform.std)
    else:
        yield transform


@lru_cache(maxsize=4)
def _kinds(_imported: tuple[bool, ...]) -> dict[type, str]:
    kinds: dict[type, str] = {torch.nn.Sequential: "nn.Sequential", torch.nn.Identity: "nn.Identity"}
    for short, module_name in MODULES.items():
        module = sys.modules.get(module_name)
        for name, value in vars(module).items() if module is not None else ():
            if isinstance(value, type):
                kinds.setdefault(value, f"{short}.{name}")
    return kinds


MODULES = {
    "v1": "torchvision.transforms.transforms",
    "v2": "torchvision.transforms.v2",
    "presets": "torchvision.transforms._presets",
}


def _kind(step: Any) -> str:
    """The name of a transform of torchvision, "" for anything else, subclasses and patched objects included."""
    # A transform the user has made comes from a module that is imported; importing the others would only cost time.
    kind = _kinds(tuple(name in sys.modules for name in MODULES.values())).get(type(step), "")
    if isinstance(step, torch.nn.Module) and (
        step._forward_hooks or step._forward_pre_hooks or "forward" in step.__dict__
    ):
        return ""
    return kind


@dataclass
class _Chain:
    """Steps that were understood so far, on images of `channels` channels."""

    channels: int
    ops: list[Spec] = field(default_factory=list)
    # What the steps since the image became a tensor make of every pixel value: (channels, 1, 256).
    values: torch.Tensor | None = None
    scaled: bool = False
    normalize: Spec | None = None

    def add(self, step: Step) -> bool:
        """Whether the step was understood; if not, the chain ends before it."""
        kind = _kind(step)
        version, _, name = kind.partition(".")
        if kind == "nn.Identity" or kind == "v2.Identity":
            return True
        if name in ("RandomHorizontalFlip", "RandomVerticalFlip"):
            # They move pixels only, so that they may as well run before those become numbers.
            self.ops.append(("horizontal_flip" if "Horizontal" in name else "vertical_flip", float(step.p)))  # type: ignore[attr-defined]
            return True
        if self.values is not None:
            return self._add_to_values(step, kind)
        if name in ("ToTensor", "PILToTensor") or kind == "v2.ToImage":
            return self._start_values(step, name)
        op = _OPS.get(name) if version in ("v1", "v2") else None
        spec = op(step, self.channels) if op is not None else None
        if spec is None:
            return False
        self.ops.append(spec)
        if name == "Grayscale":
            self.channels = spec[1]
        return True

    def _start_values(self, step: Step, name: str) -> bool:
        values = torch.arange(256, dtype=torch.uint8).repeat(self.channels, 1, 1)
        if name == "ToTensor":
            from torchvision.transforms.functional import to_tensor

            values = to_tensor(values.permute(1, 2, 0).numpy())
            if values.dtype != torch.float32:
                return False
            self.scaled = True
        elif name == "ToImage":
            values = step(values)
        self.values = values
        return True

    def _add_to_values(self, step: Step, kind: str) -> bool:
        if kind not in _POINTWISE or self.values is None:
            return False
        try:
            values = step(self.values.clone())
        except Exception:
            # The user's mistake; it is raised where the user's object meets the first image.
            return False
        if values.shape != self.values.shape or values.dtype not in (torch.uint8, torch.float32):
            return False
        unchanged = values.dtype == self.values.dtype and torch.equal(values, self.values)
        if values.dtype == torch.uint8 and not unchanged:
            return False
        if kind.endswith(".Normalize") and self.scaled:
            self.normalize = _normalize(step, self.channels)
            self.scaled = False
        elif not unchanged:
            self.normalize = None
            self.scaled = kind == "v1.ConvertImageDtype" and self.values.dtype == torch.uint8
        self.values = values
        return True

    def native(self) -> Native:
        return Native(tuple(self.ops), self._finish(), wraps=type(self.values) not in (torch.Tensor, type(None)))

    def _finish(self) -> Spec | None:
        if self.values is None:
            return None
        values = self.values.as_subclass(torch.Tensor)
        pixels = torch.arange(256, dtype=torch.uint8).repeat(self.channels, 1, 1)
        if values.dtype == torch.uint8:
            return ("uint8",) if torch.equal(values, pixels) else None
        unit = pixels.float().div(255)
        if torch.equal(values, unit):
            return ("float",)
        if self.normalize is not None:
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in self.normalize[1:])
            if torch.equal(values, unit.sub(mean).div(std)):
                return self.normalize
        return ("table", values.contiguous().numpy().tobytes())


_POINTWISE = {
    "v1.Normalize",
    "v1.ConvertImageDtype",
    "v2.Normalize",
    "v2.ConvertImageDtype",
    "v2.ToDtype",
    "v2.ToPureTensor",
}


def _normalize(step: Any, channels: int) -> Spec | None:
    mean, std = (torch.as_tensor(v, dtype=torch.float32).flatten().tolist() for v in (step.mean, step.std))
    if len(mean) not in (1, channels) or len(std) not in (1, channels):
        return None
    return ("normalize", mean * (channels // len(mean)), std * (channels // len(std)))


def _filter(interpolation: Any) -> str | None:
    if isinstance(interpolation, int):
        return PILLOW_FILTERS.get(interpolation)
    return FILTERS.get(getattr(interpolation, "value", interpolation))


def _sizes(values: Any) -> bool:
    return all(type(v) is int and v > 0 for v in values)


def _resize(step: Any, _channels: int) -> Spec | None:
    size = [step.size] if isinstance(step.size, int) else step.size
    name = _filter(step.interpolation)
    if size is None or name is None or not _sizes(size):
        return None
    if step.antialias is False:
        note("Anti-alias option is always applied for PIL Image input. Argument antialias is ignored.")
    if len(size) == 2:
        return ("resize", size[0], size[1], name) if step.max_size is None else None
    if step.max_size is not None and not (type(step.max_size) is int and step.max_size > size[0]):
        return None
    return ("resize_shorter", size[0], step.max_size, name)


def _center_crop(step: Any, _channels: int) -> Spec | None:
    size = list(step.size)
    return ("center_crop", size[0], size[1]) if len(size) == 2 and _sizes(size) else None


def _grayscale(step: Any, _channels: int) -> Spec | None:
    return ("grayscale", step.num_output_channels) if step.num_output_channels in (1, 3) else None


def _rotation(step: Any, channels: int) -> Spec | None:
    name = _filter(step.interpolation)
    low, high = (float(angle) for angle in step.degrees)
    fill: Any = step.fill
    if name not in ("nearest", "bilinear") or not low <= high or isinstance(fill, dict):
        return None
    fill = list(fill) if isinstance(fill, (list, tuple)) else [0 if fill is None else fill]
    if len(fill) not in (1, channels) or not all(isinstance(v, (int, float)) and 0 <= v < 256 for v in fill):
        return None
    color = [int(v) for v in fill]
    center = None if step.center is None else (float(step.center[0]), float(step.center[1]))
    return ("rotation", low, high, name, bool(step.expand), center, color * 3 if len(color) == 1 else color)


_OPS: dict[str, Callable[[Any, int], Spec | None]] = {
    "Resize": _resize,
    "CenterCrop": _center_crop,
    "Grayscale": _grayscale,
    "RandomRotation": _rotation,
}
