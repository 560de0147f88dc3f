"""Sequences of tokens (N, T, C): which of them are taken, and what is put in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cnnrs.model.operations import Unsupported


def taken(shape: Sequence[int | None] | None, index: Any) -> tuple[list[int], int, bool]:
    """What ``x[:, i]`` and ``x[:, i:j]`` take.

    Args:
        shape: of the tokens; None for what the batch decides, or where nothing is known.
        index: in brackets.

    Returns:
        The sizes of the parts before, of what is taken, and behind, without empty ones; the number of the part that is
        taken; whether it is one token without a dimension of its own.

    Raises:
        Unsupported: it is something else.
    """
    all_of = slice(None)
    if not isinstance(index, tuple) or shape is None or len(shape) != 3 or shape[1] is None:
        raise Unsupported(_OTHERS)
    count = shape[1]
    whole: tuple[Any, ...] = (*index, all_of)
    batch, tokens, *rest = whole
    if batch != all_of or len(rest) > 2 or any(part is not Ellipsis and part != all_of for part in rest):
        raise Unsupported(_OTHERS)
    one = type(tokens) is int and -count <= tokens < count
    if one:
        start, end = tokens % count, tokens % count + 1
    elif isinstance(tokens, slice) and all(part is None or type(part) is int for part in _parts(tokens)):
        start, end, each = tokens.indices(count)
        if each != 1 or end <= start:
            raise Unsupported(_OTHERS)
    else:
        raise Unsupported(_OTHERS)
    sizes = [size for size in (start, end - start, count - end) if size > 0]
    return sizes, int(start > 0), one


_OTHERS = "takes something else than some tokens of every sample"


def _parts(tokens: slice) -> tuple[Any, Any, Any]:
    return tokens.start, tokens.stop, tokens.step


def is_sequence(tensor: torch.Tensor, sizes: Sequence[Any]) -> bool:
    """Whether ``tensor.expand(sizes)`` repeats one sequence of tokens (1, T, C), as it is, per sample."""
    if tensor.ndim != 3 or len(sizes) != 3 or tensor.shape[0] != 1:
        return False
    kept = zip(sizes[1:], tensor.shape[1:], strict=True)
    return all(type(size) is int and size in (-1, own) for size, own in kept)
