"""Tensors whose memory says what they hold."""

from __future__ import annotations

import torch
from torch import nn

#: Classes that add nothing to a tensor; nn.Buffer: since torch 2.5.
_CLASSES = (torch.Tensor, nn.Parameter, getattr(nn, "Buffer", nn.Parameter))


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the elements of a tensor are what lies in its memory, in the order of its strides, on whatever device.

    Not so for unaligned, sparse and nested tensors, lazily negated and conjugated views, and subclasses: what those
    mean only their own code knows, and fake ones have no memory at all.
    """
    return (
        type(tensor) in _CLASSES
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_neg()
        and not tensor.is_conj()
        # Not so over a NumPy array that is not.
        and tensor.data_ptr() % tensor.element_size() == 0
    )


def said(tensor: torch.Tensor) -> str:
    """What a tensor is that is not plain, for messages."""
    lazy = ", lazily negated or conjugated" if tensor.is_neg() or tensor.is_conj() else ""
    strange = type(tensor) not in _CLASSES or tensor.layout is not torch.strided or tensor.is_nested or lazy
    return f"a {type(tensor).__name__} with layout {tensor.layout}{lazy}" if strange else "a tensor that is not aligned"
