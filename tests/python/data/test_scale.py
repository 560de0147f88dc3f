"""scale and page in data sets, loaders, caches and stores: the same pixels on every road, and other keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data
import torchvision
from conftest import picture
from PIL import Image
from torchvision import transforms

import cnnrs
from cnnrs.data.read_options import ReadOptions
from deep_images import SHAPE, big_endian_tiff, color_png, deep, pages, write

TO_TENSOR = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16), transforms.ToTensor()])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of depths and pages between ordinary photos."""
    root = tmp_path_factory.mktemp("mixed")
    write(root / "a" / "1.tif", deep("u2"))
    write(root / "a" / "2.png", deep("u2", 1))
    write(root / "a" / "3.tif", deep("f4"))
    big_endian_tiff(root / "a" / "4.tif", deep("u2", 2))
    color_png(root / "a" / "5.png", np.random.default_rng(0).integers(0, 4096, (*SHAPE, 3)))
    write(root / "a" / "6.tif", deep("i4"))
    (root / "b").mkdir()
    picture(*SHAPE, 0).save(root / "b" / "1.jpg")
    picture(*SHAPE, 1).convert("RGBA").save(root / "b" / "2.png")
    picture(*SHAPE, 2).save(root / "b" / "3.tif")
    for name in ("4.tif", "5.webp", "6.png"):
        pages(root / "b" / name, [picture(*SHAPE, seed) for seed in (3, 4)])
    pages(root / "b" / "7.tif", [Image.fromarray(deep("u2", seed)) for seed in (5, 6)])
    return root


def images(loader: Any) -> torch.Tensor:
    return torch.cat([batch for batch, _ in loader])


OPTIONS: list[dict[str, Any]] = [
    {}, {"scale": "full"}, {"scale": "percentile"}, {"page": 1}, {"scale": "percentile", "page": 1},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("num_workers", [0, 3])
def test_every_road_has_the_same_pixels(mixed: Path, options: dict[str, Any], num_workers: int) -> None:
    dataset = cnnrs.ImageFolder(mixed, TO_TENSOR, **options)
    expected = torch.stack([dataset[i][0] for i in range(len(dataset))])
    plain = torchvision.datasets.ImageFolder(str(mixed), TO_TENSOR)
    if not options:
        assert torch.equal(expected, torch.stack([image for image, _ in plain]))
    for loader in (
        cnnrs.DataLoader(dataset, 5, num_workers=num_workers),
        cnnrs.DataLoader(torch.utils.data.Subset(dataset, range(len(dataset))), 5, num_workers=num_workers),
        cnnrs.DataLoader(plain, 5, num_workers=num_workers, **options),
        torch.utils.data.DataLoader(dataset, 5),
        cnnrs.DataLoader(cnnrs.ImageList([path for path, _ in dataset.samples], TO_TENSOR, **options), 5),
    ):
        assert torch.equal(images(loader), expected)


def test_a_16_bit_tiff_is_white_unless_something_is_said(tmp_path: Path) -> None:
    values = deep("u2", high=4095).clip(300)
    write(tmp_path / "a" / "1.tif", values)
    found = {
        scale: images(cnnrs.DataLoader(cnnrs.ImageFolder(tmp_path, transforms.ToTensor(), scale=scale)))
        for scale in ("none", "percentile")
    }
    assert (found["none"] == 1).all()
    assert found["percentile"].std() > 0.2


def test_what_the_loader_says_counts(mixed: Path) -> None:
    stretched = cnnrs.ImageFolder(mixed, TO_TENSOR, scale="percentile", page=1)
    plain = cnnrs.ImageFolder(mixed, TO_TENSOR)
    assert torch.equal(images(cnnrs.DataLoader(stretched, 4, scale="none", page=0)), images(cnnrs.DataLoader(plain, 4)))


def test_a_page_that_is_not_there_is_named(mixed: Path) -> None:
    loader = cnnrs.DataLoader(cnnrs.ImageFolder(mixed, TO_TENSOR, page=2), 32)
    with pytest.raises(cnnrs.DecodeError, match=r"4\.tif has 2 pages, 0 to 1: there is no page 2"):
        list(loader)
    loader = cnnrs.DataLoader(cnnrs.ImageFolder(mixed, TO_TENSOR, page=2), 32, on_error="skip")
    with pytest.warns(UserWarning, match="there is no page 2"):
        assert len(images(loader)) == 9
    assert [Path(path).name for path, _ in loader.errors] == ["4.tif", "5.webp", "6.png", "7.tif"]


def test_damaged_files_are_named_with_the_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "1.tif", deep("u2"))
    path.write_bytes(path.read_bytes()[:1000])
    loader = cnnrs.DataLoader(cnnrs.ImageFolder(tmp_path, TO_TENSOR, scale="full"))
    with pytest.raises(cnnrs.DecodeError, match=r"1\.tif cannot be decoded: ") as raised:
        list(loader)
    assert "scale" not in str(raised.value)


def test_exif_turns_what_python_reads(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = deep("u2")
    write(tmp_path / "a" / "1.png", values, exif=exif)
    dataset = cnnrs.ImageFolder(tmp_path, transforms.ToTensor(), scale="percentile")
    (lying,), (upright,) = (images(cnnrs.DataLoader(dataset, exif=exif)) for exif in (False, True))
    assert torch.equal(upright, lying.rot90(-1, (1, 2)))


def test_wrong_values_are_refused_at_once(mixed: Path) -> None:
    for wrong in ({"scale": "linear"}, {"page": -1}):
        with pytest.raises(ValueError, match="must be"):
            cnnrs.ImageFolder(mixed, **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must be"):
            cnnrs.DataLoader(cnnrs.ImageFolder(mixed), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        cnnrs.ImageFolder(mixed, loader=Image.open, page=1)


def test_a_data_set_that_reads_by_itself_refuses(mixed: Path) -> None:
    dataset = cnnrs.ImageFolder(mixed, TO_TENSOR, loader=lambda path: Image.open(path).convert("RGB"))
    with pytest.raises(ValueError, match="scale is for data sets whose files this loader reads itself"):
        list(cnnrs.DataLoader(dataset, scale="full"))


# -- keys --------------------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_in_the_key() -> None:
    assert ReadOptions().shaping == {"truncated": "error", "exif": False, "decode": "exact"}
    assert ReadOptions(scale="full", page=2).shaping == {**ReadOptions().shaping, "scale": "full", "page": 2}
    for options in (ReadOptions(exif=True), ReadOptions(scale="percentile"), ReadOptions(page=3)):
        assert ReadOptions(**options.shaping) == options


@pytest.mark.parametrize("place", ["ram", "folder"])
def test_a_cache_keeps_them_apart(mixed: Path, place: str, tmp_path: Path) -> None:
    cache = place if place == "ram" else tmp_path
    found = {}
    for options in OPTIONS:
        loader = cnnrs.DataLoader(cnnrs.ImageFolder(mixed, TO_TENSOR, **options), 4, cache=cache)
        first = images(loader)
        assert torch.equal(images(loader), first) and loader.cached["images"] == 13
        found[str(options)] = first
    assert len({images.numpy().tobytes() for images in found.values()}) == len(OPTIONS)
    assert place == "ram" or len(list(tmp_path.iterdir())) == len(OPTIONS)


@pytest.mark.parametrize("by", ["data set", "loader"])
def test_features_are_computed_again(mixed: Path, by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = torch.nn.AvgPool2d(8)

    def rows(**options: Any) -> tuple[torch.Tensor, bool]:
        ours, its = (options, {}) if by == "data set" else ({}, options)
        loader = cnnrs.DataLoader(cnnrs.ImageFolder(mixed, TO_TENSOR, **ours), 4, **its)
        features = cnnrs.preconv(loader, body, tmp_path / "f").features.clone()
        return features, "up to date" in capsys.readouterr().out

    before = None
    for options in OPTIONS:
        features, known = rows(**options)
        assert not known and (before is None or not torch.equal(features, before))
        again, known = rows(**options)
        assert known and torch.equal(again, features)
        before = features
