"""What attention within windows looks up: the numbers of distances, and what keeps tokens apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def distances(window: Sequence[int]) -> torch.Tensor:
    """The row of a table that belongs to each query and key, (T, T) int64: windows are read row by row."""
    height, width = window
    token = torch.arange(height * width)
    y, x = token // width, token % width
    return (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1


def apart(padded: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> torch.Tensor:
    """What is added to scores where an image has been rolled, (windows, T, T) float32: 0, or -100 across the seam.

    Args:
        padded: height and width, which the window divides.
        window: its sides.
        shift: less than these.
    """
    (height, width), (high, wide) = padded, window
    beyond = [torch.arange(side) >= side - by for side, by in zip(padded, shift, strict=True)]
    part = 2 * beyond[0][:, None].int() + beyond[1].int()
    part = part.view(height // high, high, width // wide, wide).transpose(1, 2).reshape(-1, high * wide)
    return (part[:, :, None] != part[:, None]) * -100.0
