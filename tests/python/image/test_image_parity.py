"""One image: what cnnrs decodes and transforms equals Pillow and torchvision, byte for byte."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

import image_files
from image_doors import apply_op, decode_image

ORDER = "pillow13" if int(PIL.__version__.split(".")[0]) >= 13 else "horizontal_first"
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


def by_pillow(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def by_us(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8."""
    height, width, pixels = decode_image(data)
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def apply(image: Image.Image, kind: str, order: Any = ORDER, **arguments: Any) -> np.ndarray:
    """(H, W, 3) or (H, W) uint8."""
    spec: Any = {"kind": kind, **arguments}
    height, width, pixels = apply_op(image.tobytes(), image.height, image.width, spec, order)
    array = np.frombuffer(pixels, np.uint8)
    return array.reshape((height, width, 3) if array.size == 3 * height * width else (height, width))


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Noise, every third time of only black and white: overshooting filters then clip."""
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels if seed % 3 else np.where(pixels > 127, 255, 0).astype(np.uint8))


def assert_same(ours: np.ndarray, theirs: Image.Image | np.ndarray, what: object) -> None:
    expected = np.asarray(theirs)
    assert ours.shape == expected.shape, what
    assert np.array_equal(ours, expected), what


@pytest.mark.parametrize("size", image_files.SIZES)
def test_every_format_and_mode_decodes_as_pillow_does(size: tuple[int, int]) -> None:
    count = 0
    for name, data in image_files.files(size):
        assert_same(by_us(data), by_pillow(data), name)
        count += 1
    assert count > 150


def test_photos_decode_as_pillow_does(photos: Path) -> None:
    for path in sorted(photos.rglob("*.jpg"))[::10]:
        data = path.read_bytes()
        assert_same(by_us(data), by_pillow(data), path)


def test_photos_recoded_as_webp_and_gif(photos: Path) -> None:
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))[::70]):
        image = Image.open(path).convert("RGB")
        for quality in (20, 60, 90):
            data = image_files.encoded(image, "WEBP", quality=quality, method=i % 7)
            assert_same(by_us(data), by_pillow(data), (path, quality))
        data = image_files.encoded(image, "GIF")
        assert_same(by_us(data), by_pillow(data), path)


def outcome(decode: Any, data: bytes) -> np.ndarray | None:
    try:
        return np.asarray(decode(data))
    except Exception:  # whatever Pillow's plugins raise
        return None


def damaged(data: bytes, rng: np.random.Generator) -> list[bytes]:
    """Cut anywhere, cut near the end, single bits turned, a run of zeros."""
    flipped, zeroed = bytearray(data), bytearray(data)
    flipped[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    start = int(rng.integers(len(data)))
    zeroed[start : start + 50] = bytes(len(zeroed[start : start + 50]))
    return [data[: rng.integers(len(data))], data[: len(data) - rng.integers(12)], bytes(flipped), bytes(zeroed)]


@pytest.mark.parametrize("format", ["JPEG", "progressive", "CMYK", "BMP", "PPM", "TIFF", "GIF", "WEBP", "PNG"])
def test_damaged_files_fail_exactly_when_pillow_does(format: str) -> None:
    rng = np.random.default_rng(5)
    failures = 0
    for _ in range(60):
        rgb = image_files.picture(int(rng.integers(20, 90)), int(rng.integers(20, 90)), rng)
        options = {"progressive": True} if format == "progressive" else {}
        image = rgb.convert("CMYK") if format == "CMYK" else rgb
        file_format = "JPEG" if format in ("progressive", "CMYK") else format
        for data in damaged(image_files.encoded(image, file_format, **options), rng):
            ours, theirs = outcome(by_us, data), outcome(by_pillow, data)
            if theirs is not None and ours is not None:
                assert_same(ours, theirs, (format, len(data)))
            elif format == "TIFF":
                # Refused is also what is not known to be read alike: then Pillow is asked.
                assert ours is None, len(data)
            elif format != "WEBP":
                # Some single bits of WebP headers are judged differently.
                assert (ours is None) == (theirs is None), (format, len(data))
            failures += ours is None
    assert failures > 30


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_half_a_file_is_reported_as_truncated(format: str) -> None:
    data = image_files.encoded(image_files.picture(60, 50, np.random.default_rng(2)), format)
    with pytest.raises(OSError, match=r"truncated|broken"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"hello world, not an image", 'not an image .*starts with "hello world,"'),
        (b"<html><body>404</body>", 'starts with "<html><body>"'),
        (b"\x00\x01\x02\x03", "starts with bytes 00 01 02 03"),
        (b"\xff\xd8\xff", "truncated"),
    ],
)
def test_what_is_no_image_says_what_it_is(data: bytes, message: str) -> None:
    with pytest.raises(OSError, match=message):
        decode_image(data)


def test_a_bomb_is_refused_by_its_header() -> None:
    header = image_files.chunk(b"IHDR", (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
    with pytest.raises(OSError, match="60000 x 60000 pixels is over the limit"):
        decode_image(b"\x89PNG\r\n\x1a\n" + header + image_files.chunk(b"IDAT", b""))


@pytest.mark.parametrize("filter", FILTERS)
def test_resize_equals_pillow(filter: str) -> None:
    draw = random.Random(filter)
    for i in range(40):

        def side(top: int) -> int:
            return draw.choice([draw.randint(1, 20), draw.randint(1, top)])

        image = photo(side(2000 if i % 4 == 0 else 500), side(2000 if i % 4 == 1 else 500), i)
        size = (side(512), side(512))
        ours = apply(image, "resize", height=size[1], width=size[0], filter=filter)
        assert_same(ours, image.resize(size, FILTERS[filter]), (image.size, size, filter))


def test_older_pillows_resize_rows_first() -> None:
    different = 0
    for i, (size, target) in enumerate([((300, 900), (224, 224)), ((50, 400), (60, 33)), ((90, 90), (40, 17))]):
        image = photo(*size, i)
        rows_first = image.resize((target[0], size[1]), FILTERS["bilinear"]).resize(target, FILTERS["bilinear"])
        ours = apply(image, "resize", "horizontal_first", height=target[1], width=target[0], filter="bilinear")
        assert_same(ours, rows_first, (size, target))
        different += not np.array_equal(
            ours, apply(image, "resize", "pillow13", height=target[1], width=target[0], filter="bilinear")
        )
    assert different > 0


def test_resize_of_the_shorter_edge_equals_torchvision() -> None:
    draw = random.Random(1)
    for i in range(60):
        image = photo(draw.randint(1, 300), draw.randint(1, 300), i)
        edge = draw.randint(1, 200)
        max_size = edge + draw.randint(1, 100) if i % 2 else None
        try:
            expected = F.resize(image, [edge], InterpolationMode.BILINEAR, max_size=max_size)
        except ValueError:
            # An edge of zero pixels: torchvision leaves the refusal to Pillow.
            with pytest.raises(ValueError, match="must be > 0"):
                apply(image, "resize_shorter", edge=edge, max_size=max_size, filter="bilinear")
            continue
        assert_same(
            apply(image, "resize_shorter", edge=edge, max_size=max_size, filter="bilinear"),
            expected,
            (image.size, edge, max_size),
        )


def test_center_crop_equals_torchvision() -> None:
    draw = random.Random(2)
    for i in range(100):
        image = photo(draw.randint(1, 40), draw.randint(1, 40), i)
        size = [draw.randint(1, 40), draw.randint(1, 40)]
        assert_same(
            apply(image, "center_crop", height=size[0], width=size[1]), F.center_crop(image, size), (image.size, size)
        )


def test_crop_and_pad_equal_torchvision() -> None:
    draw = random.Random(4)
    for i in range(60):
        image = photo(draw.randint(1, 40), draw.randint(1, 40), i)
        height, width = draw.randint(1, image.height), draw.randint(1, image.width)
        top, left = draw.randint(0, image.height - height), draw.randint(0, image.width - width)
        expected = F.crop(image, top, left, height, width)
        assert_same(
            apply(image, "crop", top=top, left=left, height=height, width=width),
            expected,
            (image.size, top, left, height, width),
        )
        border, fill = [draw.randint(0, 9) for _ in range(4)], [draw.randint(0, 255) for _ in range(3)]
        assert_same(
            apply(image, "pad", border=border, fill=fill, mode="constant"),
            F.pad(image, border, tuple(fill)),
            (image.size, border),
        )
    with pytest.raises(ValueError, match="is larger than input image size"):
        apply(image, "crop", top=0, left=0, height=image.height + 1, width=1)


def test_random_crops_that_leave_no_choice_equal_torchvision() -> None:
    for i in range(12):
        image = photo(30 + i, 50 - 3 * i, i)
        size = (image.height, image.width)
        whole = {"scale": (1.0, 1.0), "ratio": (image.width / image.height,) * 2}
        ours = apply(image, "random_resized_crop", height=21, width=17, **whole, filter="bilinear")
        assert_same(ours, F.resized_crop(image, 0, 0, *size, [21, 17], InterpolationMode.BILINEAR), image.size)
        # One pixel missing on each axis is padded on both sides: the window is one of four.
        padded = F.pad(image, [1, 1], (7, 8, 9))
        windows = [F.crop(padded, y, x, size[0] + 1, size[1] + 1) for y in (0, 1) for x in (0, 1)]
        ours = apply(
            image, "random_crop", height=size[0] + 1, width=size[1] + 1, pad_if_needed=True, fill=[7, 8, 9],
            mode="constant",
        )  # fmt: skip
        assert any(np.array_equal(ours, np.asarray(window)) for window in windows)
    with pytest.raises(ValueError, match="is larger than input image size"):
        apply(image, "random_crop", height=99, width=99, pad_if_needed=False, fill=[0, 0, 0], mode="constant")


def test_flips_and_gray_equal_torchvision() -> None:
    for i in range(20):
        image = photo(1 + 7 * i % 23, 1 + 5 * i % 19, i)
        assert_same(apply(image, "horizontal_flip", p=1.0), F.hflip(image), image.size)
        assert_same(apply(image, "vertical_flip", p=1.0), F.vflip(image), image.size)
        assert_same(apply(image, "horizontal_flip", p=0.0), image, image.size)
        assert_same(apply(image, "grayscale", channels=1), F.to_grayscale(image, 1), image.size)
        assert_same(apply(image, "grayscale", channels=3), F.to_grayscale(image, 3), image.size)


@pytest.mark.parametrize("filter", ["nearest", "bilinear"])
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("center", [None, (3.0, 11.5), (0.0, 0.0)])
def test_rotation_equals_torchvision(filter: str, expand: bool, center: tuple[float, float] | None) -> None:
    draw = random.Random(3)
    mode = InterpolationMode(filter)
    right_angles = [0.0, 90.0, 180.0, 270.0, 360.0, -90.0, 450.0]
    for i in range(60):
        angle = right_angles[i] if i < len(right_angles) else float(np.float32(draw.uniform(-400, 400)))
        width = draw.randint(1, 60)
        image = photo(width, width if i % 5 == 0 else draw.randint(1, 60), i)
        fill = [draw.randint(0, 255) for _ in range(3)]
        expected = F.rotate(image, angle, mode, expand, center, fill)
        ours = apply(image, "rotation", low=angle, high=angle, filter=filter, expand=expand, center=center, fill=fill)
        assert_same(ours, expected, (image.size, angle, filter, expand, center))
