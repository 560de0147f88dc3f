"""The images that the loaders are measured on."""

import io
import math
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image


def photos(scratch: Path) -> tuple[Path, str]:
    """The user's photos ($CNNRS_PHOTOS), the project's if they lie beside the repository, else generated ones."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "cats_dogs"
    folder = Path(os.environ.get("CNNRS_PHOTOS", beside))
    if folder.is_dir():
        # train/class and valid/class become one level of class folders; not links, which some peers skip.
        copied = scratch / "photos"
        for path in files(folder):
            place = copied / path.parent.name / f"{path.parent.parent.name}-{path.name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        return copied, f"{len(files(copied))} photos, {describe(copied)}"
    folder = scratch / "generated"
    rng = np.random.default_rng(0)
    for number in range(256):
        # Blurred noise compresses about as photos do: 30 to 60 KB at 400 x 360.
        noise = Image.fromarray(rng.integers(0, 256, (90, 100, 3), dtype=np.uint8))
        place = folder / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        noise.resize((400, 360), Image.Resampling.BICUBIC).save(place / f"{number:03}.jpg", quality=90)
    return folder, f"256 generated JPEGs, {describe(folder)}"


def files(folder: Path) -> list[Path]:
    """All JPEGs, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg"})


def describe(folder: Path) -> str:
    """Mean size in pixels and bytes."""
    pixels, size = [], []
    for path in files(folder):
        with Image.open(path) as image:
            pixels.append(image.width * image.height)
        size.append(path.stat().st_size)
    return f"{np.mean(pixels) / 1e6:.2f} megapixels and {np.mean(size) / 1e3:.0f} KB on average"


def imagenet_like(source: Path, folder: Path) -> tuple[Path, str]:
    """The photos at ImageNet's 0.2 megapixels; quality 95 or, until a file has 100 KB, higher (they lack detail)."""
    for path in files(source)[::2]:
        image = scaled(path, 0.2)
        for quality in range(95, 101):
            data = io.BytesIO()
            image.save(data, "JPEG", quality=quality)
            if data.tell() >= 100_000:
                break
        write(folder, path, data.getvalue())
    return folder, f"{len(files(folder))} photos of ImageNet's size, {describe(folder)}"


def large(source: Path, folder: Path) -> tuple[Path, str]:
    """Some photos enlarged to 2, 4, 8 and 12 megapixels, quality 90."""
    chosen = files(source)
    for number, path in enumerate(chosen[:: max(1, len(chosen) // 32)][:32]):
        data = io.BytesIO()
        scaled(path, (2, 4, 8, 12)[number % 4]).save(data, "JPEG", quality=90)
        write(folder, path, data.getvalue())
    return folder, f"{len(files(folder))} large photos, {describe(folder)}"


def scaled(path: Path, megapixels: float) -> Image.Image:
    """The photo with that many pixels."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    factor = math.sqrt(1e6 * megapixels / (image.width * image.height))
    return image.resize((round(factor * image.width), round(factor * image.height)), Image.Resampling.BICUBIC)


def write(folder: Path, path: Path, data: bytes) -> None:
    """Under the class of the original."""
    place = folder / path.parent.name / path.name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
