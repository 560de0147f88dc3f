"""PyTorch's layers and functions, and the operation of the graph that does the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cnnrs._records import Attributes, OpKind

#: Gives the index of a parameter or buffer.
Index = Callable[[torch.Tensor | None], int | None]


class Unsupported(Exception):
    """An operation has no counterpart in the graph; the message says which and why."""


# -- layers --------------------------------------------------------------------------------------------------


def _pair(value: Any, what: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(side, int) for side in pair):
        raise Unsupported(f"{what} is {value!r}")
    if min(pair) < 0:
        raise Unsupported(f"{what} is negative: {value!r}")
    return pair[0], pair[1]


def _conv_padding(
    padding: Any, stride: tuple[int, int], dilation: tuple[int, int], kernel: Sequence[int]
) -> tuple[int, int]:
    if padding == "valid":
        return 0, 0
    if padding != "same":
        return _pair(padding, "padding")
    if stride != (1, 1):
        raise Unsupported(f"padding='same' with stride {stride}")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        raise Unsupported("padding='same' with an even kernel pads one side more than the other")
    return total[0] // 2, total[1] // 2


def _conv2d(
    tensor: Index, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Attributes:  # fmt: skip
    _check_rank(weight, 4)
    stride, dilation = _pair(stride, "stride"), _pair(dilation, "dilation")
    return {
        "weight": tensor(weight), "bias": tensor(bias), "stride": stride, "dilation": dilation, "groups": groups,
        "padding": _conv_padding(padding, stride, dilation, weight.shape[2:]),
    }  # fmt: skip


def _conv2d_layer(m: nn.Conv2d, tensor: Index) -> Attributes:
    if m.padding_mode != "zeros":
        raise Unsupported(f"padding_mode is {m.padding_mode!r}")
    return _conv2d(tensor, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)


def _linear(tensor: Index, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Attributes:
    _check_rank(weight, 2)
    return {"weight": tensor(weight), "bias": tensor(bias)}


def _check_rank(weight: torch.Tensor, rank: int) -> None:
    if weight.ndim != rank:
        raise Unsupported(f"expects a weight of {rank} dimensions, got shape {tuple(weight.shape)}")


def _layer_norm(
    tensor: Index, normalized_shape: Sequence[int], weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, eps: float = 1e-5,
) -> Attributes:  # fmt: skip
    return {"shape": list(normalized_shape), "weight": tensor(weight), "bias": tensor(bias), "eps": eps}


def _batch_norm(
    tensor: Index, running_mean: torch.Tensor | None, running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Attributes:  # fmt: skip
    if (running_mean is None) != (running_var is None) or not (training or running_mean is not None):
        raise Unsupported("a running statistic is missing")
    return {
        "weight": tensor(weight), "bias": tensor(bias), "running_mean": tensor(running_mean),
        "running_var": tensor(running_var), "num_batches_tracked": None, "momentum": momentum, "eps": eps,
        "training": training,
    }  # fmt: skip


def _batch_norm_layer(m: nn.BatchNorm2d, tensor: Index) -> Attributes:
    # As nn.BatchNorm2d.forward: a training layer that tracks nothing leaves its statistics alone.
    statistics = not m.training or m.track_running_stats
    if statistics and (m.running_mean is None) != (m.running_var is None):
        raise Unsupported("a running statistic is missing")
    return {
        "weight": tensor(m.weight), "bias": tensor(m.bias),
        "running_mean": tensor(m.running_mean) if statistics else None,
        "running_var": tensor(m.running_var) if statistics else None,
        "num_batches_tracked": tensor(m.num_batches_tracked) if m.track_running_stats else None,
        "momentum": m.momentum, "eps": m.eps, "training": m.training,
    }  # fmt: skip


def _pad(pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Attributes:
    if mode != "constant" or value not in (None, 0):
        raise Unsupported(f"pads with mode={mode!r}, value={value!r}, not with zeros")
    if len(pad) not in (2, 4) or not all(isinstance(side, int) and side >= 0 for side in pad):
        raise Unsupported(f"padding {tuple(pad)} is not (left, right) or (left, right, top, bottom) of images")
    left, right, top, bottom = [*pad, 0, 0][:4]
    return {"before": (top, left), "after": (bottom, right)}


def _permute(*dims: Any) -> Attributes:
    order = list(dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)
    if any(not -len(order) <= d < len(order) for d in order):
        raise Unsupported(f"{order} is no order of {len(order)} dimensions")
    return {"dims": [d % len(order) for d in order]}


def _stride(stride: Any, kernel: tuple[int, int]) -> tuple[int, int]:
    """Of a pool: as long as its kernel, where none is given."""
    return kernel if stride is None or stride in ((), []) else _pair(stride, "stride")


def _max_pool2d(
    kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Attributes:  # fmt: skip
    if return_indices:
        raise Unsupported("return_indices=True returns two values")
    kernel = _pair(kernel_size, "kernel_size")
    return {
        "kernel": kernel, "stride": _stride(stride, kernel), "padding": _pair(padding, "padding"),
        "dilation": _pair(dilation, "dilation"), "ceil_mode": ceil_mode,
    }  # fmt: skip


def _avg_pool2d(
    kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Attributes:  # fmt: skip
    kernel = _pair(kernel_size, "kernel_size")
    return {
        "kernel": kernel, "stride": _stride(stride, kernel), "padding": _pair(padding, "padding"),
        "ceil_mode": ceil_mode, "count_include_pad": count_include_pad, "divisor": divisor_override,
    }  # fmt: skip


def _adaptive(output_size: Any) -> Attributes:
    return {"output": tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size, output_size)}


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False, channels: bool = False) -> Attributes:
    if not (isinstance(p, (int, float)) and 0 <= p <= 1):
        raise Unsupported(f"dropout probability has to be between 0 and 1, but got {p}")
    return {"p": p, "training": training, "channels": channels, "inplace": inplace}


def _dropout2d(p: float = 0.5, training: bool = True, inplace: bool = False) -> Attributes:
    return _dropout(p, training, inplace, channels=True)


def _softmax(dim: int | None, log: bool) -> Attributes:
    if dim is None:
        raise Unsupported("softmax without dim: PyTorch guesses it and warns")
    return {"dim": dim, "log": log}


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Attributes:
    if inplace and negative_slope < 0:
        raise Unsupported("a negative slope cannot be undone in backward, so not be used in place")
    return {"negative_slope": negative_slope, "inplace": inplace}


def _gelu(approximate: str) -> Attributes:
    if approximate not in ("none", "tanh"):
        raise Unsupported(f"approximate is {approximate!r}")
    return {"tanh": approximate == "tanh", "inplace": False}


#: Exact layer type -> (kind, attributes of the instance). A subclass may do anything, so it is not looked up here.
LAYERS: dict[type[nn.Module], tuple[OpKind, Callable[[Any, Index], Attributes]]] = {
    nn.Conv2d: ("Conv2d", _conv2d_layer),
    nn.BatchNorm2d: ("BatchNorm2d", _batch_norm_layer),
    nn.Linear: ("Linear", lambda m, tensor: _linear(tensor, m.weight, m.bias)),
    nn.LayerNorm: ("LayerNorm", lambda m, tensor: _layer_norm(tensor, m.normalized_shape, m.weight, m.bias, m.eps)),
    nn.ZeroPad2d: ("ZeroPad2d", lambda m, _: _pad(m.padding)),
    nn.ConstantPad2d: ("ZeroPad2d", lambda m, _: _pad(m.padding, value=m.value)),
    nn.ReLU: ("ReLU", lambda m, _: {"inplace": m.inplace}),
    nn.ReLU6: ("ReLU6", lambda m, _: {"inplace": m.inplace}),
    nn.LeakyReLU: ("LeakyReLU", lambda m, _: _leaky_relu(m.negative_slope, m.inplace)),
    nn.SiLU: ("SiLU", lambda m, _: {"inplace": m.inplace}),
    nn.GELU: ("GELU", lambda m, _: _gelu(m.approximate)),
    nn.Hardswish: ("Hardswish", lambda m, _: {"inplace": m.inplace}),
    nn.Hardsigmoid: ("Hardsigmoid", lambda m, _: {"inplace": m.inplace}),
    nn.Sigmoid: ("Sigmoid", lambda m, _: {"inplace": False}),
    nn.Tanh: ("Tanh", lambda m, _: {"inplace": False}),
    nn.MaxPool2d: (
        "MaxPool2d",
        lambda m, _: _max_pool2d(m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices),
    ),
    nn.AvgPool2d: (
        "AvgPool2d",
        lambda m, _: _avg_pool2d(
            m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
        ),
    ),
    nn.AdaptiveAvgPool2d: ("AdaptiveAvgPool2d", lambda m, _: _adaptive(m.output_size)),
    nn.Dropout: ("Dropout", lambda m, _: _dropout(m.p, m.training, m.inplace)),
    nn.Dropout2d: ("Dropout", lambda m, _: _dropout2d(m.p, m.training, m.inplace)),
    nn.Flatten: ("Flatten", lambda m, _: {"start": m.start_dim, "end": m.end_dim}),
    nn.LogSoftmax: ("Softmax", lambda m, _: _softmax(m.dim, log=True)),
    nn.Softmax: ("Softmax", lambda m, _: _softmax(m.dim, log=False)),
    nn.ChannelShuffle: ("ChannelShuffle", lambda m, _: {"groups": m.groups}),
}

# -- functions and methods -----------------------------------------------------------------------------------

#: Function -> (kind, attributes of the arguments after the tensor).
FUNCTIONS: dict[Any, tuple[OpKind, Callable[..., Attributes]]] = {
    F.relu: ("ReLU", lambda inplace=False: {"inplace": inplace}),
    torch.relu: ("ReLU", lambda: {"inplace": False}),
    F.relu6: ("ReLU6", lambda inplace=False: {"inplace": inplace}),
    F.leaky_relu: ("LeakyReLU", _leaky_relu),
    F.silu: ("SiLU", lambda inplace=False: {"inplace": inplace}),
    F.gelu: ("GELU", lambda approximate="none": _gelu(approximate)),
    F.hardswish: ("Hardswish", lambda inplace=False: {"inplace": inplace}),
    F.hardsigmoid: ("Hardsigmoid", lambda inplace=False: {"inplace": inplace}),
    F.sigmoid: ("Sigmoid", lambda: {"inplace": False}),
    torch.sigmoid: ("Sigmoid", lambda: {"inplace": False}),
    F.tanh: ("Tanh", lambda: {"inplace": False}),
    torch.tanh: ("Tanh", lambda: {"inplace": False}),
    F.max_pool2d: ("MaxPool2d", _max_pool2d),
    F.avg_pool2d: ("AvgPool2d", _avg_pool2d),
    F.adaptive_avg_pool2d: ("AdaptiveAvgPool2d", _adaptive),
    F.dropout: ("Dropout", _dropout),
    F.dropout2d: ("Dropout", _dropout2d),
    F.log_softmax: ("Softmax", lambda dim=None: _softmax(dim, log=True)),
    torch.log_softmax: ("Softmax", lambda dim: _softmax(dim, log=True)),
    F.softmax: ("Softmax", lambda dim=None: _softmax(dim, log=False)),
    torch.softmax: ("Softmax", lambda dim: _softmax(dim, log=False)),
    torch.flatten: ("Flatten", lambda start_dim=0, end_dim=-1: {"start": start_dim, "end": end_dim}),
    F.pad: ("ZeroPad2d", _pad),
    torch.permute: ("Permute", _permute),
    torch.channel_shuffle: ("ChannelShuffle", lambda groups: {"groups": groups}),
    torch.mean: ("Mean", lambda dim, keepdim=False: {"dims": _dims(dim), "keepdim": keepdim}),
}

#: Function of a tensor and of the module's own weights -> (kind, attributes of the arguments after the tensor).
WEIGHTED: dict[Any, tuple[OpKind, Callable[..., Attributes]]] = {
    F.conv2d: ("Conv2d", _conv2d),
    F.linear: ("Linear", _linear),
    F.layer_norm: ("LayerNorm", _layer_norm),
    F.batch_norm: ("BatchNorm2d", _batch_norm),
}

#: Method of a tensor -> the function that does the same.
METHODS: dict[str, Any] = {
    "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "flatten": torch.flatten, "mean": torch.mean,
    "permute": torch.permute,
    "softmax": torch.softmax, "log_softmax": torch.log_softmax,
}  # fmt: skip
#: Name of a function or method in place -> the function with a value of its own.
INPLACE: dict[str, Any] = {
    "relu_": torch.relu, "sigmoid_": torch.sigmoid, "tanh_": torch.tanh, "leaky_relu_": F.leaky_relu,
}  # fmt: skip
#: Functions and methods of two tensors; ``x += y`` is the method ``add_``.
BINARY: dict[Any, tuple[OpKind, Attributes]] = {
    **dict.fromkeys((torch.add, "add"), ("Add", {"inplace": False})),
    "add_": ("Add", {"inplace": True}),
    **dict.fromkeys((torch.mul, "mul"), ("Mul", {"inplace": False})),
    "mul_": ("Mul", {"inplace": True}),
}


def _dims(dim: Any) -> list[int]:
    dims = [dim] if isinstance(dim, int) else list(dim)
    if not dims:
        raise Unsupported("a mean over no dimension is one over all of them")
    return dims
