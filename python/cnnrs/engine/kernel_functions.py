"""The autograd functions of the native kernels: what PyTorch calls forward and backward, in ``channels_last``.

A batch norm in front of a convolution is computed where the convolution reads, forward and backward, and the batch's
statistics are gathered by the convolution that writes. The derivative through these statistics needs sums over all
pixels; so it is only begun by the one who reads, and finished by the convolution in front when it reads that
(:class:`Written` carries the sums). Each of these saves a pass over memory, which is what limits them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from cnnrs import _cnnrs
from cnnrs._records import BatchNormGradients, ConvolutionGradients, Late, Norm

#: Activations that are computed with a batch norm, and what they are alone.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x, "ReLU": F.relu, "ReLU6": F.relu6, "Hardswish": F.hardswish, "SiLU": F.silu,
}  # fmt: skip

#: Channels come in vectors of so many.
_LANES = 16


@dataclass
class Written:
    """What a kernel leaves beside a result that one batch norm alone reads.

    Attributes:
        mean: of each channel over the batch; None: not gathered.
        var: the biased variance.
        takes_late: whether whoever wrote the result finishes its derivative, too.
        late: what is left to do, behind the reader's backward pass.
        statistics: of the batch norm, where two read what it makes.
        gated: the derivative of what a gate has let through of it, and the gate (N, C), for :class:`Squeeze`.
        is_read_again: by derivatives of derivatives.
    """

    mean: torch.Tensor | None = None
    var: torch.Tensor | None = None
    takes_late: bool = False
    late: Late | None = None
    statistics: Statistics | None = None
    gated: tuple[torch.Tensor, torch.Tensor] | None = None
    is_read_again: bool = False

    @property
    def gathered(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and variance, or where they go."""
        return None if self.mean is None or self.var is None else (self.mean, self.var)

    def read_again(self) -> None:
        """The derivatives of derivatives read the result, too: nobody's share of its derivative is all of it."""
        self.takes_late, self.late, self.gated, self.is_read_again = False, None, None, True

    def taken(self, derivative: torch.Tensor) -> Late | None:
        """What is left to do to ``derivative``, once."""
        late, self.late = self.late, None
        if late is not None and late["derivative"].data_ptr() != derivative.data_ptr():
            raise RuntimeError("a derivative that was to be finished has been changed on the way")
        return late


def mark(result: torch.Tensor, written: Written) -> torch.Tensor:
    """The result, with what is left beside it tied to it, for :func:`written`."""
    result._cnnrs_written = written  # type: ignore[attr-defined]
    return result


def written(x: torch.Tensor) -> Written:
    """What was left beside it."""
    found: Written = getattr(x, "_cnnrs_written", None) or Written()
    return found


@dataclass(frozen=True)
class Statistics:
    """What a batch norm computes with, beside its weights.

    Attributes:
        mean: of each channel.
        var: the biased variance.
        eps: added to it.
        training: whether they are the batch's own.
        activation: behind it, one of ``ACTIVATIONS``.
    """

    mean: torch.Tensor
    var: torch.Tensor
    eps: float
    training: bool
    activation: str

    def norm(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Norm:
        """The record for the kernels."""
        return {
            "weight": _dense(weight), "bias": _dense(bias), "mean": _dense(self.mean), "var": _dense(self.var),
            "eps": self.eps, "activation": self.activation,
        }  # fmt: skip

    def plain(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """All of it by PyTorch; the batch's own statistics are computed again, so that they have derivatives."""
        mean, var = (None, None) if self.training else (self.mean, self.var)
        return plain(x, residual, weight, bias, mean, var, self.training, 0.0, self.eps, self.activation)


def _given(statistics: Statistics | None) -> list[torch.Tensor]:
    """Statistics that may be overwritten before the backward pass, which autograd then says."""
    return [] if statistics is None or statistics.training else [statistics.mean, statistics.var]


def plain(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    mean: torch.Tensor | None, var: torch.Tensor | None, training: bool, momentum: float, eps: float, activation: str,
) -> torch.Tensor:  # fmt: skip
    """Batch norm, sum and activation by PyTorch."""
    z = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return ACTIVATIONS[activation](z if residual is None else z + residual)


def moments(x: torch.Tensor, native: _cnnrs.Kernels) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel, where nobody has gathered them."""
    if x.numel() % _LANES:
        var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
    else:
        mean, var = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        native.moments(_last(x.detach()), mean, var)
    return mean, var


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


class Conv3x3(torch.autograd.Function):
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


class DepthwiseFilters(torch.autograd.Function):
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
            gradients: ConvolutionGradients = {
                "input": None, "weight": None, "bias": None, "gate": None, "filters": dw,
            }  # fmt: skip
            ctx.native.convolution_backward(
                _last(x), None, None, _dense(weight), stride, padding, _last(derivative), None, None, gradients
            )
        if ctx.needs_input_grad[2]:
            db = derivative.sum((0, 2, 3))
        return dx, dw, db, None, None, None


@dataclass(frozen=True)
class Sizes:
    """Of a convolution, alike both ways.

    Attributes:
        stride: from one filter to the next.
        before: rows and columns of zeros above the image and to its left.
        after: below it and to its right.
    """

    stride: int
    before: int
    after: int

    def outputs(self, side: int, kernel: int) -> int:
        """How many there are along a side."""
        return (side + self.before + self.after - kernel) // self.stride + 1

    def plain(self, x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        """The same by PyTorch."""
        x = x if self.before == self.after else F.pad(x, (self.before, self.after) * 2)
        padding = self.before if self.before == self.after else 0
        return F.conv2d(x, filters, None, self.stride, padding, groups=x.shape[1] // filters.shape[1])


class Convolution(torch.autograd.Function):
    """1 x 1 of stride 1, or depthwise, without a bias, of ``act(bn(x))``, or of ``x`` where ``statistics`` is None.

    ``source`` is what was left beside ``x``, ``result`` what is left beside the output.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, filters: torch.Tensor,
        statistics: Statistics | None, sizes: Sizes, source: Written, result: Written, native: _cnnrs.Kernels,
    ) -> torch.Tensor:  # fmt: skip
        n, _, *size = x.shape
        h, w = (sizes.outputs(side, filters.shape[2]) for side in size)
        output, memory = _new(n, len(filters), h, w)
        norm = None if statistics is None else statistics.norm(weight, bias)
        native.convolution(_last(x), norm, None, _dense(filters), memory, sizes.stride, sizes.before, result.gathered)
        # Whoever finishes the derivative of the output reads it again.
        kept = output if result.takes_late else None
        ctx.save_for_backward(x, weight, bias, filters, kept, *_given(statistics))
        ctx.statistics, ctx.sizes, ctx.source, ctx.result, ctx.native = statistics, sizes, source, result, native
        return output

    @staticmethod
    def backward(ctx: Any, derivative: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, filters, output, *_ = ctx.saved_tensors
        statistics: Statistics | None = ctx.statistics
        source: Written = ctx.source
        needs, rest = ctx.needs_input_grad, [None] * 5
        sizes: Sizes = ctx.sizes
        if torch.is_grad_enabled():
            source.read_again()

            def run(x: Any, weight: Any, bias: Any, filters: torch.Tensor) -> torch.Tensor:
                return sizes.plain(x if statistics is None else statistics.plain(x, None, weight, bias), filters)

            return (*_again(run, (x, weight, bias, filters), needs, derivative), *rest)
        late = ctx.result.taken(derivative)
        normed = statistics is not None and any(needs[:3])
        # The norm's own gradients are sums over that of its result.
        dx, memory = _new(*x.shape) if needs[0] or normed else (None, None)
        dw, db = (x.new_empty(x.shape[1]), x.new_empty(x.shape[1])) if normed else (None, None)
        df = torch.empty_like(filters, memory_format=torch.contiguous_format) if needs[3] else None
        gradients: ConvolutionGradients = {
            "input": memory, "weight": dw, "bias": db, "gate": None, "filters": df,
        }  # fmt: skip
        norm = None if statistics is None else statistics.norm(weight, bias)
        native: _cnnrs.Kernels = ctx.native
        native.convolution_backward(
            _last(x), norm, None, _dense(filters), sizes.stride, sizes.before, _last(derivative),
            None if late is None else _last(output), late, gradients,
        )  # fmt: skip
        if dx is not None and needs[0] and statistics is not None and dw is not None and db is not None:
            _leave(_left(statistics, "", weight, bias, (dw, db), dx), x, source, native)
        return dx if needs[0] else None, dw if needs[1] else None, db if needs[2] else None, df, *rest


class Squeeze(torch.autograd.Function):
    """The mean of every image of ``act(bn(x))``, from which a gate is made for :class:`GatedConvolution`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, statistics: Statistics,
        source: Written, native: _cnnrs.Kernels,
    ) -> torch.Tensor:  # fmt: skip
        # No view is returned: see `_new`.
        mean = x.new_empty(*x.shape[:2], 1, 1)
        native.squeeze(_last(x), statistics.norm(weight, bias), mean.flatten(1))
        ctx.save_for_backward(x, weight, bias, *_given(statistics))
        ctx.statistics, ctx.source, ctx.native = statistics, source, native
        return mean

    @staticmethod
    def backward(ctx: Any, derivative: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, *_ = ctx.saved_tensors
        statistics: Statistics = ctx.statistics
        source: Written = ctx.source
        needs, rest = ctx.needs_input_grad, [None] * 3
        if torch.is_grad_enabled():
            source.read_again()

            def run(x: Any, weight: Any, bias: Any) -> torch.Tensor:
                return statistics.plain(x, None, weight, bias).mean((2, 3), keepdim=True)

            return (*_again(run, (x, weight, bias), needs, derivative), *rest)
        # The gate's own reader has been here before, unless nothing comes from it.
        gated, source.gated = source.gated, None
        dx, gate = gated or (
            torch.zeros_like(x, memory_format=torch.channels_last), torch.zeros_like(derivative).flatten(1)
        )  # fmt: skip
        return (*_squeeze_backward(ctx, (x, weight, bias), gate, derivative.flatten(1), dx), *rest)


def _squeeze_backward(
    ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None], gate: torch.Tensor,
    mean: torch.Tensor, dx: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """The gradients of x, weight and bias from ``dx``, behind the gate (N, C), and ``mean``, of the mean (N, C)."""
    x, weight, bias = inputs
    statistics, needs = ctx.statistics, ctx.needs_input_grad
    dw, db = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    norm = statistics.norm(weight, bias)
    ctx.native.squeeze_backward(_last(x), norm, _dense(gate), _dense(mean), _last(dx), (dw, db))
    if needs[0]:
        _leave(_left(statistics, "", weight, bias, (dw, db), dx), x, ctx.source, ctx.native)
    return dx if needs[0] else None, dw if needs[1] else None, db if needs[2] else None


class GatedConvolution(torch.autograd.Function):
    """A 1 x 1 convolution of ``act(bn(x)) * gate``, which is (N, C, 1, 1).

    Its derivatives of ``x``, ``weight`` and ``bias`` are left for :class:`Squeeze`, from whose mean the gate was made.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, gate: torch.Tensor,
        filters: torch.Tensor, statistics: Statistics, source: Written, result: Written, native: _cnnrs.Kernels,
    ) -> torch.Tensor:  # fmt: skip
        output, memory = _new(len(x), len(filters), *x.shape[2:])
        norm, opened = statistics.norm(weight, bias), _dense(gate.flatten(1))
        native.convolution(_last(x), norm, opened, _dense(filters), memory, 1, 0, result.gathered)
        kept = output if result.takes_late else None
        ctx.save_for_backward(x, weight, bias, gate, filters, kept, *_given(statistics))
        ctx.statistics, ctx.source, ctx.result, ctx.native = statistics, source, result, native
        return output

    @staticmethod
    def backward(ctx: Any, derivative: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, gate, filters, output, *_ = ctx.saved_tensors
        statistics: Statistics = ctx.statistics
        source: Written = ctx.source
        needs, rest = ctx.needs_input_grad, [None] * 4
        if torch.is_grad_enabled():
            source.read_again()

            def run(x: Any, weight: Any, bias: Any, gate: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
                return F.conv2d(statistics.plain(x, None, weight, bias) * gate, filters)

            return (*_again(run, (x, weight, bias, gate, filters), needs, derivative), *rest)
        late = ctx.result.taken(derivative)
        dx, memory = _new(*x.shape) if any(needs[:3]) else (None, None)
        dg = x.new_empty(x.shape[:2]) if needs[3] else None
        df = torch.empty_like(filters, memory_format=torch.contiguous_format) if needs[4] else None
        opened = _dense(gate.flatten(1))
        gradients: ConvolutionGradients = {"input": memory, "weight": None, "bias": None, "gate": dg, "filters": df}
        ctx.native.convolution_backward(
            _last(x), statistics.norm(weight, bias), opened, _dense(filters), 1, 0, _last(derivative),
            None if late is None else _last(output), late, gradients,
        )  # fmt: skip
        first: tuple[torch.Tensor | None, ...] = (None, None, None)
        if dx is not None and source.is_read_again:
            # The way back through derivatives of derivatives may lead here or to `Squeeze`, or to both.
            first = _squeeze_backward(ctx, (x, weight, bias), opened, torch.zeros_like(opened), dx)
        elif dx is not None:
            source.gated = dx, opened
        return *first, None if dg is None else dg.view_as(gate), df, *rest


def _leave(late: Late, x: torch.Tensor, source: Written, native: _cnnrs.Kernels) -> None:
    """Leaves the rest of a derivative of ``x`` to who has written ``x``, or does it."""
    if source.takes_late:
        source.late = _kept(late)
    else:
        native.finish(_last(x), late)


def _kept(late: Late) -> Late:
    """With vectors of its own: hooks of parameters, which run first, may scale gradients or make a step."""
    norm = late["norm"]
    own = [None if vector is None else vector.clone() for vector in (norm["weight"], norm["bias"])]
    kept: Norm = {**norm, "weight": own[0], "bias": own[1]}
    return {**late, "norm": kept, "weight": late["weight"].clone(), "bias": late["bias"].clone()}


def _left(
    statistics: Statistics, activation: str, weight: torch.Tensor | None, bias: torch.Tensor | None,
    sums: tuple[torch.Tensor, torch.Tensor], derivative: torch.Tensor,
) -> Late:  # fmt: skip
    """What is left to do to ``derivative``, that of the result of ``activation``; ``sums``: of weight and bias."""
    norm = statistics.norm(weight, bias)
    norm["activation"] = activation
    return {
        "norm": norm, "weight": sums[0], "bias": sums[1], "training": statistics.training,
        "derivative": _last(derivative),
    }  # fmt: skip


class BatchNorm(torch.autograd.Function):
    """Batch norm, then the sum with ``residual``, then an activation."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None,
        bias: torch.Tensor | None, statistics: Statistics, source: Written, native: _cnnrs.Kernels,
    ) -> torch.Tensor:  # fmt: skip
        output, memory = _new(*x.shape)
        added = None if residual is None else _last(residual)
        native.batch_norm(_last(x), added, statistics.norm(weight, bias), memory)
        ctx.save_for_backward(x, residual, weight, bias, *_given(statistics))
        ctx.statistics, ctx.source, ctx.native = statistics, source, native
        return output

    @staticmethod
    def backward(ctx: Any, derivative: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, residual, weight, bias, *_ = ctx.saved_tensors
        statistics: Statistics = ctx.statistics
        source: Written = ctx.source
        needs, rest = ctx.needs_input_grad, [None] * 3
        if torch.is_grad_enabled():
            source.read_again()
            return (*_again(statistics.plain, (x, residual, weight, bias), needs, derivative), *rest)
        # With a sum, what goes on to x has already gone through the activation.
        late = needs[0] and source.takes_late and (residual is None or needs[1])
        dx, dx_memory = _new(*x.shape) if needs[0] and not late else (None, None)
        dr, dr_memory = _new(*x.shape) if needs[1] else (None, None)
        dw, db = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        added = None if residual is None else _last(residual)
        gradients: BatchNormGradients = {"input": dx_memory, "residual": dr_memory, "weight": dw, "bias": db}
        ctx.native.batch_norm_backward(
            _last(x), added, statistics.norm(weight, bias), _last(derivative), statistics.training, gradients
        )
        if late:
            dx = derivative.contiguous(memory_format=torch.channels_last) if dr is None else dr
            activation = statistics.activation if dr is None else ""
            source.late = _kept(_left(statistics, activation, weight, bias, (dw, db), dx))
        return dx, dr, dw if needs[2] else None, db if needs[3] else None, *rest
