"""Native kernels under PyTorch's autograd, for images in ``channels_last``: what eager PyTorch is slow at on a CPU.

3 x 3 convolutions of stride 1 (forward and both gradients by Winograd's algorithm), the gradient of depthwise filters,
and batch norm together with the addition and the activation behind it. They run on PyTorch's own threads; everything
else of a step stays PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cnnrs import _cnnrs
from cnnrs._records import Attributes, BatchNorm, BatchNormGradients
from cnnrs.model.lowering import VIEWS, Lowered
from cnnrs.model.player import Group, average_factor, needed, play

#: Activations that are computed with a batch norm, and what they are alone.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x, "ReLU": F.relu, "ReLU6": F.relu6, "Hardswish": F.hardswish, "SiLU": F.silu,
}  # fmt: skip
#: Channels come in vectors of so many.
_LANES = 16


#: Gives the kernels, for as many threads as PyTorch has at that time.
_Native = Callable[[], _cnnrs.Kernels]


class Kernels:
    """The kernels of one network behind one of its nodes, and the memory in which they work.

    Attributes:
        groups: operations that a kernel computes, by the last of them.
    """

    def __init__(self, lowered: Lowered, start: int = 0) -> None:
        self._start = start
        # No group knows the whole: their memory, often hundreds of megabytes, would wait for the collector of cycles.
        self.groups = _groups(lowered, start, _native())

    @property
    def operations(self) -> int:
        """Number of operations that have a kernel."""
        return sum(len(group.nodes) for group in self.groups.values())

    def play(self, lowered: Lowered, tensors: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """As :func:`~cnnrs.model.player.play`, with ``inputs`` in ``channels_last``."""
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        return play(lowered, tensors, inputs, start=self._start, groups=self.groups)


def _native() -> _Native:
    library = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    made = lru_cache(maxsize=1)(lambda threads: _cnnrs.Kernels(threads, library))
    return lambda: made(torch.get_num_threads())


def _groups(lowered: Lowered, start: int, native: _Native) -> dict[int, Group]:
    """What is computed together behind a node, by the last of each group."""
    readers: list[list[int]] = [[] for _ in lowered.operations]
    for number, operation in enumerate(lowered.operations):
        for node in needed(operation):
            readers[node].append(number)
    found: dict[int, Group] = {}
    for number, (_, kind, sources, attributes) in enumerate(lowered.operations):
        if number <= start:
            continue
        if kind == "Conv2d" and _is_3x3(lowered.tensors[attributes["weight"]], attributes):
            found[number] = Group((number,), tuple(sources), _convolution(native, attributes))
        elif kind == "Conv2d" and _is_depthwise(lowered.tensors[attributes["weight"]], attributes):
            found[number] = Group((number,), tuple(sources), _depthwise(native, attributes))
        elif kind == "BatchNorm2d":
            chain = _chain(lowered, number, readers)
            rest = [lowered.operations[node] for node in chain[1:]]
            residual = [s for _, kind, sources, _ in rest if kind == "Add" for s in sources if s != number]
            activation = next((kind for _, kind, _, _ in rest if kind != "Add"), "")
            run = _batch_norm(native, attributes, activation)
            found[chain[-1]] = Group(tuple(chain), (*sources, *residual), run)
    return found


def _is_3x3(weight: torch.Tensor, attributes: Attributes) -> bool:
    alone = attributes["stride"] == attributes["dilation"] == (1, 1) and attributes["groups"] == 1
    padding = attributes["padding"]
    square = tuple(weight.shape[2:]) == (3, 3) and padding[0] == padding[1] <= 2
    return alone and square and weight.shape[0] % _LANES == 0 and weight.shape[1] % _LANES == 0


def _is_depthwise(weight: torch.Tensor, attributes: Attributes) -> bool:
    channels, one, *kernel = weight.shape
    squares = [attributes["stride"], attributes["padding"], tuple(kernel)]
    square = attributes["dilation"] == (1, 1) and all(len(set(pair)) == 1 for pair in squares)
    sizes = kernel[0] in (3, 5, 7) and attributes["stride"][0] in (1, 2) and attributes["padding"][0] < kernel[0]
    return square and sizes and one == 1 and attributes["groups"] == channels >= _LANES


def _chain(lowered: Lowered, norm: int, readers: list[list[int]]) -> list[int]:
    """A batch norm, and what alone reads it: an addition, an activation, or one behind the other.

    Each directly behind the one before: what lies between might overwrite what they read, or move the same statistics.
    """
    chain = [norm]
    for kinds in (("Add",), tuple(_ACTIVATIONS)):
        last = chain[-1]
        if last == lowered.output or readers[last] != [last + 1]:
            break
        _, kind, sources, _ = lowered.operations[last + 1]
        if kind in kinds and all(_is_kept(lowered, node, readers, last + 1) for node in sources if node != last):
            chain.append(last + 1)
    return chain


def _is_kept(lowered: Lowered, node: int, readers: list[list[int]], behind: int) -> bool:
    """Whether nothing overwrites a value behind another node: the derivative of an activation needs both of a sum."""
    later = [lowered.operations[reader] for reader in readers[node] if reader > behind]
    return lowered.operations[node][1] not in VIEWS and not any(
        kind in VIEWS or attributes.get("inplace", False) for _, kind, _, attributes in later
    )


def _convolution(native: _Native, attributes: Attributes) -> Any:
    def run(values: list[torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
        bias = None if attributes["bias"] is None else tensors[attributes["bias"]]
        weight, padding = tensors[attributes["weight"]], attributes["padding"][0]
        return _Conv3x3.apply(values[0], weight, bias, padding, native())  # type: ignore[no-any-return]

    return run


def _depthwise(native: _Native, attributes: Attributes) -> Any:
    def run(values: list[torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
        bias = None if attributes["bias"] is None else tensors[attributes["bias"]]
        stride, padding = attributes["stride"][0], attributes["padding"][0]
        weight = tensors[attributes["weight"]]
        return _Depthwise.apply(values[0], weight, bias, stride, padding, native())  # type: ignore[no-any-return]

    return run


def _batch_norm(native: _Native, attributes: Attributes, activation: str) -> Any:
    def run(values: list[torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
        x, residual = values[0], values[1] if len(values) > 1 else None
        weight, bias, mean, var, count = (
            None if attributes[name] is None else tensors[attributes[name]]
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        )
        momentum = average_factor(attributes, count)
        training = attributes["training"] or mean is None
        pixels, eps = x.numel() // x.shape[1], attributes["eps"]
        if not _fits(x, residual, pixels):
            return _plain(x, residual, weight, bias, mean, var, training, momentum, eps, activation)
        y, batch_mean, batch_var = _BatchNorm.apply(
            x, residual, weight, bias, None if training else mean, var, eps, activation, native()
        )
        if attributes["training"] and mean is not None and var is not None:
            with torch.no_grad():
                mean.mul_(1 - momentum).add_(batch_mean, alpha=momentum)
                var.mul_(1 - momentum).add_(batch_var, alpha=momentum * pixels / (pixels - 1))
        return y  # type: ignore[no-any-return]

    return run


def _plain(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    mean: torch.Tensor | None, var: torch.Tensor | None, training: bool, momentum: float, eps: float, activation: str,
) -> torch.Tensor:  # fmt: skip
    z = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return _ACTIVATIONS[activation](z if residual is None else z + residual)


def _fits(x: torch.Tensor, residual: torch.Tensor | None, pixels: int) -> bool:
    """Whether whole vectors of channels come out, for one pixel or some together; one alone has no variance."""
    together = next(n for n in range(1, _LANES + 1) if n * x.shape[1] % _LANES == 0)
    return pixels > 1 and pixels % together == 0 and (residual is None or residual.shape == x.shape)


def _last(x: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) contiguous, which is what ``channels_last`` is in memory."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _dense(parameter: torch.Tensor | None) -> Any:
    """A parameter or buffer in the order of its indices."""
    return None if parameter is None else parameter.detach().contiguous()


def _new(n: int, c: int, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, C, H, W) in ``channels_last``, and the same memory as (N, H, W, C)."""
    # Not the other way round: autograd lets nobody overwrite a view that a Function returns.
    images = torch.empty((n, c, h, w), dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    return images, images.permute(0, 2, 3, 1)


def _again(
    run: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor | None, ...], needs: Sequence[bool],
    derivative: torch.Tensor,
) -> list[torch.Tensor | None]:  # fmt: skip
    """The gradients through PyTorch's own operations: where ``create_graph`` asks for derivatives of them, too."""
    # Views: one of the inputs may have been computed from another.
    views = [None if x is None else x.view_as(x) for x in inputs]
    wanted = [view for view, needed in zip(views, needs, strict=False) if needed and view is not None]
    found = iter(torch.autograd.grad(run(*views), wanted, derivative, create_graph=True))
    return [next(found) if needed else None for _, needed in zip(inputs, needs, strict=False)]


class _Conv3x3(torch.autograd.Function):
    """3 x 3, stride 1, the same padding on all sides."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: int,
        native: _cnnrs.Kernels,
    ) -> torch.Tensor:  # fmt: skip
        n, _, h, w = x.shape
        last = _last(x)
        output, memory = _new(n, len(weight), h + 2 * padding - 2, w + 2 * padding - 2)
        native.conv3x3(last, _dense(weight), _dense(bias), memory, padding)
        ctx.save_for_backward(x, weight, bias)
        ctx.padding, ctx.native = padding, native
        return output

    @staticmethod
    def backward(ctx: Any, derivative: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            run = partial(F.conv2d, padding=ctx.padding)
            return (*_again(run, (x, weight, bias), ctx.needs_input_grad, derivative), None, None)
        filters, last = _dense(weight), _last(derivative)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx, memory = _new(*x.shape)
            ctx.native.conv3x3_input(last, filters, memory, ctx.padding)
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(filters)
            ctx.native.conv3x3_weight(_last(x), last, dw, ctx.padding)
        if ctx.needs_input_grad[2]:
            db = derivative.sum((0, 2, 3))
        return dx, dw, db, None, None


class _Depthwise(torch.autograd.Function):
    """A filter of its own for every channel; all but the gradient of the filters is PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, padding: int,
        native: _cnnrs.Kernels,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, bias)
        ctx.settings = stride, padding
        ctx.native = native
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, derivative: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        stride, padding = ctx.settings
        if torch.is_grad_enabled():
            run = partial(F.conv2d, stride=stride, padding=padding, groups=len(weight))
            return (*_again(run, (x, weight, bias), ctx.needs_input_grad, derivative), None, None, None)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.convolution_backward(
                derivative, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight),
                [True, False, False],
            )[0]  # fmt: skip
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
            ctx.native.depthwise_weight(_last(x), _last(derivative), dw, stride, padding)
        if ctx.needs_input_grad[2]:
            db = derivative.sum((0, 2, 3))
        return dx, dw, db, None, None, None


def _described(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    mean: torch.Tensor, var: torch.Tensor, eps: float, activation: str,
) -> BatchNorm:  # fmt: skip
    return {
        "input": _last(x), "residual": None if residual is None else _last(residual), "weight": _dense(weight),
        "bias": _dense(bias), "mean": _dense(mean), "var": _dense(var), "eps": eps, "activation": activation,
    }  # fmt: skip


class _BatchNorm(torch.autograd.Function):
    """Batch norm, then the sum with ``residual``, then an activation; ``mean`` None: the batch's own statistics.

    Returns the result, and of the batch mean and biased variance.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None,
        bias: torch.Tensor | None, mean: torch.Tensor | None, var: torch.Tensor | None, eps: float, activation: str,
        native: _cnnrs.Kernels,
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        ctx.training = mean is None
        if mean is None or var is None:
            mean, var = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        output, memory = _new(*x.shape)
        native.batch_norm(_described(x, residual, weight, bias, mean, var, eps, activation), memory, ctx.training)
        ctx.save_for_backward(x, residual, weight, bias, mean, var)
        ctx.settings = eps, activation
        ctx.native = native
        ctx.set_materialize_grads(False)
        if ctx.training:
            ctx.mark_non_differentiable(mean, var)
        return (output, mean, var) if ctx.training else (output, None, None)

    @staticmethod
    def backward(ctx: Any, derivative: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, residual, weight, bias, mean, var = ctx.saved_tensors
        if derivative is None:
            return (None,) * 9
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            mean, var = (None, None) if ctx.training else (mean, var)
            rest = mean, var, ctx.training, 0.0, *ctx.settings

            def run(*inputs: Any) -> torch.Tensor:
                return _plain(*(*inputs, *rest))

            return (*_again(run, (x, residual, weight, bias), needs, derivative), *[None] * 5)
        dx, dx_memory = _new(*x.shape) if needs[0] else (None, None)
        dr, dr_memory = _new(*x.shape) if needs[1] else (None, None)
        dw, db = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        norm = _described(x, residual, weight, bias, mean, var, *ctx.settings)
        gradients: BatchNormGradients = {"input": dx_memory, "residual": dr_memory, "weight": dw, "bias": db}
        ctx.native.batch_norm_backward(norm, _last(derivative), ctx.training, gradients)
        return dx, dr, dw if needs[2] else None, db if needs[3] else None, None, None, None, None, None
