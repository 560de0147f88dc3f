"""Images in memory give the pixels that a file of them gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_tensor

from cnnrs.data.pictures import pictures
from cnnrs.image.reading import Reader
from deep_images import color_png, deep
from image_files import chunk

PHOTO = picture(20, 31, 0)
PIXELS = np.asarray(PHOTO)
GRAY = PHOTO.convert("L")
ALPHA = PHOTO.convert("RGBA")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (PHOTO, PHOTO),
        (GRAY, GRAY.convert("RGB")),
        (PHOTO.convert("P"), PHOTO.convert("P").convert("RGB")),
        (PIXELS, PHOTO),
        (PIXELS[::-1], ImageOps.flip(PHOTO)),
        (np.asarray(GRAY), GRAY.convert("RGB")),
        (np.asarray(GRAY)[..., None], GRAY.convert("RGB")),
        (np.asarray(ALPHA), PHOTO),
        (PIXELS / 255, PHOTO),
        (pil_to_tensor(PHOTO), PHOTO),
        (to_tensor(PHOTO), PHOTO),
        (to_tensor(PHOTO).double(), PHOTO),
        (torch.ones(3, 20, 31, dtype=torch.bfloat16), Image.new("RGB", (31, 20), "white")),
        (to_tensor(GRAY), GRAY.convert("RGB")),
        (to_tensor(GRAY)[0], GRAY.convert("RGB")),
        (pil_to_tensor(ALPHA), PHOTO),
    ],
)
def test_one_image(given: Any, expected: Image.Image) -> None:
    (found,) = pictures(given)
    assert found.mode == "RGB" and found.size == expected.size and found.tobytes() == expected.tobytes()


def test_batches() -> None:
    other = picture(20, 31, 1)
    for batch in (
        np.stack([PIXELS, np.asarray(other)]),
        torch.stack([to_tensor(PHOTO), to_tensor(other)]),
        torch.stack([pil_to_tensor(PHOTO), pil_to_tensor(other)]).to(memory_format=torch.channels_last),
    ):
        assert [one.tobytes() for one in pictures(batch)] == [PHOTO.tobytes(), other.tobytes()]


def test_exif() -> None:
    turned = PHOTO.copy()
    turned.getexif()[0x0112] = 6
    assert pictures(turned)[0].tobytes() == PHOTO.tobytes()
    assert pictures(turned, exif=True)[0].tobytes() == ImageOps.exif_transpose(turned).tobytes() != PHOTO.tobytes()


@pytest.mark.parametrize("exif", [False, True])
def test_depth_is_known_before_it_is_turned(tmp_path: Path, exif: bool) -> None:
    """16-bit colours, of which a picture that was turned knows nothing more."""
    path = color_png(tmp_path / "a.png", np.stack([deep("u2", seed, 65535) // 4 for seed in range(3)], axis=-1))
    tags = Image.Exif()
    tags[0x0112] = 6
    # Behind the signature and the header.
    data = path.read_bytes()
    path.write_bytes(data[:33] + chunk(b"eXIf", tags.tobytes().removeprefix(b"Exif\0\0")) + data[33:])
    expected = Reader("percentile")(path)
    with Image.open(path) as image:
        (found,) = pictures(image, exif, "percentile")
    expected = expected.transpose(Image.Transpose.ROTATE_270) if exif else expected
    assert found.size == expected.size and found.tobytes() == expected.tobytes() != Reader()(path).tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_of_files(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    PHOTO.save(tmp_path / "a", kind, exif=exif)
    for loads in (False, True):
        with Image.open(tmp_path / "a") as image, Image.open(tmp_path / "a") as other:
            if loads:
                image.load()
            expected = ImageOps.exif_transpose(other)
            assert pictures(image, exif=True)[0].tobytes() == expected.tobytes() and expected.size == (20, 31)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            np.zeros((3, 20, 30), np.uint8),
            r"an image is an \(H, W\), \(H, W, C\) or .* array .*, got shape \(3, 20, 30\)",
        ),
        (torch.zeros(20, 30, 3), r"an image is an \(H, W\), \(C, H, W\) or .* tensor .*, got shape \(20, 30, 3\)"),
        (np.zeros(5, np.uint8), r"got shape \(5,\)"),
        (torch.zeros(0, 3, 5, 5)[0:0, :, :0], r"got shape \(0, 3, 0, 5\)"),
        (PIXELS.astype(np.uint16), "an image holds uint8, or floats from 0 to 1, got uint16"),
        (pil_to_tensor(PHOTO).long(), "got int64"),
        (PIXELS.astype(np.float32), r"holds 0 to 1, got \d+ to 2\d\d: divide by 255, or give it as it was before"),
        (to_tensor(PHOTO) * 4 - 2, "before it was normalised"),
        (torch.full((3, 4, 4), torch.nan), "holds 0 to 1, got nan to nan"),
    ],
)
def test_what_is_no_image(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pictures(given)
