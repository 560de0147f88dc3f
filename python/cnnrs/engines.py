"""Which engine runs a model, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from cnnrs import _cnnrs, cpu_engine, cpu_features
from cnnrs.companion import libtorch
from cnnrs.errors import UnsupportedModelError
from cnnrs.graph import Lowered, lower
from cnnrs.operations import Unsupported
from cnnrs.verify import known_difference

Engine = Literal["auto", "cpu", "torch", "python"]


def choose(model: nn.Module, engine: Engine, gradients: bool = True) -> Lowered | None:
    """The lowered model for engines ``torch`` and ``cpu``, or None for engine ``python``.

    Args:
        model: the module, in the mode it will run in.
        engine: as for :func:`cnnrs.fit`; "auto" never takes "torch".
        gradients: whether its results will be differentiated.

    Raises:
        UnsupportedModelError: engine is "torch" or "cpu" and the model cannot be lowered; the message says why.
        ImportError: engine is "torch", and its package is not installed.
        ValueError: engine is not one of the four.
        TypeError: model is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(map(repr, get_args(Engine)))}, got {engine!r}")
    if engine == "python":
        return None
    if engine == "torch":
        libtorch()
    try:
        return lower(model, gradients)
    except Unsupported as reasons:
        if engine != "auto":
            raise UnsupportedModelError(f"engine {engine!r} cannot run this model:\n{reasons}") from None
        return None


def slow_on_cpu(lowered: Lowered) -> list[str]:
    """Operations that PyTorch trains at least as fast as engine ``cpu``, where they are most of a model's work.

    Convolutions with a max-pool behind them, and linear layers, have kernels of their own in engine ``cpu``: several
    times as fast. All others become matrix products, in which PyTorch is as good. Where these hold more than half of
    the convolutions' weights, "auto" takes ``python``.
    """
    return [
        f"{lowered.names[node]} (Conv2d): no faster kernel than PyTorch's (not 3x3 or 5x5, stride 1, then a max-pool)"
        for node in _cnnrs.cpu_slow(lowered.graph)
    ]


#: Operations that engine ``cpu`` computes for features only.
_FEATURES_ONLY = frozenset({"LayerNorm", "Permute", "Scale", "ZeroPad2d"})


def _fit_obstacles(lowered: Lowered, shape: Sequence[int] | None) -> list[str]:
    """Why "auto" does not take ``cpu`` for :func:`cnnrs.fit`; ``shape`` is that of the inputs, where known."""
    reasons = cpu_engine.tensor_obstacles(lowered) or slow_on_cpu(lowered)
    if reasons:
        return reasons
    if shape is not None:
        obstacle = _cnnrs.cpu_obstacle(lowered.graph, list(shape), None)
        return [obstacle] if obstacle else []
    return [
        f"{name} ({kind}): the cpu engine has no training kernel for it"
        for name, kind in zip(lowered.names, lowered.kinds, strict=True)
        if kind in _FEATURES_ONLY
    ]


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
    """

    engine: str
    operations: int
    reasons: tuple[str, ...]
    preconv: str
    preconv_reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self._fit()}\n{self._preconv()}"

    def _preconv(self) -> str:
        if self.preconv == "open":
            return "preconv: engine 'cpu' or 'python', which depends on the inputs' size: give explain() an input_shape"
        if self.preconv == "cpu":
            return "preconv: engine 'cpu', native code, equal to the model up to float rounding"
        if self.preconv_reasons == self.reasons:
            return f"preconv: engine {self.preconv!r}, for the same reasons"
        return "\n".join([f"preconv: engine {self.preconv!r}, because", *listed(self.preconv_reasons)])

    def _fit(self) -> str:
        if self.engine == "cpu":
            return (
                f"engine 'cpu': all {self.operations} operations are compiled to native code; equal to the plain loop "
                "up to float rounding, without .grad. A loss or optimizer that it does not know, batches that are not "
                "float32, and amp take engine 'python', which has the plain loop's bits"
            )
        first = "engine 'python': the model is called as it is, once per batch, because"
        return "\n".join([first, *listed(self.reasons)])

    __repr__ = __str__


def listed(reasons: Sequence[str], most: int = 8) -> list[str]:
    """Reasons as lines of text; of many the first few and how many more there are."""
    lines = [f"  - {reason}" for reason in reasons[:most]]
    return lines if len(reasons) <= most else [*lines, f"  ... and {len(reasons) - most} more"]


def explain(model: nn.Module, input_shape: Sequence[int] | None = None) -> Explanation:
    """Say in words which engines :func:`cnnrs.fit` and :func:`cnnrs.preconv` pick for ``model``, and why.

    Args:
        model: any module; for fit it is looked at in its present mode (train or eval), for preconv in eval mode. It is
            not changed.
        input_shape: (N, C, H, W) or (N, F) of a batch: some obstacles depend on it. None: (1, 3, 224, 224) for models
            that begin with a convolution of three channels and can run on that.

    What the check on the first batch of an earlier ``fit`` or ``preconv`` has found is among the reasons.

    Returns:
        An object that prints as the explanation, with ``engine``, ``operations``, ``reasons`` and ``preconv``.

    Raises:
        TypeError: model is no ``nn.Module``.
        RuntimeError: a layer cannot take what ``input_shape`` makes of it; the message names the layer.

    >>> import cnnrs
    >>> why = cnnrs.explain(cnnrs.models.MnistNet(), (32, 1, 28, 28))
    >>> why.engine, why.preconv
    ('cpu', 'cpu')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    preconv, preconv_reasons = _for_features(model, input_shape)
    try:
        lowered = lower(model)
    except Unsupported as reasons:
        return Explanation("python", 0, tuple(str(reasons).split("\n")), preconv, preconv_reasons)
    if reason := known_difference(model, lowered):
        return Explanation("python", 0, (reason,), preconv, preconv_reasons)
    slow = _fit_obstacles(lowered, _shape(lowered, input_shape))
    if any(tensor.device.type == "cuda" for tensor in lowered.tensors):
        slow.append("where loss, optimizer and options allow it, whole steps are recorded there once, and replayed")
    return Explanation("python" if slow else "cpu", len(lowered.graph) - 1, tuple(slow), preconv, preconv_reasons)


def _for_features(model: nn.Module, input_shape: Sequence[int] | None) -> tuple[str, tuple[str, ...]]:
    """The engine that preconv picks for float32 inputs, and why not ``cpu``."""
    try:
        with frozen(model):
            lowered = lower(model, gradients=False)
    except Unsupported as reasons:
        return "python", tuple(str(reasons).split("\n"))
    if reason := known_difference(model, lowered):
        return "python", (reason,)
    elsewhere = next((tensor.device for tensor in lowered.tensors if tensor.device.type != "cpu"), None)
    if elsewhere is not None:
        return "python", (f"the model is on {elsewhere}: the module itself is called, ahead of the device",)
    shape = _shape(lowered, input_shape)
    if shape is None:
        return "open", ()
    obstacle = cpu_features.obstacle(lowered, torch.empty(1).expand(tuple(shape)))
    return ("cpu", ()) if obstacle is None else ("python", (obstacle,))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time being; every layer gets its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


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
            return (1, 3, 224, 224) if channels == 3 else None
        else:
            return None
    return None


def device_of(model: nn.Module) -> torch.device:
    """The one device that all parameters and buffers of ``model`` are on (CPU for a model without any).

    Raises:
        RuntimeError: they are on several devices, or on "meta", where there are no numbers.
    """
    places: dict[torch.device, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        places.setdefault(tensor.device, name)
    if len(places) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise RuntimeError(f"Expected all tensors of the model to be on the same device, but found {found}")
    device = next(iter(places), torch.device("cpu"))
    if device.type == "meta":
        raise RuntimeError(f"the model is on device meta, which holds no numbers ({places[device]})")
    return device


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on the model's device; CPU batches are moved, anything else must be there already.

    Raises:
        RuntimeError: the batch is on another accelerator than the model.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu":
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but the model is on {device} and the data on "
            f"{tensor.device}: move one of them, for example model.to({str(tensor.device)!r})"
        )
    return tensor.to(device, non_blocking=True)
