"""`cnnrs.check` on folders whose faults are known."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import picture
from PIL import Image

from cnnrs.data.check import check


@pytest.fixture
def sick(tmp_path: Path) -> Path:
    for name in ("cat", "dog", "empty", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    for i in range(6):
        picture(20, 30, i).save(tmp_path / ("cat" if i < 4 else "dog") / f"{i}.jpg")
    cat = tmp_path / "cat"
    (cat / "text.jpg").write_text("not an image at all")
    (cat / "zero.png").write_bytes(b"")
    whole = (cat / "0.jpg").read_bytes()
    (cat / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    shutil.copy(cat / "1.jpg", tmp_path / "dog" / "copy.jpg")
    picture(20, 30, 7).save(cat / "really.jpg", format="PNG")
    picture(20, 30, 8).convert("CMYK").save(cat / "print.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(40, 50, 9).save(cat / "phone.jpg", exif=exif)
    picture(20, 30, 10).save(cat / "rare.jpg", format="JPEG2000")
    picture(20, 30, 11).save(tmp_path / ".ipynb_checkpoints" / "h.jpg")
    return tmp_path


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_fault_is_in_its_list(sick: Path, num_workers: int) -> None:
    report = check(sick, num_workers=num_workers)
    cat, dog = str(sick / "cat"), str(sick / "dog")
    # What is hidden is no sample, as in training.
    assert report.files == 14
    assert report.classes == {"cat": 11, "dog": 3, "empty": 0}
    assert [(one.ending, one.files) for one in report.left_out] == [(".jpg", 1)]
    assert [path for path, _ in report.corrupt] == [f"{cat}/text.jpg", f"{cat}/zero.png"]
    assert "not an image" in report.corrupt[0][1] and "empty" in report.corrupt[1][1]
    assert [path for path, _ in report.truncated] == [f"{cat}/cut.jpg"]
    assert report.unreadable == [] and not report.ok
    assert report.wrong_extension == [(f"{cat}/rare.jpg", "JPEG2000"), (f"{cat}/really.jpg", "PNG")]
    assert report.slow == [f"{cat}/rare.jpg"]
    assert report.unusual_modes == [(f"{cat}/print.jpg", "CMYK")]
    assert report.modes == {"RGB": 10, "CMYK": 1}
    assert report.sizes == {(30, 20): 10, (50, 40): 1}
    assert report.rotated == [(f"{cat}/phone.jpg", 6)]
    assert report.duplicates == [[f"{cat}/1.jpg", f"{dog}/copy.jpg"]]
    assert report.empty_classes == ["empty"]
    assert report.hidden == [str(sick / ".ipynb_checkpoints")]
    assert report.in_two_classes == report.duplicates
    assert report.imbalance == 11 / 3 and report.small_classes == {"dog": 3}


def test_the_summary_names_what_is_wrong(sick: Path) -> None:
    text = repr(check(sick))
    assert text.splitlines()[0] == f"{sick}: 14 images, 3 cannot be loaded"
    for part in (
        "corrupt (2)",
        "truncated (1)",
        "duplicates (1)",
        "rotated by EXIF (1)",
        "hidden (1)",
        "30 x 20 to 50 x",
    ):
        assert part in text


def test_a_healthy_flat_folder(tmp_path: Path) -> None:
    for i in range(3):
        picture(8, 9, i).save(tmp_path / f"{i}.png")
    report = check(str(tmp_path))
    assert report.ok and report.files == 3 and report.classes == {}
    assert repr(report).startswith(f"{tmp_path}: 3 images, all can be loaded")
    # An image over the limit is not decoded, by Pillow neither.
    small = check(tmp_path, max_pixels=71)
    assert len(small.corrupt) == 3 and not small.slow and "over the limit of 71" in small.corrupt[0][1]


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check(tmp_path / "nowhere")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    picture(8, 9, 0).save(tmp_path / "a.png")
    os.chmod(tmp_path / "a.png", 0)
    assert [path for path, _ in check(tmp_path).unreadable] == [str(tmp_path / "a.png")]


def test_files_that_vanish_are_reported(tmp_path: Path) -> None:
    picture(8, 9, 0).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    report = check(tmp_path)
    assert [path for path, _ in report.unreadable] == [str(tmp_path / "b.png")]
