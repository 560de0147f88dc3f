"""What networks of convolutions do with images (N, C, H, W) beside calling layers, where gradients do not matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cnnrs.model.operations import Unsupported, _conv_padding
from cnnrs.model.owned import number, shaped
from cnnrs.model.tokens import Tokens
from cnnrs.model.tracing import Standin


class Images(Tokens):
    """What steps on images make of the values of a graph."""

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

    def _conv1d(self, name: str, module: nn.Conv1d, x: Standin) -> Standin:
        """Of (N, C, W), as a convolution of images one pixel high."""
        shape, weight = self.shape(self._read(x)), module.weight
        if shape is None or len(shape) != 3 or module.padding_mode != "zeros" or not weight.is_contiguous():
            raise Unsupported("is a convolution of something else than (N, C, W), or pads otherwise than with zeros")
        stride, dilation = (1, module.stride[0]), (1, module.dilation[0])
        padding = module.padding if isinstance(module.padding, str) else (0, *module.padding)
        filters = shaped(weight, torch.Size([*weight.shape[:2], 1, weight.shape[2]]))
        x = self._apply(f"{name}.image", "View", [x], {"dims": [(self._read(x), 0), shape[1], 1, shape[2]]})
        x = self._apply(name, "Conv2d", [x], {
            "weight": self._tensor_index(filters), "bias": self._tensor_index(module.bias), "stride": stride,
            "dilation": dilation, "groups": module.groups,
            "padding": _conv_padding(padding, stride, dilation, filters.shape[2:]),
        })  # fmt: skip
        dims = [(self._read(x), 0), len(weight), -1]
        return self._apply(f"{name}.line", "View", [x], {"dims": dims})
