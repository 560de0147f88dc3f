"""The folder that `preconv(out=...)` writes: types, what is kept when images change, passes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import transforms

import cnnrs
from cnnrs.features.plan import Plan
from cnnrs.features.samples import Data
from stores import ROUNDING, SEEN, TRANSFORM, Counting, computed, fresh, run, said

# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("engine", ["torch", "python"])
def test_types(images: Path, tmp_path: Path, name: str, engine: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    kind = getattr(torch, name)
    expected = fresh(images, model=model, engine=engine)
    for out in (None, tmp_path / "f"):
        for given in (name, kind):
            found = run(images, out, model, dtype=given, engine=engine)  # type: ignore[arg-type]
            assert found.features.dtype == kind and torch.equal(found.features, expected.features.to(kind))
    opened = np.load(tmp_path / "f" / "features.npy", mmap_mode="r")
    assert opened.shape == (26, 6, 22, 22)
    if name == "bfloat16":
        # NumPy has no such type: the upper halves of float32.
        opened = (opened.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(opened, expected.features.bfloat16().float().numpy())
    else:
        assert np.array_equal(opened, expected.features.to(kind).numpy())
    assert torch.equal(cnnrs.load_features(tmp_path / "f").features, expected.features.to(kind))


@pytest.mark.parametrize("engine", ["torch", "python"])
def test_a_value_that_float16_cannot_hold_is_an_error(images: Path, tmp_path: Path, engine: Any) -> None:
    model = nn.Conv2d(3, 6, 3)
    with torch.no_grad():
        model.weight.fill_(1e5)
    with pytest.raises(ValueError, match=r"larger than float16 can hold \(65504\): use dtype=\"bfloat16\""):
        run(images, tmp_path / "f", model, dtype="float16", engine=engine)
    assert torch.isfinite(run(images, tmp_path / "f", model, dtype="bfloat16", engine=engine).features).all()
    with pytest.raises(ValueError, match=r"dtype must be one of 'float16', .* got 'int8'"):
        run(images, tmp_path / "f", model, dtype="int8")


def test_another_type_is_another_store(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images, tmp_path / "f")
    said(capsys)
    run(images, tmp_path / "f", dtype="float16")
    assert said(capsys).endswith("recomputing the features, because another dtype is asked for")


# -- images that change ------------------------------------------------------------------------------------------------


def test_only_what_changed_is_computed(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "f"
    run(images, out)
    assert computed() == 26 and said(capsys) == ""

    def again(count: int, message: str) -> cnnrs.Features:
        found = run(images, out)
        assert computed() == count
        assert said(capsys) == f"{out}: {message}"
        right = fresh(images)
        assert torch.allclose(found.features, right.features, rtol=0, atol=ROUNDING)
        assert torch.equal(found.labels, right.labels) and found.paths == right.paths and found.classes == right.classes
        assert found.folder == out
        assert torch.equal(cnnrs.load_features(out).features, found.features)
        assert sorted(path.name for path in out.iterdir()) == ["features.npy", "labels.npy", "meta.json"]
        return found

    same = "26 features are up to date, nothing to compute"
    again(0, same)
    victim = images / "bee" / "1.jpg"
    Image.open(victim).rotate(90).save(victim)
    again(1, "1 image is new or changed and 1 image is gone: computing 1 rows, 25 are there")
    again(0, same)
    for i in range(3):
        Image.open(victim).rotate(30 + i).save(images / "ant" / f"new{i}.png")
    again(3, "3 images are new or changed: computing 3 rows, 26 are there")
    (images / "cat" / "2.png").unlink()
    victim.unlink()
    again(0, "2 images are gone: computing 0 rows, 27 are there")
    # A class more in front of the others: all rows move, all labels change.
    (images / "aaa").mkdir()
    Image.new("RGB", (30, 30), (9, 99, 199)).save(images / "aaa" / "blue.png")
    found = again(1, "1 image is new or changed: computing 1 rows, 27 are there")
    assert found.classes == ["aaa", "ant", "bee", "cat"] and found.labels[0] == 0 and found.labels[1] == 1


def test_touched_renamed_and_moved_images_are_the_same(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f"
    first = run(images, out)
    inode = (out / "features.npy").stat().st_ino
    computed()
    for path in images.rglob("*.png"):
        os.utime(path)
    moved = tmp_path / "elsewhere"
    images.rename(moved)
    found = run(moved, out)
    assert computed() == 0 and torch.equal(found.features, first.features)
    assert found.paths == [str(moved / Path(path).relative_to(images)) for path in first.paths or []]
    assert (out / "features.npy").stat().st_ino == inode  # not even copied
    assert cnnrs.load_features(out).paths == found.paths
    # A new name sorts elsewhere: rows change places.
    (moved / "ant" / "6.png").rename(moved / "cat" / "zzz.png")
    found = run(moved, out)
    assert computed() == 0
    right = fresh(moved)
    assert torch.allclose(found.features, right.features, rtol=0, atol=ROUNDING)
    assert torch.equal(found.labels, right.labels) and found.paths == right.paths


def test_an_image_that_changes_while_it_is_read_is_read_again(images: Path, tmp_path: Path) -> None:
    victim, out = images / "ant" / "9.jpg", tmp_path / "f"

    class Vandal(Counting):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not sys.modules["stores"].SEEN:
                # After it was decoded or before: nobody can tell, so its features may not be kept.
                Image.new("RGB", (40, 40), (1, 2, 3)).save(victim)
            return super().forward(x)

    run(images, out, Vandal())
    SEEN.append(0)
    found = run(images, out, Vandal())
    assert computed() >= 1
    SEEN.append(0)
    assert torch.allclose(found.features, fresh(images, model=Vandal()).features, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("threads", [1, 2, 100])
def test_a_batch_is_hashed_by_several_threads(
    images: Path, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    identify = Plan.identify

    def watched(self: Plan, samples: list[int]) -> list[str]:
        asked.append(len(samples))
        return identify(self, samples)

    monkeypatch.setattr(Plan, "identify", watched)
    monkeypatch.setattr("cnnrs._cnnrs.available_threads", lambda: threads)
    data = cnnrs.ImageFolder(images, TRANSFORM)
    cnnrs.preconv(data, Counting(), out=tmp_path / "f", batch_size=40, verbose=False)
    assert sorted(asked) == ([26] if threads == 1 else [10, 16])
    meta = json.loads((tmp_path / "f" / "meta.json").read_text())
    assert meta["ids"] == [Data(DataLoader(data)).identity(i) for i in range(26)]


@pytest.mark.parametrize("make", [DataLoader, cnnrs.DataLoader])
def test_loaders_subsets_and_tensors_are_recognised(images: Path, tmp_path: Path, make: Any) -> None:
    data = cnnrs.ImageFolder(images, TRANSFORM)
    model = Counting()
    whole = cnnrs.preconv(data, model, batch_size=4, engine="python")
    part = Subset(data, [20, 3, 11, 7, 0])
    computed()
    for count in (5, 0):
        found = cnnrs.preconv(make(part, batch_size=2, shuffle=True), model, out=tmp_path / "part", engine="python")
        assert computed() == count
        assert torch.allclose(found.features, whole.features[part.indices], rtol=0, atol=ROUNDING)
        assert torch.equal(found.labels, whole.labels[part.indices])
        assert found.paths == [data.samples[i][0] for i in part.indices]
    pixels = torch.rand(9, 3, 8, 8)
    for count, extra in ((9, 0), (0, 0), (1, 1)):
        inputs = pixels.clone()
        inputs[4] += extra
        tensors = TensorDataset(inputs, torch.arange(9))
        found = cnnrs.preconv(make(tensors, batch_size=4), model, out=tmp_path / "tensors", engine="python")
        assert computed() == count and torch.equal(found.labels, torch.arange(9))
        with torch.no_grad():
            assert torch.allclose(found.features, model(inputs), rtol=0, atol=2 * ROUNDING)
        computed()


def test_mnist_is_recognised(mnist_root: Path, tmp_path: Path) -> None:
    model = nn.Conv2d(1, 2, 5)
    data = cnnrs.MNIST(mnist_root, train=False, transform=transforms.ToTensor())
    first = cnnrs.preconv(data, model, out=tmp_path / "f", batch_size=16)
    meta = json.loads((tmp_path / "f" / "meta.json").read_text())
    assert len(meta["ids"]) == len(data) == 70
    inode = (tmp_path / "f" / "features.npy").stat().st_ino
    again = cnnrs.preconv(data, model, out=tmp_path / "f", batch_size=16)
    assert (tmp_path / "f" / "features.npy").stat().st_ino == inode and torch.equal(again.features, first.features)
    assert torch.equal(first.labels, data.targets)
    assert torch.equal(first.features, cnnrs.preconv(data, model, batch_size=16).features)


@pytest.mark.filterwarnings("ignore:cnnrs.DataLoader")
def test_code_of_transforms_and_models_counts(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def with_lambda(factor: float) -> Any:
        return transforms.Compose([*TRANSFORM.transforms, transforms.Lambda(lambda x: x * factor)])

    out = tmp_path / "f"
    run(images, out, transform=with_lambda(1.0))
    run(images, out, transform=with_lambda(1.0))
    assert said(capsys) == f"{out}: 26 features are up to date, nothing to compute"
    run(images, out, transform=with_lambda(2.0))  # repr says "Lambda()" for both
    assert said(capsys).endswith("because the transform changed")
    run(
        images, out, Counting(3.0), transform=with_lambda(2.0), overwrite=True
    )  # nor does a module's repr show its numbers
    assert said(capsys).endswith("because the model or its weights changed")


# -- passes ------------------------------------------------------------------------------------------------------------

AUGMENT = transforms.Compose(
    [transforms.RandomResizedCrop(24), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)


def test_passes_are_keyed_by_seed_and_image(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(images, tmp_path / "a", transform=AUGMENT, passes=3, seed=5)
    assert computed() == 78 and len(found) == 78 and len(found.paths or []) == 78
    first, second, third = found.features.chunk(3)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(found.labels, found.labels[:26].repeat(3))
    # The same in memory, with other threads, and image by image.
    in_memory = run(images, None, transform=AUGMENT, passes=3, seed=5, num_workers=0)  # type: ignore[arg-type]
    assert torch.equal(in_memory.features, found.features) and in_memory.paths == found.paths
    computed()
    fewer = run(images, tmp_path / "a", transform=AUGMENT, passes=2, seed=5)
    assert computed() == 0 and torch.equal(fewer.features, torch.cat([first, second]))
    more = run(images, tmp_path / "a", transform=AUGMENT, passes=3, seed=5)
    assert computed() == 26 and torch.equal(more.features[52:], third)
    said(capsys)
    other = run(images, tmp_path / "a", transform=AUGMENT, passes=1, seed=6)
    assert said(capsys).endswith("because another seed is asked for")
    assert not torch.equal(other.features, first)
    train, valid = found.split(0.3, seed=1)
    assert not set(train.paths or []) & set(valid.paths or []) and len(train) + len(valid) == 78


def test_passes_that_make_no_sense(images: Path) -> None:
    data = cnnrs.ImageFolder(images, TRANSFORM)
    with pytest.raises(ValueError, match="passes must be at least 1, a whole number, got 0"):
        cnnrs.preconv(data, Counting(), passes=0)
    with pytest.raises(ValueError, match="passes=2 needs a loader over an image folder"):
        cnnrs.preconv([(torch.zeros(1, 3, 8, 8), torch.zeros(1))], Counting(), passes=2)
    with pytest.raises(ValueError, match=r"passes=2 needs a cnnrs\.DataLoader"):
        cnnrs.preconv(DataLoader(data), Counting(), passes=2)
    with pytest.warns(UserWarning, match="draws nothing at random"):
        cnnrs.preconv(data, Counting(), passes=2)


@pytest.mark.parametrize("wrap", [torch.compile, torch.jit.script])
def test_compiled_models_are_recognised(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrap: Any
) -> None:
    def made(seed: int) -> Any:
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
        # The eager backend: no compiler is needed for what is tested here.
        return torch.compile(layers, backend="eager") if wrap is torch.compile else wrap(layers)

    model = made(0)
    first = run(images, tmp_path / "f", model)
    for again in (model, made(0)):
        capsys.readouterr()
        assert torch.equal(run(images, tmp_path / "f", again).features, first.features)
        assert said(capsys).endswith("features are up to date, nothing to compute")
    run(images, tmp_path / "f", made(1), overwrite=True)
    assert said(capsys).endswith("because the model or its weights changed")


def test_the_versions_of_all_packages_count(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import PIL
    import torchvision

    run(images, tmp_path / "f")
    for package in (torchvision, PIL, cnnrs):
        with monkeypatch.context() as patch:
            patch.setattr(package, "__version__", "0.0.1")
            capsys.readouterr()
            run(images, tmp_path / "f")
            assert "another version of torch, torchvision, timm, Pillow or cnnrs" in capsys.readouterr().out
