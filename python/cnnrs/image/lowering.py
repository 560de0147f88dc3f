"""torchvision's transforms, lowered to the operations of the Rust side.

Users never see this module: they write torchvision's own objects, v1 or v2, and ``lower`` finds out how much of the
chain Rust can run. It is right to refuse: whatever is not lowered runs as the user's own object, in Python.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from cnnrs._records import Erase, Finish, Normalize, Op
from cnnrs._util.notes import is_news, note
from cnnrs.image.ops import OPS, TIMM_OPS
from cnnrs.image.spec import Lowered, Native, Step
from cnnrs.image.wrappers import wrapped


def lower(transform: Step | None, channels: int) -> Lowered:
    """How to run ``transform`` on PIL images of ``channels`` channels: 3 (mode RGB) or 1 (mode L)."""
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
    """``steps`` on PIL images of ``channels`` channels, when Rust knows all of them and they end in a tensor."""
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


def _note(steps: Iterable[Step]) -> None:
    new = [name for name in map(_name, steps) if is_news(("in Python", name))]
    if new:
        note(
            f"cnnrs.DataLoader: {', '.join(new)} {'runs' if len(new) == 1 else 'run'} in Python, one sample at a time; "
            "the rest of the transform runs in threads"
        )


def _name(step: Step) -> str:
    named = getattr(step, "__qualname__", None)
    return named if isinstance(named, str) else type(step).__name__


def _flatten(transform: Any) -> Iterable[Step]:
    if transform is None:
        return
    kind = _kind(transform)
    inner = None if kind else wrapped(transform)
    if inner is not None:
        for step in inner:
            yield from _flatten(step)
    elif kind in ("v1.Compose", "v2.Compose", "nn.Sequential"):
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
    "timm": "timm.data.transforms",
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
    """Steps that were understood so far, on images of ``channels`` channels."""

    channels: int
    ops: list[Op] = field(default_factory=list)
    # What the steps since the image became a tensor make of every pixel value: (channels, 1, 256).
    values: torch.Tensor | None = None
    scaled: bool = False
    normalize: Normalize | None = None
    erase: Erase | None = None
    array: bool = False

    def add(self, step: Step) -> bool:
        """Whether the step was understood; if not, the chain ends before it."""
        kind = _kind(step)
        name = kind.partition(".")[2]
        if kind in ("nn.Identity", "v2.Identity"):
            return True
        if kind in MAYBE:
            # Nothing is left to do where the image is a tensor already.
            return not self.array and (self.values is not None or self._start_values(step, MAYBE[kind]))
        if self.array or kind in ("timm.ToNumpy", "timm.ToTensor"):
            return not self.array and self.values is None and self._start_bytes(step, kind)
        if self.erase is not None:
            # What is erased stays erased: nothing that moves or changes values may slip in front.
            return kind == "v2.ToPureTensor" and self._add_to_values(step, kind)
        if self.values is not None and name == "RandomErasing":
            self.erase = _erasing(step, self.channels, self.values.dtype)
            return self.erase is not None
        if self.values is not None and name not in ("RandomHorizontalFlip", "RandomVerticalFlip"):
            return self._add_to_values(step, kind)
        if name in ("ToTensor", "PILToTensor") or kind == "v2.ToImage":
            return self._start_values(step, name)
        # Flips of the tensor move pixels only, so that they may as well run before those become numbers.
        lowered = _lower_op(step, self.channels)
        if lowered is None:
            return False
        specs, self.channels = lowered
        self.ops.extend(specs)
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

    def _start_bytes(self, step: Any, kind: str) -> bool:
        dtype = torch.uint8 if kind == "timm.ToNumpy" else getattr(step, "dtype", None)
        if dtype not in (torch.uint8, torch.float32):
            return False
        self.values = torch.arange(256, dtype=dtype).repeat(self.channels, 1, 1)
        self.array = kind == "timm.ToNumpy"
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
        ops = (*self.ops, self.erase) if self.erase is not None else tuple(self.ops)
        return Native(ops, self._finish(), wraps=type(self.values) not in (torch.Tensor, type(None)), array=self.array)

    def _finish(self) -> Finish | None:
        if self.values is None:
            return None
        values = self.values.as_subclass(torch.Tensor)
        pixels = torch.arange(256, dtype=torch.uint8).repeat(self.channels, 1, 1)
        if values.dtype == torch.uint8:
            return {"kind": "uint8"} if torch.equal(values, pixels) else None
        unit = pixels.float().div(255)
        if torch.equal(values, unit):
            return {"kind": "float"}
        if self.normalize is not None:
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.normalize["mean"], self.normalize["std"]))
            if torch.equal(values, unit.sub(mean).div(std)):
                return self.normalize
        return {"kind": "table", "values": values.contiguous().numpy().tobytes()}


# timm's, which convert what is not a tensor yet.
MAYBE = {"timm.MaybeToTensor": "ToTensor", "timm.MaybePILToTensor": "PILToTensor"}
_POINTWISE = {
    "v1.Normalize",
    "v1.ConvertImageDtype",
    "v2.Normalize",
    "v2.ConvertImageDtype",
    "v2.ToDtype",
    "v2.ToPureTensor",
}


def _lower_op(step: Step, channels: int) -> tuple[tuple[Op, ...], int] | None:
    """The operations that ``step`` is on PIL images of ``channels`` channels, and the channels behind it."""
    version, _, name = _kind(step).partition(".")
    if version not in ("v1", "v2", "timm"):
        return None
    if name in _GROUPS and version != "timm":
        return _GROUPS[name](step, channels)
    op = (TIMM_OPS if version == "timm" else OPS).get(name)
    specs = op(step, channels) if op is not None else None
    if specs is None:
        return None
    if name in ("Grayscale", "RGB"):
        channels = getattr(step, "num_output_channels", 3)
    return specs, channels


def _lower_ops(step: Any, channels: int) -> tuple[Op, ...] | None:
    """``_lower_op`` of everything in ``step``, when it does not change the number of channels."""
    specs: list[Op] = []
    behind = channels
    for part in _flatten(step):
        if _kind(part) in ("nn.Identity", "v2.Identity"):
            continue
        lowered = _lower_op(part, behind)
        if lowered is None:
            return None
        specs.extend(lowered[0])
        behind = lowered[1]
    return tuple(specs) if behind == channels else None


def _branches(steps: Iterable[Any], channels: int) -> list[tuple[Op, ...]] | None:
    branches = [_lower_ops(step, channels) for step in steps]
    return [ops for ops in branches if ops is not None] if None not in branches else None


def _random_apply(step: Any, channels: int) -> tuple[tuple[Op, ...], int] | None:
    parts = _branches(step.transforms, channels)
    if parts is None:
        return None
    return ({"kind": "random_apply", "p": float(step.p), "ops": [op for ops in parts for op in ops]},), channels


def _random_choice(step: Any, channels: int) -> tuple[tuple[Op, ...], int] | None:
    branches = _branches(step.transforms, channels)
    weights = [1.0] * len(step.transforms) if step.p is None else [float(p) for p in step.p]
    if not branches or len(weights) != len(branches) or not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
        return None
    return ({"kind": "random_choice", "weights": weights, "branches": branches},), channels


def _random_order(step: Any, channels: int) -> tuple[tuple[Op, ...], int] | None:
    parts = _branches(step.transforms, channels)
    return None if parts is None else (({"kind": "random_order", "parts": parts},), channels)


_GROUPS: dict[str, Callable[[Any, int], tuple[tuple[Op, ...], int] | None]] = {
    "RandomApply": _random_apply,
    "RandomChoice": _random_choice,
    "RandomOrder": _random_order,
}


def _erasing(step: Any, channels: int, dtype: torch.dtype) -> Erase | None:
    value = step.value
    if value is None or value == "random":
        values = []
    else:
        values = [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)]
        if len(values) not in (1, channels):
            return None
    if dtype == torch.uint8 and not (values and all(0 <= v < 256 for v in values)):
        return None
    scale, ratio = ((float(pair[0]), float(pair[1])) for pair in (step.scale, step.ratio))
    return {"kind": "erase", "p": float(step.p), "scale": scale, "ratio": ratio, "value": values}


def _normalize(step: Any, channels: int) -> Normalize | None:
    mean, std = (torch.as_tensor(v, dtype=torch.float32).flatten().tolist() for v in (step.mean, step.std))
    if len(mean) not in (1, channels) or len(std) not in (1, channels):
        return None
    return {
        "kind": "normalize", "mean": mean * (channels // len(mean)), "std": std * (channels // len(std)),
    }  # fmt: skip
