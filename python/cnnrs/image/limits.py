"""How many pixels an image may have."""

from __future__ import annotations

import sys
from typing import Any

UNLIMITED = 2**64 - 1


def pixel_limit(max_pixels: int | None) -> int | None:
    """``max_pixels``, or else what Pillow is set to; None is Pillow's limit as it comes."""
    pillow: Any = sys.modules.get("PIL.Image")
    if max_pixels is not None or pillow is None:
        return max_pixels
    most = pillow.MAX_IMAGE_PIXELS
    # As ``Image._decompression_bomb_check``: a warning above this, an error above twice as many.
    return UNLIMITED if most is None else min(int(2 * most), UNLIMITED)
