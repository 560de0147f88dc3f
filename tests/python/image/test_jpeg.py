"""JPEGs of every kind that Pillow writes, sound and damaged: Pillow's pixels, or none where Pillow has none."""

from __future__ import annotations

import io
import random
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from image_doors import decode_image

RESTARTS: list[dict[str, int]] = [
    {},
    {"restart_marker_rows": 1},
    {"restart_marker_blocks": 1},
    {"restart_marker_blocks": 7},
]


def picture(draw: random.Random, mode: str) -> Image.Image:
    """A few blurred blobs with some noise: all code lengths, runs and empty blocks occur."""
    rng = np.random.default_rng(draw.randrange(1 << 30))
    size = (draw.randint(1, 170), draw.randint(1, 170))
    blobs = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    smooth = blobs.resize(size, Image.Resampling.BICUBIC)
    grain = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return Image.blend(smooth, grain, draw.choice([0.0, 0.1, 0.5])).convert(mode)


def encoded(draw: random.Random, mode: str, **options: Any) -> bytes:
    """A JPEG of a random picture."""
    data = io.BytesIO()
    # The encoder cannot pause inside a restart interval: its buffer must hold the whole file.
    ImageFile.MAXBLOCK = 1 << 20
    quality = draw.choice([1, 10, 50, 75, 90, 95, 100])
    picture(draw, mode).save(data, "JPEG", quality=quality, **options)
    return data.getvalue()


def pillow(data: bytes) -> tuple[int, int, bytes] | None:
    """What Pillow reads; None when it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data)).convert("RGB")
    except Exception:
        return None
    return image.height, image.width, image.tobytes()


def ours(data: bytes) -> tuple[int, int, bytes] | None:
    """What cnnrs reads; None when it refuses."""
    try:
        height, width, pixels = decode_image(data)
    except Exception:
        return None
    return height, width, bytes(pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("restart", RESTARTS, ids=str)
def test_every_kind_decodes_as_pillow_does(mode: str, restart: dict[str, int]) -> None:
    """Baseline (our entropy decoder) and progressive (libjpeg's), standard and optimised tables, all subsamplings."""
    draw = random.Random(f"{mode}{restart}")
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        for optimize in (False, True):
            for progressive in (False, True):
                for _ in range(4):
                    data = encoded(
                        draw, mode, subsampling=subsampling, optimize=optimize, progressive=progressive, **restart
                    )
                    expected = pillow(data)
                    assert expected is not None
                    assert ours(data) == expected, (subsampling, optimize, progressive)


@pytest.mark.parametrize("restart", RESTARTS, ids=str)
def test_damaged_files_get_pillows_verdict(restart: dict[str, int]) -> None:
    """Turned bits, bytes that are missing, ends that are missing."""
    draw = random.Random(str(restart))
    refused = 0
    for _ in range(400):
        data = bytearray(encoded(draw, draw.choice(["RGB", "L"]), **restart))
        kind = draw.randrange(4)
        if kind == 0:
            del data[draw.randrange(len(data)) :]
        elif kind == 1:
            for _ in range(draw.choice([1, 1, 4])):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 2:
            start = draw.randrange(len(data))
            del data[start : start + draw.randrange(1, 40)]
        else:
            del data[len(data) - draw.randrange(1, min(40, len(data))) :]
        expected = pillow(bytes(data))
        refused += expected is None
        assert ours(bytes(data)) == expected
    assert 40 < refused < 360, "the damage was too little or too much to tell anything"
