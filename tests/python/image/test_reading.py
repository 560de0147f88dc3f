"""Samples of more than 8 bits and pages behind the first, beside NumPy's percentiles and Pillow's own pages."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from numpy.typing import NDArray
from PIL import Image

import cnnrs
from cnnrs.image.reading import Reader, Span, span
from deep_images import SHAPE, big_endian_tiff, color_png, deep, pages, write
from image_files import pnm_files


def gray(path: Path, reader: Reader) -> NDArray[Any]:
    image = reader(path)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def stretched(values: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    return np.rint(((values.astype(float) - low) / (high - low)).clip(0, 1) * 255)


FILES = {
    "u2.tif": 65535, "u2.png": 65535, "i4.tif": 2**31 - 1, "f4.tif": 1.0, "f4.lzw.tif": 1.0, "u2.lzw.tif": 65535,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_gray_is_stretched_as_numpy_says(name: str, tmp_path: Path) -> None:
    values = deep(name[:2], high=60000)
    compressed = {"compression": "tiff_lzw"} if "lzw" in name else {}
    path = write(tmp_path / name, values, **compressed)
    low, high = np.percentile(values.astype(float), (0.5, 99.5))
    assert (gray(path, Reader("percentile")) == stretched(values, low, high)).all()
    assert (gray(path, Reader("full")) == stretched(values, 0, FILES[name])).all()
    with Image.open(path) as image:
        assert (gray(path, Reader()) == np.asarray(image.convert("RGB"))[..., 0]).all()


def test_what_the_type_holds_is_the_files_and_not_pillows(tmp_path: Path) -> None:
    """Pillow keeps all of these as signed numbers of 32 bits, or of 16."""
    values = deep("u2", high=60000)
    assert (gray(big_endian_tiff(tmp_path / "b.tif", values), Reader("full")) == stretched(values, 0, 65535)).all()
    half = write(tmp_path / "u4.tif", np.full(SHAPE, 2**31 - 1, np.int32))
    # Bits per sample and unsigned (1): half of the range.
    data = half.read_bytes()
    assert data.count(b"\x53\x01\x03\0\x01\0\0\0\x02\0") == 1
    half.write_bytes(data.replace(b"\x53\x01\x03\0\x01\0\0\0\x02\0", b"\x53\x01\x03\0\x01\0\0\0\x01\0"))
    assert set(gray(half, Reader("full")).flat) == {127} and span(str(half)) == ("32-bit gray", 2**31 - 1, 2**31 - 1)


def test_pnm_of_any_maximum_has_16_bits(tmp_path: Path) -> None:
    for name, data in pnm_files((17, 13), np.random.default_rng(0)):
        if name in ("pnm P5 1000", "pnm P5 65535"):
            path = tmp_path / "x.pgm"
            path.write_bytes(data)
            with Image.open(path) as image:
                values = np.asarray(image)
            assert values.max() > 60000
            assert (gray(path, Reader("full")) == stretched(values, 0, 65535)).all()


def test_numbers_that_are_none(tmp_path: Path) -> None:
    values = deep("f4")
    values[0, :3] = np.nan, np.inf, -np.inf
    found = gray(write(tmp_path / "n.tif", values), Reader("percentile"))
    low, high = np.percentile(values[np.isfinite(values)].astype(float), (0.5, 99.5))
    assert found[0, :3].tolist() == [0, 255, 0]
    assert (found[1:] == stretched(values[1:], low, high)).all()
    # Nothing to stretch.
    assert not gray(write(tmp_path / "c.tif", np.full(SHAPE, 7, np.uint16)), Reader("percentile")).any()
    assert not gray(write(tmp_path / "a.tif", np.full(SHAPE, np.nan, np.float32)), Reader("percentile")).any()


def test_16_bit_colours_are_their_high_bytes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (*SHAPE, 3))
    path, high = color_png(tmp_path / "c.png", values), values >> 8
    assert (np.asarray(Reader("full")(path)) == high).all()
    assert (np.asarray(Reader("percentile")(path)) == stretched(high, *np.percentile(high, (0.5, 99.5)))).all()
    assert span(str(path)) == ("16-bit colour", 0, 4095)


@pytest.mark.parametrize("scale", ["full", "percentile"])
def test_8_bits_are_left_alone(scale: str, tmp_path: Path) -> None:
    image = picture(*SHAPE, 0)
    modes = {"a.jpg": "RGB", "b.png": "RGBA", "c.png": "P", "d.gif": "P", "e.tif": "L", "f.jpg": "CMYK", "g.png": "1"}
    for name, mode in modes.items():
        image.convert(mode).save(tmp_path / name)
        with Image.open(tmp_path / name) as plain:
            assert Reader(scale)(tmp_path / name).tobytes() == plain.convert("RGB").tobytes()


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.webp", "a.png"])
def test_pages_are_pillows(name: str, tmp_path: Path) -> None:
    path = pages(tmp_path / name, [picture(*SHAPE, i) for i in range(3)])
    for page in range(3):
        with Image.open(path) as image:
            image.seek(page)
            assert Reader(page=page)(path).tobytes() == image.convert("RGB").tobytes()
    with pytest.raises(cnnrs.DecodeError, match=r"has 3 pages, 0 to 2: there is no page 3"):
        Reader(page=3)(path)


def test_one_page_is_the_page(tmp_path: Path) -> None:
    image = picture(*SHAPE, 0)
    for name in ("a.tif", "a.gif", "a.jpg", "a.bmp"):
        image.save(tmp_path / name)
        assert Reader(page=4)(tmp_path / name).tobytes() == Reader()(tmp_path / name).tobytes()
    # The second picture of a JPEG is no page: phones put previews there.
    image.save(tmp_path / "m.jpg", format="MPO", save_all=True, append_images=[picture(*SHAPE, 1)])
    assert Reader(page=1)(tmp_path / "m.jpg").tobytes() == Reader()(tmp_path / "m.jpg").tobytes()


def test_a_scaled_page(tmp_path: Path) -> None:
    values = [deep("u2", seed) for seed in range(2)]
    path = pages(tmp_path / "a.tif", [Image.fromarray(one) for one in values])
    low, high = np.percentile(values[1], (0.5, 99.5))
    assert (gray(path, Reader("percentile", 1)) == stretched(values[1], low, high)).all()


def test_what_is_no_scale_or_page() -> None:
    for wrong in ({"scale": "linear"}, {"page": -1}, {"page": True}, {"page": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Reader(**wrong)  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(Reader("full", 2))) == Reader("full", 2)


@pytest.mark.parametrize(
    ("found", "none", "full"),
    [
        (Span("16-bit gray", 0, 255), "", "nearly black"),
        (Span("16-bit gray", 0, 4095), "white above 255", "nearly black"),
        (Span("12-bit gray", 0, 4095), "white above 255", ""),
        (Span("16-bit gray", 9, 65535), "white above 255", ""),
        (Span("32-bit signed gray", -5, 2**31 - 1), "white above 255 and black below 0", "black below 0"),
        (Span("float", 0.0, 1.0), "black, for fractions are cut off", ""),
        (Span("float", 0.0, 255.0), "", "white above 1"),
        (Span("float", -1.0, 1.0), "black below 0", "black below 0"),
        (Span("16-bit colour", 0, 4095), "nearly black", "nearly black"),
        (Span("16-bit colour", 0, 65535), "", ""),
    ],
)
def test_what_is_lost(found: Span, none: str, full: str) -> None:
    assert (found.loss(), found.loss("full"), found.loss("percentile")) == (none, full, "")
