"""Rows and images: one each, the right ones, and what becomes of those that are left out."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import cnnrs
from cnnrs.features.plan import Plan
from cnnrs.features.samples import Data
from stores import TRANSFORM, Counting, computed, fresh, run, said


def test_one_heic_does_not_make_other_images_of_all() -> None:
    def recipe(*paths: str, **options: Any) -> str:
        return Data(cnnrs.DataLoader(cnnrs.ImageList(paths, TRANSFORM, **options))).recipe

    assert recipe("a.jpg") == recipe("a.jpg", "b.heic") != recipe("a.jpg", "b.heic", scale="full")


# -- one row per image -------------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """Two images become one row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x) // 2, -1)


class Uneven(nn.Module):
    """The right number in all, not per batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        calls = sys.modules[__name__].CALLS
        calls.append(1)
        return torch.cat([x, x[:1]]) if len(calls) % 2 else x[:-1]


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:0]


CALLS: list[int] = []


@pytest.mark.parametrize("model", [Halves, Uneven, Nothing])
@pytest.mark.parametrize("engine", ["python", "auto"])
@pytest.mark.parametrize("passes", [1, 2])
def test_another_number_of_rows_is_an_error_everywhere(
    tmp_path: Path, model: type[nn.Module], engine: Any, passes: int
) -> None:
    CALLS.clear()
    pictures = TensorDataset(torch.rand(24, 3, 4, 4), torch.arange(24))
    loader = cnnrs.DataLoader(pictures, batch_size=4)
    pairs = list(loader)
    good = cnnrs.preconv(pairs, nn.Identity(), out=tmp_path / "pairs", verbose=False)
    sources: list[tuple[Any, Path | None]] = [(loader, None), (loader, tmp_path / "loader")]
    if passes == 1:
        sources += [(pairs, None), (pairs, tmp_path / "pairs")]
    for data, out in sources:
        CALLS.clear()
        with pytest.raises(ValueError, match=r"the model made \d rows of 4 images"):
            cnnrs.preconv(data, model(), out=out, engine=engine, passes=passes, overwrite=True, verbose=False)
    # What was there is there.
    assert torch.equal(cnnrs.load_features(tmp_path / "pairs").features, good.features)
    assert not (tmp_path / "loader" / "meta.json").exists()


# -- which file it was -------------------------------------------------------------------------------------------------


def test_photos_that_are_swapped_or_replaced_are_computed_again(images: Path, tmp_path: Path) -> None:
    """Size and time may be the same: they are copied, set, or of a camera's clock."""
    out, (one, two, three) = tmp_path / "f", (images / "ant" / f"{name}.bmp" for name in "abc")
    for number, path in enumerate((one, two, three)):
        Image.new("RGB", (30, 30), (50 * number, 200, 9)).save(path)
        os.utime(path, ns=(10**18, 10**18))
    run(images, out)
    assert computed() == 29
    kept = tmp_path / "kept"
    one.rename(kept), two.rename(one), kept.rename(two)
    found = run(images, out)
    assert computed() == 0
    assert torch.equal(found.features, fresh(images).features)
    with open(three, "r+b") as file:
        file.seek(60)
        file.write(bytes(range(200)))
    os.utime(three, ns=(10**18, 10**18))
    found = run(images, out)
    assert computed() == 1
    assert torch.allclose(found.features, fresh(images).features, rtol=0, atol=1e-5)


def test_a_copy_of_the_photos_is_read_not_computed(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    first = run(images, out)
    computed()
    shutil.copytree(images, tmp_path / "copy")
    shutil.rmtree(images)
    (tmp_path / "copy").rename(images)
    for _ in range(2):
        assert torch.equal(run(images, out).features, first.features) and computed() == 0


def test_a_store_of_the_version_before_is_opened(images: Path, tmp_path: Path) -> None:
    """It knows size and time of the photos only: they are read once, and nothing is computed."""
    out = tmp_path / "f"
    first = run(images, out)
    computed()
    rewrite(out, lambda meta: meta.update(stats=[stat[:2] for stat in meta["stats"]]))
    for _ in range(2):
        assert torch.equal(run(images, out).features, first.features) and computed() == 0
    assert all(len(stat) == 4 for stat in json.loads((out / "meta.json").read_text())["stats"])


def rewrite(out: Path, change: Any) -> None:
    meta = json.loads((out / "meta.json").read_text())
    change(meta)
    meta["checksum"] = zlib.crc32(json.dumps({name: one for name, one in meta.items() if name != "checksum"}).encode())
    (out / "meta.json").write_text(json.dumps(meta, separators=(",", ":")))


# -- what is left out --------------------------------------------------------------------------------------------------


def skipping(images: Path, out: Path) -> tuple[cnnrs.Features, list[tuple[str, str]]]:
    loader = cnnrs.DataLoader(cnnrs.ImageFolder(images, TRANSFORM), batch_size=4, on_error="skip")
    return cnnrs.preconv(loader, Counting(), out=out, engine="python"), loader.errors


@pytest.mark.filterwarnings("ignore:cnnrs.DataLoader skips files")
def test_one_bad_photo_more_leaves_the_rest(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, bad = tmp_path / "f", [images / "ant" / "new.jpg", images / "cat" / "new.jpg"]
    first, errors = skipping(images, out)
    assert computed() == 26 and not errors
    for count, path in enumerate(bad, 1):
        path.write_bytes(b"no image")
        for attempt in range(2):
            said(capsys)
            found, errors = skipping(images, out)
            assert torch.equal(found.features, first.features) and found.paths == first.paths
            assert {name for name, _ in errors} == {str(one) for one in bad[:count]}, attempt
            assert computed() == 0
            left = "1 photo is left out: " if count == 1 else "2 photos are left out (the first): "
            assert f"{out}: {left}{bad[0]}" in said(capsys).replace("cannot decode ", "")
        assert len(json.loads((out / "meta.json").read_text())["skipped"]) == count
    Image.new("RGB", (30, 30), (9, 99, 199)).save(bad[0])
    found, errors = skipping(images, out)
    assert len(found) == 27 and computed() == 1 and [name for name, _ in errors] == [str(bad[1])]


@pytest.mark.filterwarnings("ignore:cnnrs.DataLoader skips files")
def test_the_same_loader_tries_a_mended_photo_again(images: Path, tmp_path: Path) -> None:
    bad = images / "ant" / "new.jpg"
    bad.write_bytes(b"no image")
    loader = cnnrs.DataLoader(cnnrs.ImageFolder(images, TRANSFORM), batch_size=4, on_error="skip")
    for count in (26, 27):
        assert len(cnnrs.preconv(loader, Counting(), out=tmp_path / "f", engine="python")) == count
        Image.new("RGB", (30, 30), (9, 99, 199)).save(bad)
    assert not loader.errors


@pytest.mark.filterwarnings("ignore:cnnrs.DataLoader skips files")
def test_a_photo_that_could_not_be_read_once_is_tried_again(images: Path, tmp_path: Path) -> None:
    """The disk or the rights were to blame, not the file, which need not change for it to be read another time."""
    out, victim = tmp_path / "f", images / "bee" / "1.jpg"
    target = tmp_path / "target.jpg"
    shutil.move(victim, target)
    victim.symlink_to(target)
    state = os.stat(target)
    away = target.rename(tmp_path / "away.jpg")
    for _ in range(2):
        found, errors = skipping(images, out)
        assert len(found) == 25 and [name for name, _ in errors] == [str(victim)]
    away.rename(target)
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))
    found, errors = skipping(images, out)
    assert len(found) == 26 and not errors
    assert json.loads((out / "meta.json").read_text())["skipped"] == []


def test_all_photos_bad_is_still_an_error(images: Path, tmp_path: Path) -> None:
    for path in images.rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(cnnrs.DecodeError, match="all 26 files failed"), pytest.warns(UserWarning, match="skips files"):
        skipping(images, tmp_path / "f")


@pytest.mark.parametrize("raised", ["max_pixels", "max_bytes", "Pillow"])
def test_what_was_over_a_limit_is_tried_again_under_another(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: str
) -> None:
    (images / "big").mkdir()
    Image.new("RGB", (900, 900), (9, 9, 9)).save(images / "big" / "0.bmp")
    low: dict[str, Any] = {} if raised == "Pillow" else {raised: 600_000}

    def stored(**options: Any) -> int:
        loader = cnnrs.DataLoader(cnnrs.ImageFolder(images, TRANSFORM), batch_size=4, on_error="skip", **options)
        return len(cnnrs.preconv(loader, Counting(), out=tmp_path / "f", engine="python"))

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="skips files that fail"):
        if raised == "Pillow":
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 300_000)
        assert stored(**low) == 26
        computed()
        # The same limit: not even tried.
        assert stored(**low) == 26 and computed() == 0
    assert stored() == 27 and computed() == 1


def test_a_pipe_among_the_photos_is_left_out(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "f")
    os.mkfifo(images / "cat" / "pipe.png")
    loader = cnnrs.DataLoader(cnnrs.ImageFolder(images, TRANSFORM), batch_size=4, on_error="skip")
    data = Data(loader)
    with pytest.raises(OSError, match="not a regular file"):
        data.identity((data.files or []).index(str(images / "cat" / "pipe.png")))
    assert len(cnnrs.preconv(loader, Counting(), out=tmp_path / "f", engine="python")) == 26


def test_images_in_memory_are_told_apart_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(Data(cnnrs.DataLoader(TensorDataset(torch.rand(4, 3), torch.arange(4)))), {}, 1, 0, 2)
    monkeypatch.setattr("cnnrs.features.plan.ThreadPoolExecutor", None)
    assert len(set(plan.identities())) == 4
