"""Native kernels under PyTorch's autograd, for images in ``channels_last``: what eager PyTorch is slow at on a CPU.

3 x 3 convolutions of stride 1 (forward and both gradients by Winograd's algorithm or, for few pixels, by direct sums),
depthwise and 1 x 1 convolutions together with the batch norm and the activation in front of them, and other batch norms
together with the addition and the activation behind them. They run on PyTorch's own threads; everything else of a step
stays PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from cnnrs import _cnnrs
from cnnrs._records import Attributes
from cnnrs._util import intraop
from cnnrs.engine import kernel_functions as functions
from cnnrs.engine.kernel_functions import Statistics, Written, mark, written
from cnnrs.model.lowering import Lowered
from cnnrs.model.player import Group, average_factor, needed, play
from cnnrs.model.values import VIEWS

#: Channels come in vectors of so many.
_LANES = 16
#: Weights of a 1 x 1 convolution beyond which PyTorch's own is faster: they no longer stay in the caches.
_MOST_FILTERS = 1 << 19


#: Gives the kernels, for as many threads as PyTorch has at that time.
_Native = Callable[[], _cnnrs.Kernels]


class Kernels:
    """The kernels of one network behind one of its nodes, and the memory in which they work.

    Args:
        lowered: the network.
        start: the node.
        exact: 3 x 3 convolutions are left to PyTorch.

    Attributes:
        groups: operations that a kernel computes, by the last of them.
    """

    def __init__(self, lowered: Lowered, start: int = 0, exact: bool = False) -> None:
        self._start = start
        # No group knows the whole: their memory, often hundreds of megabytes, would wait for the collector of cycles.
        self.groups = _groups(lowered, start, exact, _native())

    @property
    def operations(self) -> int:
        """Number of operations that have a kernel."""
        return sum(len(group.nodes) for group in self.groups.values())

    def play(self, lowered: Lowered, tensors: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """As :func:`~cnnrs.model.player.play`, with ``inputs`` in ``channels_last``."""
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        return play(lowered, tensors, inputs, start=self._start, groups=self.groups)


def _native() -> _Native:
    made = lru_cache(maxsize=1)(lambda threads: _cnnrs.Kernels(threads, intraop.library()))
    return lambda: made(torch.get_num_threads())


def _groups(lowered: Lowered, start: int, exact: bool, native: _Native) -> dict[int, Group]:
    """What is computed together behind a node, by the last of each group."""
    readers: list[list[int]] = [[] for _ in lowered.operations]
    for number, operation in enumerate(lowered.operations):
        for node in needed(operation):
            readers[node].append(number)
    found: dict[int, Group] = {}
    taken: set[int] = set()
    for number, (_, kind, sources, _) in enumerate(lowered.operations):
        if number <= start or number in taken:
            continue
        new: dict[int, Group] = {}
        if kind == "BatchNorm2d":
            new = _behind_norm(lowered, number, readers, native)
        elif (convolution := _convolution(lowered, number, None, readers, native)) is not None:
            end, run = convolution
            new = {end: Group(tuple(range(number, end + 1)), tuple(sources), run)}
        elif kind == "Conv2d" and (run := _with_weights(lowered, number, exact, native)) is not None:
            new = {number: Group((number,), tuple(sources), run)}
        found |= new
        taken.update(node for group in new.values() for node in group.nodes)
    return found


def _with_weights(lowered: Lowered, number: int, exact: bool, native: _Native) -> Any:
    """A convolution with which nothing else is computed; None for most."""
    attributes = lowered.operations[number][3]
    weight = lowered.tensors[attributes["weight"]]
    if not exact and _is_3x3(weight, attributes):
        return _conv3x3(native, attributes)
    if _is_depthwise(weight, attributes):
        return _depthwise(native, attributes)
    if _is_one_pixel(lowered, number):
        return _linear(attributes)
    return None


def _behind_norm(lowered: Lowered, number: int, readers: list[list[int]], native: _Native) -> dict[int, Group]:
    """A batch norm with what is computed together with it."""
    sources, attributes = lowered.operations[number][2:]
    chain = _chain(lowered, number, readers)
    last, rest = chain[-1], [lowered.operations[node] for node in chain[1:]]
    norm = _Norm(attributes, next((kind for _, kind, _, _ in rest if kind != "Add"), ""))
    residual = [source for _, kind, both, _ in rest if kind == "Add" for source in both if source != number]
    if not residual:
        if _is_own(lowered, number, readers) and (gate := _gate(lowered, last, readers)) is not None:
            opener, pool, product = gate
            run = _gated(lowered, product + 1, norm, readers, native)
            return {
                pool: Group((*chain, pool), tuple(sources), _squeeze(native, norm)),
                product + 1: Group((product, product + 1), (*sources, opener), run),
            }
        if _is_alone(lowered, last, readers):
            convolution = _convolution(lowered, last + 1, norm, readers, native)
            if convolution is not None:
                end, run = convolution
                return {end: Group((*chain, *range(last + 1, end + 1)), tuple(sources), run)}
    return {last: Group(tuple(chain), (*sources, *residual), _batch_norm(native, norm))}


def _gate(lowered: Lowered, value: int, readers: list[list[int]]) -> tuple[int, int, int] | None:
    """Squeeze and excitation of a value: the gate, the mean over each image from which it is made, and their product.

    Only if nobody else reads the value, and a 1 x 1 convolution alone the product.
    """
    if value == lowered.output or len(readers[value]) != 2:
        return None
    pool, product = readers[value]
    _, kind, both, _ = lowered.operations[product]
    if pool != value + 1 or not _is_mean(lowered, pool) or kind != "Mul" or not _is_alone(lowered, product, readers):
        return None
    _, behind, _, attributes = lowered.operations[product + 1]
    opener = next(node for node in both if node != value)
    is_conv = behind == "Conv2d" and attributes["bias"] is None
    if not is_conv or not _is_pointwise(lowered.tensors[attributes["weight"]], attributes):
        return None
    return (opener, pool, product) if _comes_from(lowered, opener, pool) else None


def _is_mean(lowered: Lowered, node: int) -> bool:
    """Whether it is that of each channel of an image, (N, C, 1, 1)."""
    _, kind, _, attributes = lowered.operations[node]
    if kind == "Mean":
        is_mean = attributes["keepdim"] and sorted(dim % 4 for dim in attributes["dims"]) == [2, 3]
    else:
        is_mean = kind == "AdaptiveAvgPool2d" and tuple(attributes["output"]) == (1, 1)
    return node != lowered.output and is_mean


def _is_one_pixel(lowered: Lowered, node: int) -> bool:
    """Whether it is a 1 x 1 convolution of images of one pixel: of means, and what becomes of them alone."""
    _, kind, sources, attributes = lowered.operations[node]
    if kind == "Conv2d":
        kernel = lowered.tensors[attributes["weight"]].shape[2:]
        alone = kernel == (1, 1) and attributes["padding"] == (0, 0) and attributes["groups"] == 1
        return alone and (_is_mean(lowered, sources[0]) or _is_one_pixel(lowered, sources[0]))
    through = kind in functions.ACTIVATIONS or kind in ("Sigmoid", "Hardsigmoid", "Dropout")
    return through and (_is_mean(lowered, sources[0]) or _is_one_pixel(lowered, sources[0]))


def _comes_from(lowered: Lowered, node: int, origin: int) -> bool:
    """Whether a value is made from another one."""
    while node > origin:
        sources = lowered.operations[node][2]
        if len(sources) != 1:
            return False
        node = sources[0]
    return node == origin


def _is_own(lowered: Lowered, norm: int, readers: list[list[int]]) -> bool:
    """Whether a batch norm alone reads its input: nothing overwrites that, and what is left beside it is one gate's."""
    (source,) = lowered.operations[norm][2]
    return readers[source] == [norm] and lowered.operations[source][1] not in VIEWS


def _is_alone(lowered: Lowered, node: int, readers: list[list[int]]) -> bool:
    """Whether a value is read by the next node and nobody else."""
    return node != lowered.output and readers[node] == [node + 1]


def _is_3x3(weight: torch.Tensor, attributes: Attributes) -> bool:
    alone = attributes["stride"] == attributes["dilation"] == (1, 1) and attributes["groups"] == 1
    padding = attributes["padding"]
    square = tuple(weight.shape[2:]) == (3, 3) and padding[0] == padding[1] <= 2
    return alone and square and weight.shape[0] % _LANES == 0 and weight.shape[1] % _LANES == 0


def _is_depthwise(weight: torch.Tensor, attributes: Attributes) -> bool:
    channels, one, *kernel = weight.shape
    squares = [attributes["stride"], attributes["padding"], tuple(kernel)]
    square = attributes["dilation"] == (1, 1) and all(len(set(pair)) == 1 for pair in squares)
    known = (kernel[0], attributes["stride"][0]) in ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1))
    sizes = known and attributes["padding"][0] < kernel[0]
    return square and sizes and one == 1 and attributes["groups"] == channels >= _LANES


def _is_pointwise(weight: torch.Tensor, attributes: Attributes) -> bool:
    outputs, inputs, *kernel = weight.shape
    alone = attributes["stride"] == attributes["dilation"] == (1, 1) and attributes["padding"] == (0, 0)
    large = outputs >= _LANES and inputs >= _LANES and outputs * inputs <= _MOST_FILTERS
    return alone and kernel == [1, 1] and attributes["groups"] == 1 and large


def _chain(lowered: Lowered, norm: int, readers: list[list[int]]) -> list[int]:
    """A batch norm, and what alone reads it: an addition, an activation, or one behind the other.

    Each directly behind the one before: what lies between might overwrite what they read, or move the same statistics.
    """
    chain = [norm]
    for kinds in (("Add",), tuple(functions.ACTIVATIONS)):
        last = chain[-1]
        if not _is_alone(lowered, last, readers):
            break
        _, kind, sources, _ = lowered.operations[last + 1]
        if kind in kinds and all(_is_kept(lowered, node, readers, last + 1) for node in sources if node != last):
            chain.append(last + 1)
    return chain


def _is_kept(lowered: Lowered, node: int, readers: list[list[int]], behind: int) -> bool:
    """Whether nothing overwrites a value behind another node: the derivative of an activation needs both of a sum."""
    read = [(reader > behind, *lowered.operations[reader]) for reader in readers[node]]
    return lowered.operations[node][1] not in VIEWS and not any(
        kind in VIEWS or (later and attributes.get("inplace", False)) for later, _, kind, _, attributes in read
    )


def _conv3x3(native: _Native, attributes: Attributes) -> Any:
    def run(values: list[torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
        bias = None if attributes["bias"] is None else tensors[attributes["bias"]]
        weight, padding = tensors[attributes["weight"]], attributes["padding"][0]
        return functions.Conv3x3.apply(values[0], weight, bias, padding, native())  # type: ignore[no-any-return]

    return run


def _linear(attributes: Attributes) -> Any:
    """PyTorch's own: a product of two matrices begins in a tenth of the time of a convolution."""

    def run(values: list[torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
        bias = None if attributes["bias"] is None else tensors[attributes["bias"]]
        return F.linear(values[0].flatten(1), tensors[attributes["weight"]].flatten(1), bias)[:, :, None, None]

    return run


def _depthwise(native: _Native, attributes: Attributes) -> Any:
    def run(values: list[torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
        bias = None if attributes["bias"] is None else tensors[attributes["bias"]]
        stride, padding = attributes["stride"][0], attributes["padding"][0]
        weight = tensors[attributes["weight"]]
        return functions.DepthwiseFilters.apply(values[0], weight, bias, stride, padding, native())  # type: ignore[no-any-return]

    return run


def _convolution(
    lowered: Lowered, number: int, norm: _Norm | None, readers: list[list[int]], native: _Native
) -> tuple[int, Any] | None:
    """A 1 x 1 or depthwise convolution behind a batch norm, or behind anything else: its node, and what computes it.

    With the zeros that a node in front of it puts around the image.
    """
    _, kind, _, attributes = lowered.operations[number]
    pad = None
    if kind == "ZeroPad2d" and _is_alone(lowered, number, readers):
        pad, number = attributes, number + 1
        _, kind, _, attributes = lowered.operations[number]
    if kind != "Conv2d" or attributes["bias"] is not None:
        return None
    weight = lowered.tensors[attributes["weight"]]
    if not _is_depthwise(weight, attributes) and (pad is not None or not _is_pointwise(weight, attributes)):
        return None
    before = after = attributes["padding"][0]
    if pad is not None:
        (before, left), (after, right) = pad["before"], pad["after"]
        if (before, after) != (left, right) or attributes["padding"] != (0, 0) or max(before, after) >= weight.shape[2]:
            return None
    sizes = functions.Sizes(attributes["stride"][0], before, after)
    left_behind = _left_behind(lowered, number, readers)

    def run(values: list[torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
        kernels, x, filters = native(), values[0], tensors[attributes["weight"]]
        source = written(x)
        scale = shift = statistics = None
        if norm is not None:
            scale, shift, statistics = norm.begin(x, tensors, source, kernels)
        result = left_behind(x, filters)
        y = functions.Convolution.apply(x, scale, shift, filters, statistics, sizes, source, result, kernels)
        return mark(y, result) if result.takes_late else y

    return number, run


def _squeeze(native: _Native, norm: _Norm) -> Any:
    """The mean over each image of what is behind a batch norm."""

    def run(values: list[torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
        x, kernels = values[0], native()
        source = written(x)
        # The gate's reader computes with the same statistics, and leaves its part of the derivative there.
        mark(x, source)
        scale, shift, statistics = norm.begin(x, tensors, source, kernels)
        source.statistics = statistics
        return functions.Squeeze.apply(x, scale, shift, statistics, source, kernels)  # type: ignore[no-any-return]

    return run


def _gated(lowered: Lowered, number: int, norm: _Norm, readers: list[list[int]], native: _Native) -> Any:
    """A 1 x 1 convolution of the product of a gate and what is behind a batch norm."""
    attributes = lowered.operations[number][3]
    left = _left_behind(lowered, number, readers)

    def run(values: list[torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
        (x, gate), filters = values, tensors[attributes["weight"]]
        weight, bias, *_ = norm.tensors(tensors)
        source, kernels = written(x), native()
        statistics = source.statistics
        assert statistics is not None
        if not _is_for_channels(gate, x):
            source.read_again()
            return F.conv2d(statistics.plain(x, None, weight, bias) * gate, filters)
        result, gate = left(x, filters), gate.expand(*x.shape[:2], 1, 1)
        y = functions.GatedConvolution.apply(x, weight, bias, gate, filters, statistics, source, result, kernels)
        return mark(y, result) if result.takes_late else y

    return run


def _is_for_channels(gate: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a gate is the same for all pixels of an image."""
    n, c, *_ = x.shape
    return gate.dim() == 4 and all(size in (1, of) for size, of in zip(gate.shape, (n, c, 1, 1), strict=True))


def _left_behind(
    lowered: Lowered, number: int, readers: list[list[int]]
) -> Callable[[torch.Tensor, torch.Tensor], Written]:
    """What a convolution leaves to a batch norm that alone reads it."""
    behind = lowered.operations[number + 1] if _is_alone(lowered, number, readers) else None
    is_normed = behind is not None and behind[1] == "BatchNorm2d"
    gathers = is_normed and behind is not None and _own_statistics(behind[3])

    def made(x: torch.Tensor, filters: torch.Tensor) -> Written:
        result = Written(takes_late=is_normed)
        if gathers:
            result.mean, result.var = x.new_empty(len(filters)), x.new_empty(len(filters))
        return result

    return made


def _own_statistics(attributes: Attributes) -> bool:
    """Whether a batch norm computes with those of the batch."""
    return bool(attributes["training"] or attributes["running_mean"] is None)


@dataclass(frozen=True)
class _Norm:
    """A batch norm of the graph, and the activation behind it."""

    attributes: Attributes
    activation: str

    def tensors(self, tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """Weight, bias, running mean and variance, number of batches."""
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [None if self.attributes[name] is None else tensors[self.attributes[name]] for name in names]

    def begin(
        self, x: torch.Tensor, tensors: list[torch.Tensor], source: Written, native: _cnnrs.Kernels
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Statistics]:
        """Weight, bias and statistics for this batch, with which the running ones move on."""
        if _own_statistics(self.attributes) and x.numel() == x.shape[1]:
            # One pixel alone has no variance: PyTorch says so.
            self.plain(x, None, tensors)
        weight, bias, mean, var, count = self.tensors(tensors)
        momentum, eps = average_factor(self.attributes, count), self.attributes["eps"]
        if not _own_statistics(self.attributes):
            return weight, bias, Statistics(mean, var, eps, False, self.activation)  # type: ignore[arg-type]
        own = source.gathered or functions.moments(x, native)
        if self.attributes["training"] and mean is not None and var is not None:
            pixels = x.numel() // x.shape[1]
            with torch.no_grad():
                mean.mul_(1 - momentum).add_(own[0], alpha=momentum)
                var.mul_(1 - momentum).add_(own[1], alpha=momentum * pixels / (pixels - 1))
        return weight, bias, Statistics(*own, eps, True, self.activation)

    def plain(self, x: torch.Tensor, residual: torch.Tensor | None, tensors: list[torch.Tensor]) -> torch.Tensor:
        """All of it by PyTorch."""
        weight, bias, mean, var, count = self.tensors(tensors)
        momentum, eps = average_factor(self.attributes, count), self.attributes["eps"]
        training = _own_statistics(self.attributes)
        return functions.plain(x, residual, weight, bias, mean, var, training, momentum, eps, self.activation)


def _batch_norm(native: _Native, norm: _Norm) -> Any:
    def run(values: list[torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
        x, residual = values[0], values[1] if len(values) > 1 else None
        if not _fits(x, residual):
            return norm.plain(x, residual, tensors)
        source, kernels = written(x), native()
        scale, shift, statistics = norm.begin(x, tensors, source, kernels)
        return functions.BatchNorm.apply(x, residual, scale, shift, statistics, source, kernels)  # type: ignore[no-any-return]

    return run


def _fits(x: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether whole vectors of channels come out, for one pixel or some together; one alone has no variance."""
    pixels = x.numel() // x.shape[1]
    together = next(n for n in range(1, _LANES + 1) if n * x.shape[1] % _LANES == 0)
    return pixels > 1 and pixels % together == 0 and (residual is None or residual.shape == x.shape)
