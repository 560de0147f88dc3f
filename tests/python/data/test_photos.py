"""What is a photo: one rule for all commands, and a count of what was not taken."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import picture
from PIL import Image, features
from torchvision.transforms.functional import to_tensor

import cnnrs
from cnnrs.data.photos import LeftOut, left_out, scan_photos
from cnnrs.image import plugins

HAS_AVIF = bool(features.check("avif"))


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """What people's folders hold."""
    root = tmp_path / "pets"
    for name in ("cat/1.jpg", "cat/2.JFIF", "cat/3.gif", "dog/1.png", "dog/.thumb/1.jpg"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(8, 9, len(name)).save(path, format={"JFIF": "JPEG"}.get(path.suffix[1:]))
    for name in (
        "cat/._1.jpg", "dog/._1.png", "cat/Thumbs.db", ".DS_Store", "cat/IMG_1.HEIC", "cat/IMG_2.heic", "dog/a.mov",
        "dog/a.CR2", "dog/notes.txt", "dog/README", "dog/a.zip", "dog/a.psd", "beside.jpg",
    ):  # fmt: skip
        (root / name).write_bytes(b"x")
    return root


@pytest.fixture(autouse=True)
def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "find_spec", lambda name: None)


def test_what_is_left_out_is_counted_by_ending(messy: Path) -> None:
    photos, counts = scan_photos([str(messy / "cat"), str(messy / "dog")])
    assert counts == [3, 1] and [Path(path).name for path in photos] == ["1.jpg", "2.JFIF", "3.gif", "1.png"]
    found = {(one.ending, one.files): one.reason for one in left_out(messy, photos)}
    assert set(found) == {
        ("._*", 2), (".heic", 2), ("thumbs.db", 1), (".ds_store", 1), (".mov", 1), (".cr2", 1), (".txt", 1), ("", 1),
        (".zip", 1), (".psd", 1), (".jpg", 1),
    }  # fmt: skip
    assert "AppleDouble" in found["._*", 2]
    assert found[".heic", 2] == "HEIC, which Pillow cannot read here: pip install pillow-heif"
    reasons = {one.reason for one in left_out(messy, photos) if one.ending == ".jpg"}
    assert reasons == {
        "in none of the class folders", "hidden: its name, or that of a folder above it, begins with a dot",
    }  # fmt: skip
    # Every file is a photo or left out.
    files = [path for path in messy.rglob("*") if path.is_file()]
    assert len(files) == len(photos) + sum(one.files for one in left_out(messy, photos))
    assert left_out(messy, photos)[0].files == 2


def test_without_what_is_taken_every_visible_photo_is(messy: Path) -> None:
    every = {Path(path).name for path in scan_photos([str(messy)])[0]}
    assert every == {"1.jpg", "2.JFIF", "3.gif", "1.png", "beside.jpg"}
    assert not {one.example for one in left_out(messy)} & set(scan_photos([str(messy)])[0])


def test_paths_may_be_spelled_otherwise(messy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(messy.parent)
    taken = [path for path, _ in cnnrs.ImageFolder("./pets/", skip_hidden=True, classes=["cat", "dog"]).samples]
    assert ".png" not in {one.ending for one in left_out("pets/", taken)}


def test_a_line_says_it_all() -> None:
    one = LeftOut(".heic", 1200, "pets/a.heic", "HEIC, which Pillow cannot read here: pip install pillow-heif")
    assert str(one) == "1,200 .heic: HEIC, which Pillow cannot read here: pip install pillow-heif (pets/a.heic)"


def test_image_folder_keeps_torchvisions_list(messy: Path) -> None:
    names = [Path(path).name for path, _ in cnnrs.ImageFolder(messy).samples]
    assert names == ["._1.jpg", "1.jpg", "._1.png", "1.png", "1.jpg"]
    folder = cnnrs.ImageFolder(messy, skip_hidden=True, extensions=cnnrs.photo_extensions())
    assert [Path(path).name for path, _ in folder.samples] == ["1.jpg", "2.JFIF", "3.gif", "1.png"]
    assert folder.extensions == cnnrs.photo_extensions()
    flat = cnnrs.ImageFolder.flat(messy, extensions=[".JFIF"])
    assert [Path(path).name for path, _ in flat.samples] == ["2.JFIF"]
    with pytest.raises(FileNotFoundError, match=r"Supported extensions: \.webp"):
        cnnrs.ImageFolder.flat(messy, extensions=".webp")
    with pytest.raises(ValueError, match="not both"):
        cnnrs.ImageFolder(messy, extensions=[".jpg"], is_valid_file=lambda path: True)


@pytest.mark.skipif(not HAS_AVIF, reason="this Pillow has no AVIF")
def test_avif_is_read_where_pillow_has_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    picture(20, 30, 0).save(tmp_path / "a" / "1.avif")
    folder = cnnrs.ImageFolder(tmp_path, to_tensor, extensions=cnnrs.photo_extensions())
    ((image, _),) = folder
    ((batch, _),) = cnnrs.DataLoader(folder)
    with Image.open(tmp_path / "a" / "1.avif") as pillows:
        assert torch.equal(batch[0], image) and torch.equal(image, to_tensor(pillows.convert("RGB")))
    assert cnnrs.check(tmp_path).slow == [str(tmp_path / "a" / "1.avif")]


def test_without_avif_its_line_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "modules", {})
    (tmp_path / "1.avif").write_bytes(b"\0\0\0\x20ftypavif")
    (one,) = left_out(tmp_path)
    assert one.reason.endswith('pip install --upgrade "pillow>=11.3"')


def test_heic_says_what_to_install(tmp_path: Path) -> None:
    """By its contents: phones' photos are renamed more often than converted."""
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "1.jpg"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(cnnrs.DecodeError, match=r"1\.jpg .*it is HEIC, .*: pip install pillow-heif$"):
        list(cnnrs.DataLoader(cnnrs.ImageFolder(tmp_path)))
    ((_, reason),) = cnnrs.check(tmp_path).corrupt
    assert reason == f"{path} is HEIC, which Pillow cannot read here: pip install pillow-heif"


def test_pillow_heif_is_asked_once_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, whose files it takes for ours."""
    asked: list[str] = []
    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = lambda: asked.append("registered")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(plugins, "find_spec", lambda name: module)
    plugins._register.cache_clear()
    assert {".heic", ".heif", ".hif"} <= set(cnnrs.photo_extensions())
    (tmp_path / "a").mkdir()
    # What the stand-in would have made readable.
    picture(20, 30, 0).save(tmp_path / "a" / "1.heic", format="PNG")
    folder = cnnrs.ImageFolder(tmp_path, extensions=cnnrs.photo_extensions())
    assert not asked
    assert folder[0][0].size == folder[0][0].size == (30, 20)
    assert asked == ["registered"] and not left_out(tmp_path)
    plugins._register.cache_clear()
