"""HEIC beside the real pillow-heif: `make test-extras`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import picture
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms.functional import to_tensor

import cnnrs
from cnnrs.data.glance import glance
from cnnrs.data.photos import left_out

pillow_heif = pytest.importorskip("pillow_heif")


@pytest.fixture
def iphone(tmp_path: Path) -> Path:
    """Two photos whose EXIF data say how a telephone was held, and one that was renamed."""
    pillow_heif.register_heif_opener()
    (tmp_path / "a").mkdir()
    for i, orientation in enumerate((1, 6)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture(48, 64, i).save(tmp_path / "a" / f"{i}.HEIC", format="HEIF", exif=exif)
    (tmp_path / "a" / "2.jpg").write_bytes((tmp_path / "a" / "0.HEIC").read_bytes())
    return tmp_path


@pytest.mark.parametrize("exif", [False, True])
def test_heic_is_read_as_pillow_heif_reads_it(iphone: Path, exif: bool) -> None:
    """Upright, for HEIC turns by itself what is to be turned: its EXIF data say it once more, and are not obeyed."""
    folder = cnnrs.ImageFolder(iphone, transforms.ToTensor(), extensions=cnnrs.photo_extensions())
    assert [Path(path).name for path, _ in folder.samples] == ["0.HEIC", "1.HEIC", "2.jpg"]
    found = [image for image, _ in cnnrs.DataLoader(folder, None, exif=exif)]
    for image, (direct, _), (path, _) in zip(found, folder, folder.samples, strict=True):
        with Image.open(path) as opened:
            expected = to_tensor(ImageOps.exif_transpose(opened).convert("RGB"))
        assert torch.equal(image, expected) and torch.equal(direct, expected)
        assert image.shape == (3, 48, 64)


def test_check_and_glance_know_it(iphone: Path) -> None:
    report = cnnrs.check(iphone)
    assert report.ok and report.files == 3 and not left_out(iphone) and len(report.slow) == 3
    assert report.wrong_extension == [(str(iphone / "a" / "2.jpg"), "HEIF")]
    assert report.rotated == []
    folder = cnnrs.ImageFolder(iphone, extensions=cnnrs.photo_extensions())
    assert len(glance(folder.samples, folder.classes)) == 2
