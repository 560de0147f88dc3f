"""What a glance at a data set says, and what `check` says of the same folders."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import picture

import cnnrs
from cnnrs.data.copies import copies
from cnnrs.data.glance import glance
from cnnrs.data.headers import open_header, tiff_kind
from cnnrs.image.reading import Reader
from deep_images import SHAPE, big_endian_tiff, color_png, deep, pages, write
from image_files import picture as image_picture
from image_files import tiff_files


def look(root: Path, **options: object) -> list[str]:
    folder = cnnrs.ImageFolder(root, extensions=cnnrs.photo_extensions())
    lines = glance(folder.samples, folder.classes, **options)  # type: ignore[arg-type]
    # Classes are small in these tests.
    return [line for line in lines if "fewer than 5" not in line]


def photos(root: Path, **counts: int) -> Path:
    for seed, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(9, 10, 1000 * seed + i).save(root / name / f"{i}.jpg")
    return root


def test_of_good_photos_nothing_is_said(tmp_path: Path) -> None:
    folder = cnnrs.ImageFolder(photos(tmp_path, cat=6, dog=6))
    assert glance(folder.samples, folder.classes) == []


def test_small_and_unequal_classes(tmp_path: Path) -> None:
    folder = cnnrs.ImageFolder(photos(tmp_path, cat=40, dog=4, emu=1))
    assert glance(folder.samples, folder.classes) == [
        "2 classes have fewer than 5 photos (dog 4, emu 1): too few to learn from and to measure with",
        "classes are unequal: cat has 40 photos, emu 1; look at the accuracy of each class, not only at that of all "
        "photos",
    ]
    report = cnnrs.check(tmp_path)
    assert report.small_classes == {"dog": 4, "emu": 1} and report.imbalance == 40
    assert "classes of fewer than 5 (2): dog has 4; emu has 1" in repr(report)


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_16_bits(name: str, tmp_path: Path) -> None:
    path = write(photos(tmp_path, cat=3) / "cat" / name, deep("u2"))
    line = (
        f"1 photo has more than 8 bits (16-bit gray), and 1 would be white above 255 ({path}: 16-bit gray, 100 to 4,09"
    )
    (found,) = look(tmp_path)
    assert found.startswith(line) and found.endswith('; --scale percentile (scale="percentile") keeps their values')
    assert look(tmp_path, scale="percentile") == []
    # A camera's 12 bits are a sixteenth of the type's 16.
    assert "nearly black" in look(tmp_path, scale="full")[0]
    ((one, kind, low, high),) = cnnrs.check(tmp_path).deep
    assert (one, kind, low) == (str(path), "16-bit gray", 100) and 4000 < high < 4096
    assert f"lost without --scale percentile (1): {path} is 16-bit gray, 100 to 4,09" in repr(cnnrs.check(tmp_path))


def test_floats_and_dark_colours(tmp_path: Path) -> None:
    root = photos(tmp_path, cat=3)
    write(root / "cat" / "f.tif", deep("f4"))
    color_png(root / "cat" / "c.png", np.random.default_rng(0).integers(0, 4096, (*SHAPE, 3)))
    lines = look(root)
    assert len(lines) == 2
    assert "1 photo has more than 8 bits (16-bit colour), and 1 would be nearly black" in lines[0]
    assert "1 photo has more than 8 bits (float), and 1 would be black, for fractions are cut off" in lines[1]
    assert {(kind, low >= 0) for _, kind, low, _ in cnnrs.check(root).deep} == {
        ("float", True),
        ("16-bit colour", True),
    }


def test_16_bits_in_the_range_of_8_are_no_news(tmp_path: Path) -> None:
    write(photos(tmp_path, cat=3) / "cat" / "a.png", deep("u2", high=255))
    write(tmp_path / "cat" / "b.tif", deep("f4") * 250)
    assert look(tmp_path) == [] and cnnrs.check(tmp_path).deep == []


def test_only_some_of_many_deep_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for i in range(100):
        write(tmp_path / "cat" / f"{i:02}.png", deep("u2", i))
    (line,) = look(tmp_path)
    assert line.startswith("100 photos have more than 8 bits (16-bit gray), and 25 of the 25 that were looked at would")


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.webp", "a.png"])
def test_pages(name: str, tmp_path: Path) -> None:
    path = pages(photos(tmp_path, cat=3) / "cat" / name, [picture(9, 10, i) for i in range(3)])
    assert look(tmp_path) == [
        f"1 photo has several pages ({path} has 3): the first is taken; --page 1 (page=1) takes the next"
    ]
    assert look(tmp_path, page=2) == []
    assert look(tmp_path, page=3) == [
        f"1 photo has several pages, but no page 3, and cannot be read ({path} has 0 to 2)"
    ]
    report = cnnrs.check(tmp_path)
    assert report.pages == [(str(path), 3)] and f"several pages (1): {path} has 3, the first is taken" in repr(report)


def test_channels(tmp_path: Path) -> None:
    root = photos(tmp_path / "some", cat=3)
    clear = picture(9, 10, 1).convert("RGBA")
    clear.putalpha(100)
    clear.convert("LA").save(root / "cat" / "b.png")
    for name, options in (("a.png", {}), ("d.webp", {}), ("f.webp", {"lossless": True}), ("g.tif", {})):
        clear.save(root / "cat" / name, **options)
    picture(9, 10, 1).convert("CMYK").save(root / "cat" / "c.tif")
    picture(9, 10, 1).convert("CMYK").save(root / "cat" / "e.jpg")
    assert look(root) == [
        f"5 photos have an alpha channel, which is dropped: what it makes transparent is seen ({root}/cat/a.png)",
        f"1 photo is in CMYK, which becomes RGB without a colour profile ({root}/cat/c.tif)",
    ]
    # A screenshot's alpha hides nothing.
    picture(9, 10, 1).convert("RGBA").save(photos(tmp_path / "other", cat=3) / "cat" / "a.png")
    assert look(tmp_path / "other") == []
    # Where a JPEG says so lies behind its thumbnail: that is check's.
    assert (f"{root}/cat/e.jpg", "CMYK") in cnnrs.check(root).unusual_modes


def test_the_same_photo_in_two_classes(tmp_path: Path) -> None:
    root = photos(tmp_path, cat=5, dog=5)
    shutil.copy(root / "cat" / "1.jpg", root / "cat" / "copy.jpg")
    shutil.copy(root / "cat" / "1.jpg", root / "dog" / "9.jpg")
    shutil.copy(root / "dog" / "2.jpg", root / "dog" / "twin.jpg")
    assert look(root) == [
        f"1 photo is in two classes ({root}/cat/1.jpg = {root}/dog/9.jpg): one of the labels is wrong",
        f"1 photo is a copy of others, byte for byte ({root}/dog/2.jpg = {root}/dog/twin.jpg)",
    ]
    report = cnnrs.check(root)
    assert report.in_two_classes == [[f"{root}/cat/{name}.jpg" for name in ("1", "copy")] + [f"{root}/dog/9.jpg"]]
    assert len(report.duplicates) == 2 and "the same photo in two classes (1)" in repr(report)


def test_files_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    root = photos(tmp_path, cat=3)
    (root / "cat" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "cat" / "cut.tif").write_bytes(b"II*\0")
    (root / "cat" / "empty.jpg").touch()
    (root / "cat" / "gone.jpg").symlink_to(root / "nowhere")
    os.mkfifo(root / "cat" / "pipe.jpg")
    write(root / "cat" / "half.png", deep("u2"))
    whole = (root / "cat" / "half.png").read_bytes()
    (root / "cat" / "half.png").write_bytes(whole[: len(whole) // 2])
    assert look(root) == []


def test_copies_are_equal_to_the_last_byte(tmp_path: Path) -> None:
    """Sizes, beginnings and ends may be equal by chance: uncompressed images of one camera."""
    rng = np.random.default_rng(0)
    data = [rng.integers(0, 256, 20000, dtype=np.uint8) for _ in range(4)]
    for one in data:
        one[:5000] = one[-5000:] = 7
    names = [str(tmp_path / name) for name in "abcdefg"]
    for name, which in zip(names, (0, 1, 0, 2, 1, 3, 0), strict=True):
        Path(name).write_bytes(data[which].tobytes())
    assert copies(names) == [[names[0], names[2], names[6]], [names[1], names[4]]]
    assert copies([names[0], names[0]]) == []


def test_thousands_take_seconds(tmp_path: Path) -> None:
    """25,000 take seconds on two cores (docs/cli.md): a twentieth of them here, with room for a busy machine."""
    photo = picture(64, 64, 0)
    (tmp_path / "cat").mkdir()
    photo.save(tmp_path / "0.jpg")
    data = (tmp_path / "0.jpg").read_bytes()
    for i in range(1250):
        (tmp_path / "cat" / f"{i}.jpg").write_bytes(data + i.to_bytes(8, "little"))
    samples = [(str(path), 0) for path in sorted((tmp_path / "cat").iterdir())]
    before = time.perf_counter()
    assert glance(samples, ["cat"]) == []
    assert time.perf_counter() - before < 10


def test_hidden_files_are_no_samples_of_check(tmp_path: Path) -> None:
    root = photos(tmp_path, cat=3)
    (root / "cat" / "._0.jpg").write_bytes(b"\0\5\x16\7")
    (root / "__MACOSX" / "cat").mkdir(parents=True)
    (root / "__MACOSX" / "cat" / "._0.jpg").write_bytes(b"\0\5\x16\7")
    report = cnnrs.check(root)
    assert report.ok and report.files == 3 and report.classes == {"cat": 3}
    (one,) = report.left_out
    assert (one.ending, one.files) == ("._*", 2)
    assert "left out (1): 2 ._*: a Mac's notes" in repr(report)


def test_more_channels_than_colours(tmp_path: Path) -> None:
    root = photos(tmp_path, cat=3)
    values = np.random.default_rng(0).integers(0, 256, (*SHAPE, 5), dtype=np.uint8)
    path = big_endian_tiff(root / "cat" / "a.tif", values)
    assert look(root) == [f"1 photo is read as RGB, the first three of 5 channels ({path})"]
    assert cnnrs.check(root).unusual_modes == [(str(path), "RGB, the first three of 5 channels")]
    assert (np.asarray(Reader()(path)) == values[..., :3]).all()
    # Of so many Pillow makes nothing, and the reason says so.
    many = big_endian_tiff(root / "cat" / "b.tif", np.zeros((*SHAPE, 7), np.uint8))
    ((bad, reason),) = cnnrs.check(root).corrupt
    assert bad == str(many) and "7 samples of 8 bits" in reason


def test_tiffs_that_are_of_a_kind_are_opened_alike(tmp_path: Path) -> None:
    """A glance asks Pillow about one of each kind."""
    rng = np.random.default_rng(0)
    kinds: dict[object, set[object]] = {}
    for size in ((17, 13), (33, 9)):
        for i, (_, data) in enumerate(tiff_files(image_picture(*size, rng), rng)):
            path = tmp_path / f"{i}.tif"
            path.write_bytes(data)
            with path.open("rb") as file:
                kind = tiff_kind(file)
            assert kind is not None
            header = open_header(str(path))
            kinds.setdefault(kind, set()).add((header.mode, header.channels, header.pages, header.depth))
    assert len(kinds) >= 10 and all(len(found) == 1 for found in kinds.values())
    two_pages = pages(tmp_path / "p.tif", [picture(9, 10, i) for i in range(2)])
    for other in (two_pages, write(tmp_path / "a.png", deep("u2"))):
        with other.open("rb") as file:
            assert tiff_kind(file) is None
