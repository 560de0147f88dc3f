"""Which engines `fit` and `preconv` pick for a model, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from cnnrs.engine import cpu_inference, cuda_graph, memory_order
from cnnrs.engine.choice import Question, decide
from cnnrs.engine.cpu_inference import bf16_layers, int8_layers
from cnnrs.engine.frozen_front import Front, moving_statistics
from cnnrs.engine.verify import known_difference
from cnnrs.model.lowering import Lowered, lower
from cnnrs.model.modes import frozen
from cnnrs.model.operations import Unsupported


@dataclass(frozen=True)
class Explanation:
    """Why a model takes the engines it takes; prints as text.

    Attributes:
        engine: what ``engine="auto"`` picks for :func:`cnnrs.fit`: "cpu" or "python".
        operations: number of operations of the lowered graph, 0 for a model that cannot be taken apart.
        reasons: what keeps the model from engine "cpu", with the names of the layers; empty where that is taken.
        preconv: what it picks for :func:`cnnrs.preconv` of float32 images: "cpu", "python", or "open" where that
            depends on the images' size, which was not given.
        preconv_reasons: what keeps the frozen model from engine "cpu"; empty where that is taken, or open.
        order: on engine "python", in which order of memory a convolutional network gets its batches, and why.
        front: on engine "python", what native code computes of the network: its frozen front, or operations that have
            kernels; None: nothing.
        preconv_order: the same as ``order`` for :func:`cnnrs.preconv`.
        int8: which layers ``precision="int8"`` computes in int8 (or "bf16" in bfloat16), or why none; None where it was
            not asked for.
    """

    engine: str
    operations: int
    reasons: tuple[str, ...]
    preconv: str
    preconv_reasons: tuple[str, ...] = ()
    order: str | None = None
    front: str | None = None
    preconv_order: str | None = None
    int8: str | None = None

    def __str__(self) -> str:
        return "\n".join(filter(None, [self._fit(), self._preconv(), self.int8]))

    def _preconv(self) -> str:
        if self.preconv == "open":
            return "preconv: engine 'cpu' or 'python', which depends on the inputs' size: give explain() an input_shape"
        if self.preconv == "cpu":
            return "preconv: engine 'cpu', native code, equal to the model up to float rounding"
        said = [f"preconv: engine {self.preconv!r}, for the same reasons"]
        if self.preconv_reasons != self.reasons:
            said = [f"preconv: engine {self.preconv!r}, because", *listed(self.preconv_reasons)]
        return "\n".join([*said, *filter(None, [self.preconv_order])])

    def _fit(self) -> str:
        if self.engine == "cpu":
            return (
                f"engine 'cpu': all {self.operations} operations are compiled to native code; equal to the plain loop "
                "up to float rounding, without .grad. A loss or optimizer that it does not know, batches that are not "
                "float32, and amp take engine 'python', which has the plain loop's bits"
            )
        first = "engine 'python': the model is called as it is, once per batch, because"
        return "\n".join([first, *listed(self.reasons), *filter(None, [self.front, self.order])])

    __repr__ = __str__


def listed(reasons: Sequence[str], most: int = 8) -> list[str]:
    """Reasons as lines of text; of many the first few and how many more there are."""
    lines = [f"  - {reason}" for reason in reasons[:most]]
    return lines if len(reasons) <= most else [*lines, f"  ... and {len(reasons) - most} more"]


def explain(
    model: nn.Module, input_shape: Sequence[int] | None = None, *, precision: Literal["int8", "bf16"] | None = None
) -> Explanation:
    """Say in words which engines :func:`cnnrs.fit` and :func:`cnnrs.preconv` pick for ``model``, and why.

    Args:
        model: any module; for fit it is looked at in its present mode (train or eval), for preconv in eval mode. It is
            not changed.
        input_shape: (N, C, H, W) or (N, F) of a batch: some obstacles depend on it. None: (32, 3, 224, 224) for models
            that begin with a convolution of three channels and can run on that.
        precision: "int8" or "bf16": also which layers :func:`cnnrs.preconv` computes in that on a CPU when asked to.

    What the check on the first batch of an earlier ``fit`` or ``preconv`` has found is among the reasons.

    Returns:
        An object that prints as the explanation, with ``engine``, ``operations``, ``reasons`` and ``preconv``.

    Raises:
        TypeError: model is no ``nn.Module``.
        ValueError: a precision of which there is nothing to explain.
        RuntimeError: a layer cannot take what ``input_shape`` makes of it; the message names the layer.

    >>> import cnnrs
    >>> why = cnnrs.explain(cnnrs.models.MnistNet(), (32, 1, 28, 28))
    >>> why.engine, why.preconv
    ('cpu', 'cpu')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if precision not in (None, "int8", "bf16"):
        raise ValueError(f"precision must be 'int8', 'bf16' or None, got {precision!r}")
    with frozen(model):
        features = _question("preconv", model, input_shape)
        preconv = decide(features)
        preconv_order = memory_order.said_of_frozen(model) if preconv.engine == "python" else None
    fit = _question("fit", model, input_shape)
    lowered = fit.lowered
    # A shape decides, and none is known.
    is_open = preconv.engine == "cpu" and features.inputs is None
    trained = decide(fit)
    reasons = trained.reasons
    if lowered is not None and not fit.reasons:
        reasons += _recorded(lowered)
    operations = 0 if lowered is None or fit.reasons else len(lowered.graph) - 1
    order = memory_order.said(model) if trained.engine == "python" else None
    front = _said(trained.front, fit) if trained.engine == "python" else None
    return Explanation(
        trained.engine, operations, reasons, "open" if is_open else preconv.engine, preconv.reasons, order, front,
        preconv_order,
        None if precision is None else _SAID[precision](features, preconv.reasons),
    )  # fmt: skip


def _said_of_int8(question: Question, reasons: tuple[str, ...]) -> str:
    if reasons or question.lowered is None:
        return "precision='int8': refused, because engine 'cpu' cannot run the model"
    if question.inputs is None:
        return "precision='int8': which layers depends on the inputs' size: give explain() an input_shape"
    layers, count = int8_layers(question.lowered, list(question.inputs.shape))
    if not layers:
        return (
            "precision='int8': refused, because no layer would compute in int8: that takes convolutions or linear "
            "layers of 16 and more input channels in one group, behind the first layer"
        )
    head = f"precision='int8': {len(layers)} of {count} convolutions and linear layers, all others in float32:"
    return "\n".join([head, *listed(layers)])


def _said_of_bf16(question: Question, reasons: tuple[str, ...]) -> str:
    autocast = "precision='bf16': autocast of the module by PyTorch, because"
    if not cpu_inference.bf16_is_fast():
        return f"{autocast} this processor has no AVX512-BF16"
    if reasons or question.lowered is None:
        return f"{autocast} engine 'cpu' cannot run the model"
    if question.inputs is None:
        return "precision='bf16': which layers depends on the inputs' size: give explain() an input_shape"
    layers, count = bf16_layers(question.lowered, list(question.inputs.shape))
    if not layers:
        return f"{autocast} no layer would compute in bfloat16 on engine 'cpu'"
    head = f"precision='bf16': {len(layers)} of {count} convolutions and linear layers, all others in float32:"
    return "\n".join([head, *listed(layers)])


_SAID = {"int8": _said_of_int8, "bf16": _said_of_bf16}


def _recorded(lowered: Lowered) -> tuple[str, ...]:
    """What becomes of the steps of a model on a GPU."""
    device = next((tensor.device for tensor in lowered.tensors if tensor.device.type == "cuda"), None)
    if device is None:
        return ()
    if reason := cuda_graph.obstacle(lowered, F.cross_entropy, None, device):
        return (f"steps run one kernel after the other on {device}: {reason}",)
    return (
        f"whole steps are recorded on {device} once, and replayed; one kernel after the other with fp16, losses and "
        "optimizers of other kinds, class weights with label smoothing, and on_batch_end within a step of several "
        "batches",
    )


def _said(front: Front | None, question: Question) -> str | None:
    said = []
    how = "in native code, as in preconv: equal to the model up to float rounding"
    count = 0 if front is None else front.kernels.operations
    if front is not None and front.last == 0:
        said = [f"but {count} of its operations have native kernels, which large batches get where they are faster"]
    elif front is not None and front.is_all:
        said = [f"but large batches of validation: all {len(front.front.graph) - 1} operations run {how}"]
    elif front is not None:
        behind = f"; {count} operations behind it have native kernels" if count else ""
        said = [f"but everything up to {front.end} is frozen and runs {how}{behind}"]
    lowered, inputs = question.lowered, question.inputs
    if lowered is None or inputs is None or not question.training:
        return said[0] if said else None
    if name := moving_statistics(lowered, inputs, question.batches):
        said.append(
            f"{name} (BatchNorm2d) is frozen, but its statistics move: with cnnrs.freeze(module, statistics=True) they "
            "do not, and all layers in front of the first trained one run in native code, as in preconv"
        )
    return "; ".join(said) or None


def _question(purpose: Literal["fit", "preconv"], model: nn.Module, input_shape: Sequence[int] | None) -> Question:
    """What ``engine="auto"`` would be asked about float32 inputs of this shape, a known loss and optimizer."""
    try:
        lowered = _lowered(purpose, model, input_shape)
    except Unsupported as reasons:
        return Question(purpose, "auto", None, tuple(str(reasons).split("\n")))
    if reason := known_difference(model, lowered):
        return Question(purpose, "auto", lowered, (reason,))
    shape = _shape(lowered, input_shape)
    inputs = None if shape is None else torch.empty(1, dtype=torch.float32, device="cpu").expand(tuple(shape))
    return Question(purpose, "auto", lowered, inputs=inputs, training=model.training)


def _lowered(purpose: Literal["fit", "preconv"], model: nn.Module, input_shape: Sequence[int] | None) -> Lowered:
    """The model as operations, where need be, frozen, as those for images of one size.

    Raises:
        Unsupported: it has none; with the reasons of the last attempt, since the size answers those of the first.
    """
    try:
        return lower(model, gradients=purpose == "fit")
    except Unsupported:
        if purpose == "fit":
            raise
    return lower(model, False, (3, 224, 224) if input_shape is None else tuple(input_shape)[1:])


def _shape(lowered: Lowered, given: Sequence[int] | None) -> Sequence[int] | None:
    """The shape of a batch, as given or as networks for photos have it; None where there is no telling.

    Raises:
        RuntimeError: a layer cannot take the given shape.
    """
    if given is not None:
        lowered.graph.shapes(list(given))
        return given
    first = 0
    for index, (_, kind, inputs, attributes) in enumerate(lowered.operations):
        if inputs[:1] != [first]:
            continue
        if kind == "ZeroPad2d":
            first = index
        elif kind == "Conv2d":
            channels = lowered.tensors[attributes["weight"]].shape[1] * attributes["groups"]
            try:
                lowered.graph.shapes([1, 3, 224, 224])
            except RuntimeError:
                return None
            return (32, 3, 224, 224) if channels == 3 else None
        else:
            return None
    return None
