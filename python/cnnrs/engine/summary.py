"""What a network is made of: shapes, parameters, receptive field, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cnnrs.engine.explain import explain, listed
from cnnrs.model.lowering import Lowered, lower
from cnnrs.model.modes import frozen
from cnnrs.model.operations import Unsupported


@dataclass(frozen=True)
class Layer:
    """One row of a :class:`Summary`.

    Attributes:
        name: qualified module name, or the function's name.
        kind: the PyTorch class that does the same.
        output_shape: batch first.
        parameters: number of weights and biases; shared ones count at their first layer only.
        trainable: how many of them require a gradient.
        receptive_field: (height, width) in input pixels that one output value sees; None where it sees everything.
        flops: multiplications and additions for the whole batch; None when unknown.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    trainable: int
    receptive_field: tuple[int, int] | None
    flops: int | None


@dataclass(frozen=True)
class Summary:
    """A table of layers; prints as text.

    Attributes:
        layers: in the order ``forward`` calls them.
        engine: the engine that trains the model, "cpu" or "python".
        reasons: why the compiled engine is not taken; empty when it is.
    """

    layers: tuple[Layer, ...]
    engine: str
    reasons: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def trainable(self) -> int:
        """Number of weights and biases that require a gradient."""
        return sum(layer.trainable for layer in self.layers)

    @property
    def flops(self) -> int | None:
        """Multiplications and additions of one forward pass over the batch; None when unknown."""
        known = [layer.flops for layer in self.layers if layer.flops is not None]
        return sum(known) if len(known) == len(self.layers) else None

    def __str__(self) -> str:
        head = ("layer", "kind", "output shape", "parameters", "receptive field", "MFLOP")
        rows = [head, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(map(_align, row, widths, range(len(head)))).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        flops = "unknown" if self.flops is None else f"{self.flops / 1e6:,.1f} MFLOP"
        total = f"{self.parameters:,} parameters, {self.trainable:,} trainable, {flops}, engine {self.engine!r}"
        return "\n".join([*lines, lines[1], total, *listed(self.reasons)])

    __repr__ = __str__


def summary(model: nn.Module, input_shape: Sequence[int]) -> Summary:
    """List the layers of ``model`` for inputs of ``input_shape``.

    Output sizes follow the tutorial's formula (W - F + 2P) / S + 1; receptive fields grow by (F - 1) times the product
    of the strides so far.

    Args:
        model: any module that takes one tensor; not changed.
        input_shape: (N, C, H, W), or (N, F) for a head.

    Returns:
        A :class:`Summary` that prints as a table.

    Raises:
        RuntimeError: a layer cannot take the shape that reaches it; the message names the layer.
        TypeError: model is no ``nn.Module``.

    >>> import cnnrs
    >>> cnnrs.summary(cnnrs.models.SimpleCNN(), (1, 3, 32, 32)).layers[0].output_shape
    (1, 32, 32, 32)
    """
    why = explain(model, input_shape)
    lowered = _lowered(model, input_shape)
    if lowered is None:
        return Summary(_by_hooks(model, input_shape), why.engine, why.reasons)
    shapes = lowered.graph.shapes(list(input_shape))
    costs = lowered.graph.costs(shapes)
    counted: set[int] = set()
    layers = []
    for i, indices in enumerate(lowered.graph.parameters()):
        # What has been computed of parameters is none.
        own = [lowered.tensors[t] for t in indices if t not in counted and t not in lowered.folded]
        counted.update(indices)
        if i > 0:  # node 0 is the input
            flops, field = costs[i]
            layers.append(_layer(lowered.names[i], lowered.kinds[i], shapes[i], own, field, flops))
    return Summary(tuple(layers), why.engine, why.reasons)


def _lowered(model: nn.Module, input_shape: Sequence[int]) -> Lowered | None:
    """The operations, where need be those of the frozen model for images of that size."""
    try:
        return lower(model)
    except Unsupported:
        pass
    try:
        with frozen(model):
            return lower(model, False, tuple(input_shape)[1:])
    except Unsupported:
        return None


def _layer(
    name: str, kind: str, shape: Sequence[int], parameters: Sequence[torch.Tensor],
    receptive_field: tuple[int, int] | None, flops: int | None,
) -> Layer:  # fmt: skip
    count = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return Layer(name, kind, tuple(shape), count, trainable, receptive_field, flops)


def _by_hooks(model: nn.Module, input_shape: Sequence[int]) -> tuple[Layer, ...]:
    """Shapes as a run on zeros shows them, for models that cannot be lowered."""
    layers: list[Layer] = []
    counted: set[int] = set()
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, _: object, output: object) -> None:
        own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        counted.update(map(id, own))
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else ()
        layers.append(_layer(names[module], type(module).__name__, shape, own, None, None))

    leaves = [m for m in model.modules() if not any(m.children()) or any(True for _ in m.parameters(recurse=False))]
    handles = [module.register_forward_hook(record) for module in leaves]
    parameter = next(model.parameters(), torch.zeros(()))
    try:
        # Batch norm must not learn from the zeros.
        with frozen(model), torch.no_grad():
            model(torch.zeros(tuple(input_shape), device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(layers)


def _cells(layer: Layer) -> tuple[str, ...]:
    field = "all" if layer.receptive_field is None else "{} x {}".format(*layer.receptive_field)
    flops = "" if layer.flops is None else f"{layer.flops / 1e6:,.2f}"
    shape = " x ".join(map(str, layer.output_shape))
    parameters = f"{layer.parameters:,}" if layer.parameters else ""
    return layer.name, layer.kind, shape, parameters, field if layer.flops is not None else "", flops


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)
