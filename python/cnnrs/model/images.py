"""What networks of convolutions do with images (N, C, H, W) beside calling layers, where gradients do not matter."""

from __future__ import annotations

from typing import Any

from torch import nn

from cnnrs.model.operations import Unsupported, _conv_padding
from cnnrs.model.owned import number
from cnnrs.model.response_norm import Responses
from cnnrs.model.tokens import Tokens
from cnnrs.model.tracing import Standin


class Images(Tokens):
    """What steps on images make of the values of a graph."""

    _responses: Responses | None = None

    def _normed(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Standin | None:
        """A response norm, or a step on the way to one; None where it is something else."""
        if self.image is None:
            return None
        self._responses = self._responses or Responses(
            self._recorder, self._read, self.shape, lambda tensor: self._own_name(tensor) is not None
        )
        made = self._responses.call(name, args, kwargs)
        if made is None or isinstance(made, Standin):
            return made
        x, norm = made
        weight, bias = norm.weight, norm.bias
        assert weight is not None and bias is not None
        holder = str(self._own_name(weight)).rpartition(".")[0] or self._unique("response_norm")
        own = [self._tensor_index(self._own.flat(tensor)) for tensor in (weight, bias)]
        attributes = {"dims": list(norm.dims), "weight": own[0], "bias": own[1], "eps": norm.eps}
        return self._apply(holder, "ResponseNorm", [x], attributes)

    def _difference(self, operands: list[Any]) -> Standin:
        """``x - y``."""
        x, y = (self._tensor(operand) for operand in operands)
        factor = {"factor": self._tensor_index(number(-1.0)), "first": False}
        if not self._own.is_float32:
            raise Unsupported("is a difference in another type than float32")
        minus = self._apply(self._unique("neg"), "Scale", [y], factor)
        return self._apply(self._unique("sub"), "Add", [x, minus], {"inplace": False})

    def _group_norm(
        self, name: str, x: Standin, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Standin:
        if len(self.shape(self._read(x)) or ()) != 4:
            raise Unsupported("normalises something else than images (N, C, H, W)")
        if num_groups != 1:
            raise Unsupported(f"divides channels into {num_groups} groups, which has no counterpart yet")
        if any(tensor is not None and self._own_name(tensor) is None for tensor in (weight, bias)):
            raise Unsupported("a weight is computed, not a parameter or buffer")
        own = [None if tensor is None else self._tensor_index(tensor) for tensor in (weight, bias)]
        attributes = {"groups": num_groups, "weight": own[0], "bias": own[1], "eps": eps}
        return self._apply(name, "GroupNorm", [x], attributes)

    def _upsampled(
        self, name: str, x: Standin, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
        align_corners: Any = None, recompute_scale_factor: Any = None, antialias: bool = False,
    ) -> Standin:  # fmt: skip
        """Interpolation "nearest" by powers of two, where PyTorch's choice of pixels is not a matter of rounding."""
        shape = self.shape(self._read(x))
        if mode != "nearest" or align_corners is not None or antialias or shape is None or len(shape) != 4:
            raise Unsupported(f"interpolates images in mode {mode!r}, or something else than images")
        if recompute_scale_factor or (size is None) == (scale_factor is None):
            raise Unsupported("is not told one size of its result")
        given = scale_factor if size is None else size
        pair = list(given) if isinstance(given, (tuple, list)) else [given, given]
        if len(pair) != 2 or any(type(side) not in (int, float) for side in pair):
            raise Unsupported(f"interpolates to {given!r}")
        scale = pair if size is None else [side / (own or 1) for side, own in zip(pair, shape[2:], strict=True)]
        if any(side not in (1, 2, 4, 8, 16, 32) for side in scale):
            raise Unsupported(f"interpolates by {scale}, not by powers of two")
        return self._apply(name, "Upsample", [x], {"scale": (int(scale[0]), int(scale[1]))})

    def _numbered(self, name: str, operands: list[Any], inplace: bool) -> Standin | None:
        """``x + 1`` and ``x * 2``, in either order; None where there is no number."""
        numbers = [value for value in operands if type(value) in (int, float)]
        if len(numbers) != 1 or self.gradients:
            return None
        x, value = self._tensor(next(o for o in operands if type(o) not in (int, float))), float(numbers[0])
        if value == (0.0 if name == "Add" else 1.0):
            return x if inplace else self._again(x)
        if inplace or self.image is None or not self._own.is_float32:
            return None
        if name == "Mul":
            arguments = {"factor": self._tensor_index(number(value)), "first": type(operands[1]) is Standin}
            return self._apply(self._unique("mul"), "Scale", [x], arguments)
        return self._apply(self._unique("add"), "Shift", [x], {"summand": self._tensor_index(number(value))})

    def _spread(self, x: Standin, like: Any) -> Standin:
        """``x.expand_as(y)`` of one pixel per channel, which is there for a product with y."""
        shape = self.shape(self._read(self._tensor(like)))
        own = self.shape(self._read(x))
        if shape is None or own is None or len(own) != 4 or own[2:] != [1, 1] or own[1] != shape[1] or len(shape) != 4:
            raise Unsupported("expands something else than one pixel per channel")
        made = self._again(x)
        made.spread = shape
        return made

    def _narrow(self, operands: list[Any]) -> list[Any]:
        """Operands of a product, which an expanded one leaves as wide as they are."""
        wide = [o.spread for o in operands if isinstance(o, Standin) and o.spread is not None]
        if not wide:
            return operands
        others = [o for o in operands if isinstance(o, Standin) and o.spread is None]
        if len(others) != 1 or self.shape(self._read(others[0])) != wide[0]:
            raise Unsupported("multiplies an expanded value by one of another shape")
        narrow = [self._recorder.value(o.node, o.memory) if o is not others[0] else o for o in operands]
        for made, given in zip(narrow, operands, strict=True):
            made.version = given.version
        return narrow

    def _of_image(self, name: str, module: nn.Module, x: Standin) -> Standin:
        if isinstance(module, nn.GroupNorm):
            return self._group_norm(name, x, module.num_groups, module.weight, module.bias, module.eps)
        assert isinstance(module, nn.Upsample)
        return self._upsampled(
            name, x, module.size, module.scale_factor, module.mode, module.align_corners, module.recompute_scale_factor
        )

    def _conv1d(self, name: str, module: nn.Conv1d, x: Standin) -> Standin:
        """Of (N, C, W), as a convolution of images one pixel high."""
        shape, weight = self.shape(self._read(x)), module.weight
        if shape is None or len(shape) != 3 or module.padding_mode != "zeros" or not weight.is_contiguous():
            raise Unsupported("is a convolution of something else than (N, C, W), or pads otherwise than with zeros")
        stride, dilation = (1, module.stride[0]), (1, module.dilation[0])
        padding = module.padding if isinstance(module.padding, str) else (0, *module.padding)
        filters = weight.detach()[:, :, None]
        x = self._apply(f"{name}.image", "View", [x], {"dims": [(self._read(x), 0), shape[1], 1, shape[2]]})
        x = self._apply(name, "Conv2d", [x], {
            "weight": self._tensor_index(filters), "bias": self._tensor_index(module.bias), "stride": stride,
            "dilation": dilation, "groups": module.groups,
            "padding": _conv_padding(padding, stride, dilation, filters.shape[2:]),
        })  # fmt: skip
        dims = [(self._read(x), 0), len(weight), -1]
        return self._apply(f"{name}.line", "View", [x], {"dims": dims})
