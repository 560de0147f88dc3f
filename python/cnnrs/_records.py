"""What crosses to Rust by name: dicts, whose keys and words the extension checks again.

Only types, which cost nothing to import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch

if TYPE_CHECKING:
    from cnnrs._cnnrs import Cache

# -- networks ------------------------------------------------------------------------------------------------

#: Operations of a graph: the PyTorch module that does the same, or the function.
OpKind = Literal[
    "Input", "Conv2d", "BatchNorm2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "Dropout",
    "StochasticDepth", "Flatten", "View",
    "Linear", "LayerNorm", "GroupNorm", "ResponseNorm", "Upsample", "ZeroPad2d", "Permute", "Scale", "Softmax", "Mean",
    "Add", "Mul", "Cat", "Split", "ChannelShuffle", "Attention", "WindowAttention", "PatchMerging", "Expand", "Shift",
    "ReLU", "ReLU6", "LeakyReLU", "SiLU", "GELU", "Hardswish", "Hardsigmoid", "Sigmoid", "Tanh",
]  # fmt: skip
#: Arguments of one operation, by name.
Attributes = dict[str, Any]
#: (name, kind, inputs, arguments) of an operation.
Node = tuple[str, OpKind, list[int], Attributes]

# -- kernels under autograd ----------------------------------------------------------------------------------


class Norm(TypedDict):
    """A batch norm and an activation behind it; all (C,)."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    eps: float
    activation: str


class BatchNormGradients(TypedDict):
    """Where the gradients of a batch norm go; None: not asked for. Images are (N, H, W, C)."""

    input: torch.Tensor | None
    residual: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor


class ConvolutionGradients(TypedDict):
    """Where those of a convolution and of the batch norm in front of it go; None: not asked for.

    With such a norm ``input`` is that of its result in front of the activation, with a gate that of the gate's result.
    """

    input: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    gate: torch.Tensor | None
    filters: torch.Tensor | None


class Late(TypedDict):
    """What is left to do to the derivative of a batch norm's result, to make it that of its input.

    Attributes:
        norm: its activation is what the derivative has not yet gone through.
        weight: its gradient, (C,).
        bias: its gradient, (C,).
        training: whether mean and variance are the batch's own.
        derivative: (N, H, W, C).
    """

    norm: Norm
    weight: torch.Tensor
    bias: torch.Tensor
    training: bool
    derivative: torch.Tensor


# -- training ------------------------------------------------------------------------------------------------


class Nll(TypedDict):
    """``nll_loss`` of reduction "mean"."""

    kind: Literal["nll"]
    weight: torch.Tensor | None
    ignore_index: int


class CrossEntropy(TypedDict):
    """``cross_entropy`` of reduction "mean"."""

    kind: Literal["cross_entropy"]
    weight: torch.Tensor | None
    ignore_index: int
    label_smoothing: float


class ValueLoss(TypedDict):
    """``mse_loss`` or ``binary_cross_entropy_with_logits`` of reduction "mean", without weights."""

    kind: Literal["mse", "bce_with_logits"]


ClassLoss = Nll | CrossEntropy
Loss = ClassLoss | ValueLoss


class Clip(TypedDict):
    """The largest norm of all gradients, or the largest absolute value of each."""

    kind: Literal["norm", "value"]
    most: float


class SgdState(TypedDict):
    """What SGD has for one parameter: its buffer, whether that has been used, and the group's options."""

    momentum_buffer: torch.Tensor | None
    used: bool
    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


class AdamState(TypedDict):
    """What Adam, or with ``decoupled`` AdamW, has for one parameter."""

    step: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    max_exp_avg_sq: torch.Tensor | None
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    decoupled: bool


class SgdRow(SgdState):
    """With the parameter itself."""

    parameter: torch.Tensor


class AdamRow(AdamState):
    """With the parameter itself."""

    parameter: torch.Tensor


class IndexedSgdRow(SgdState):
    """With the parameter's index in the graph."""

    parameter: int


class IndexedAdamRow(AdamState):
    """With the parameter's index in the graph."""

    parameter: int


class Epoch(TypedDict):
    """What every engine is told of an epoch; ``after`` is called with number and mean loss of every batch."""

    number: int
    phase: Literal["training", "validation"]
    accumulate: int
    after: Callable[[int, float], object] | None


class CpuTask(TypedDict):
    """What engine ``cpu`` makes of the model's output: no rows for validation; ``seed`` is that of dropout.

    ``unseen``: whether nobody looks at weights and optimizer before the epoch ends.
    """

    loss: Loss
    sgd: Sequence[IndexedSgdRow]
    adam: Sequence[IndexedAdamRow]
    clip: Clip | None
    workers: int
    seed: int
    unseen: bool


class EpochTotals(TypedDict):
    """`cnnrs.engine.losses.Totals` by name."""

    loss: float
    weight: float
    correct: int | None
    counted: int
    samples: int
    batches: int
    last: float | None
    gathered: int


# -- files ---------------------------------------------------------------------------------------------------


class Limits(TypedDict):
    """Pixels and bytes per file; None is the extension's own limit."""

    pixels: int | None
    bytes: int | None


class ReadOptions(TypedDict):
    """How the files of images are read, as for `cnnrs.DataLoader`; what is left to Python is an error here."""

    decode: Literal["exact", "scaled"]
    truncated: Literal["error", "accept"]
    exif: bool
    limits: Limits
    #: Files that may have samples of more than 8 bits, or several pages.
    deep: Literal["read", "leave"]
    paged: Literal["read", "leave"]


class Kept(TypedDict):
    """A cache, and behind how many operations its images are."""

    images: Cache
    ops: int


class RowFile(TypedDict):
    """A file of features: its journal, the rows in all where known, and whether to go on with what is there."""

    path: str | os.PathLike[str]
    journal: str | os.PathLike[str] | None
    total: int | None
    resume: bool


# -- operations on images ------------------------------------------------------------------------------------

Filter = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
PadMode = Literal["constant", "edge", "reflect", "symmetric"]
#: From, to.
Range = tuple[float, float]


class Resize(TypedDict):
    """To an exact size."""

    kind: Literal["resize"]
    height: int
    width: int
    filter: Filter


class ResizeShorter(TypedDict):
    """The shorter edge, the longer one to ``max_size`` at most."""

    kind: Literal["resize_shorter"]
    edge: int
    max_size: int | None
    filter: Filter


class CenterCrop(TypedDict):
    """Padded with black where the image is smaller."""

    kind: Literal["center_crop"]
    height: int
    width: int


class Crop(TypedDict):
    """A fixed window."""

    kind: Literal["crop"]
    top: int
    left: int
    height: int
    width: int


class Pad(TypedDict):
    """Left, top, right and bottom; three bytes of colour."""

    kind: Literal["pad"]
    border: Sequence[int]
    fill: Sequence[int]
    mode: PadMode


class RandomCrop(TypedDict):
    """Any window of that size."""

    kind: Literal["random_crop"]
    height: int
    width: int
    pad_if_needed: bool
    fill: Sequence[int]
    mode: PadMode


class RandomResizedCrop(TypedDict):
    """A window of drawn area and aspect ratio, resized."""

    kind: Literal["random_resized_crop"]
    height: int
    width: int
    scale: Range
    ratio: Range
    filter: Filter


class Grayscale(TypedDict):
    """One channel, or three equal ones."""

    kind: Literal["grayscale"]
    channels: int


class Flip(TypedDict):
    """With probability ``p``."""

    kind: Literal["horizontal_flip", "vertical_flip"]
    p: float


class Rotation(TypedDict):
    """Degrees counter-clockwise, drawn."""

    kind: Literal["rotation"]
    low: float
    high: float
    filter: Filter
    expand: bool
    center: Range | None
    fill: Sequence[int]


class Affine(TypedDict):
    """Degrees, shares of width and height, a factor, degrees along both axes; ``form`` is torchvision's version."""

    kind: Literal["affine"]
    degrees: Range
    translate: Range
    scale: Range
    shear: Sequence[Range]
    filter: Filter
    center: Range | None
    fill: Sequence[int]
    form: Literal["v1", "v2"]


class Adjust(TypedDict):
    """One of the four of ``ColorJitter``, its factor drawn."""

    kind: Literal["brightness", "contrast", "saturation", "hue"]
    low: float
    high: float


class Sharpness(TypedDict):
    """By a factor."""

    kind: Literal["sharpness"]
    factor: float


class Solarize(TypedDict):
    """Inverts what is not below the threshold."""

    kind: Literal["solarize"]
    threshold: float


class Posterize(TypedDict):
    """Keeps so many bits."""

    kind: Literal["posterize"]
    bits: int


class Plain(TypedDict):
    """Without arguments."""

    kind: Literal["invert", "equalize", "autocontrast"]


class RandomApply(TypedDict):
    """All of it with probability ``p``, or nothing."""

    kind: Literal["random_apply"]
    p: float
    ops: Sequence[Op]


class RandomChoice(TypedDict):
    """One of the branches."""

    kind: Literal["random_choice"]
    weights: Sequence[float]
    branches: Sequence[Sequence[Op]]


class RandomOrder(TypedDict):
    """All of the parts, in any order."""

    kind: Literal["random_order"]
    parts: Sequence[Sequence[Op]]


class Erase(TypedDict):
    """A rectangle of the tensor; no value is noise. Only as the last operation."""

    kind: Literal["erase"]
    p: float
    scale: Range
    ratio: Range
    value: Sequence[float]


Op = (
    Resize | ResizeShorter | CenterCrop | Crop | Pad | RandomCrop | RandomResizedCrop | Grayscale | Flip | Rotation
    | Affine | Adjust | Sharpness | Solarize | Posterize | Plain | RandomApply | RandomChoice | RandomOrder | Erase
)  # fmt: skip


class Scale(TypedDict):
    """Bytes, or 0 to 1."""

    kind: Literal["uint8", "float"]


class Normalize(TypedDict):
    """0 to 1, minus mean, by standard deviation."""

    kind: Literal["normalize"]
    mean: Sequence[float]
    std: Sequence[float]


class Table(TypedDict):
    """The float32 values of all bytes, (channels, 256)."""

    kind: Literal["table"]
    values: bytes


Finish = Scale | Normalize | Table


class Transform(TypedDict):
    """Operations on pixels, and how these become numbers: None returns pixels. ``pillow13``: passes as Pillow 13."""

    ops: Sequence[Op]
    finish: Finish | None
    pillow13: bool
