"""What commit 0148a67 has left on disk, beside torch 2.13.0: features, a cache, a run, a checkpoint, a state."""

from __future__ import annotations

import importlib.util
import json
import lzma
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
import torch.nn.functional as F
import torchvision

import cnnrs
from cnnrs.app.cli import main
from cnnrs.classifier.heads import Preprocessing
from cnnrs.features.features import Attached, _Kept
from cnnrs.identity import fingerprint as module
from cnnrs.identity.fingerprint import fingerprint
from cnnrs.model.backbone import Backbone, _Pool
from cnnrs.model.cut import _Until
from cnnrs.model.weights import Found

FIXTURES = Path(__file__).parents[1] / "fixtures" / "0.1"
if not (FIXTURES / "expected.json").exists():
    pytest.skip(f"{FIXTURES / 'write.py'} has not been run with commit 0148a67", allow_module_level=True)
EXPECTED: dict[str, Any] = json.loads((FIXTURES / "expected.json").read_text())
SAME_PYTHON = sys.version.split(".")[:2] == EXPECTED["versions"]["Python"].split(".")[:2]
spec = importlib.util.spec_from_file_location("written_by", FIXTURES / "write.py")
assert spec is not None and spec.loader is not None
writer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(writer)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that is the current folder, as it was; the photos have their time."""
    shutil.copytree(FIXTURES, tmp_path / "0.1")
    monkeypatch.chdir(tmp_path / "0.1")
    for photo in writer.PHOTOS.rglob("*.png"):
        os.utime(photo, ns=(writer.TIME, writer.TIME))
    packed = Path("run/model.safetensors.xz")
    Path("run/model.safetensors").write_bytes(lzma.decompress(packed.read_bytes()))
    packed.unlink()
    return tmp_path / "0.1"


@pytest.fixture
def same_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing but cnnrs had been updated since."""
    if not SAME_PYTHON:
        pytest.skip("keys hold compiled code, which is another Python's")
    assert cnnrs.__version__ == EXPECTED["versions"]["cnnrs"], "its version is part of every key: these go with it"
    for package, name in ((torch, "torch"), (torchvision, "torchvision"), (PIL, "Pillow")):
        monkeypatch.setattr(package, "__version__", EXPECTED["versions"][name])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the stores' network has seen."""
    seen: list[int] = []
    real = F.conv2d

    def spy(x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        seen.append(len(x))
        return real(x, *arguments, **keywords)

    monkeypatch.setattr(F, "conv2d", spy)
    return seen


def preconv(name: str, **options: Any) -> cnnrs.Features:
    body = cnnrs.backbone(writer.network(), "1", "avg")
    loader = cnnrs.DataLoader(
        cnnrs.ImageFolder(writer.PHOTOS, writer.FLIPPED if name == "passes" else writer.SMALL), batch_size=2
    )
    return cnnrs.preconv(loader, body, Path("stores", name), engine="python", **options)


def check(found: cnnrs.Features, name: str, exact: bool = True) -> None:
    expected = EXPECTED["stores"][name]
    assert str(found.features.dtype) == expected["dtype"]
    values = torch.tensor(expected["features"], dtype=torch.float64)
    # Means of 36 sums of 27 products of values of size one, in another order.
    torch.testing.assert_close(found.features.double(), values, rtol=0, atol=0 if exact else 27 * 2**-24)
    assert found.labels.tolist() == expected["labels"] and found.classes == expected["classes"]
    assert found.paths == expected["paths"]


OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {}, "bfloat16": {"dtype": "bfloat16"}, "passes": {"passes": 2, "seed": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_features_are_read(name: str, place: Path) -> None:
    check(cnnrs.load_features(f"stores/{name}"), name)


@pytest.mark.parametrize("name", OPTIONS)
def test_features_are_up_to_date_where_only_cnnrs_was_updated(
    name: str, place: Path, same_versions: None, calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    # At first the copied photos, which have other inodes, are compared by their contents.
    for _ in range(2):
        check(preconv(name, **OPTIONS[name]), name)
    rows = len(EXPECTED["stores"][name]["labels"])
    assert capsys.readouterr().out.strip().endswith(f"{rows} features are up to date, nothing to compute")
    assert not calls


def test_an_interrupted_run_goes_on_where_only_cnnrs_was_updated(
    place: Path, same_versions: None, calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    check(preconv("interrupted"), "float32", exact=False)
    there = 8 - sum(calls)
    # Three batches were computed, of which one may have been in flight.
    assert there in (4, 6)
    assert capsys.readouterr().out.strip().endswith(f"computing {sum(calls)} rows, {there} are there")


def test_beside_another_torch_everything_is_computed_and_the_reason_is_said(
    place: Path, calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.__version__ == EXPECTED["versions"]["torch"] or not SAME_PYTHON:
        pytest.skip("this is that torch, or another Python, which is another reason")
    for name in OPTIONS:
        calls.clear()
        check(preconv(name, **OPTIONS[name]), name, exact=False)
        assert sum(calls) == len(EXPECTED["stores"][name]["labels"])
        why = "because another version of torch, torchvision, timm, Pillow or cnnrs computes them"
        assert capsys.readouterr().out.strip().endswith(why)
    # Nothing was finished there that could be said to be out of date.
    calls.clear()
    check(preconv("interrupted"), "float32", exact=False)
    assert sum(calls) == 8 and capsys.readouterr().out == ""


# -- keys --------------------------------------------------------------------------------------------------------------

CLASSES = (
    Backbone, _Pool, _Until, Attached, _Kept,
    Preprocessing, Found, cnnrs.FeatureDataset, cnnrs.ImageList, cnnrs.ImageFolder, cnnrs.MNIST,
    cnnrs.models.MnistNet,
)  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED["models"])
def test_models_have_the_key_they_had(name: str) -> None:
    assert fingerprint(writer.backbones()[name]) == EXPECTED["models"][name]


@pytest.mark.skipif(not SAME_PYTHON, reason="keys hold compiled code, which is another Python's")
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_classes_have_the_key_they_had(kind: type) -> None:
    assert fingerprint(kind) == EXPECTED["classes"][kind.__qualname__][1]


@pytest.mark.parametrize("entry", module._NAMED)
def test_every_name_that_is_kept_is_needed(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(module._NAMED, entry)
    assert any(fingerprint(kind) != EXPECTED["classes"][kind.__qualname__][1] for kind in CLASSES)


# -- the rest ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unreadable(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Photos of the path, size and time they had, that only a cache can know."""
    first = Path("/tmp/cnnrs-0.1")
    shutil.rmtree(first, ignore_errors=True)
    shutil.copytree(place, first)
    monkeypatch.chdir(first)
    for photo in writer.PHOTOS.rglob("*.png"):
        photo.write_bytes(b"x" * photo.stat().st_size)
        os.utime(photo, ns=(writer.TIME, writer.TIME))
    yield
    shutil.rmtree(first)


def test_a_cache_is_used_beside_the_pillow_it_was_written_with(
    place: Path, unreadable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PIL, "__version__", EXPECTED["versions"]["Pillow"])
    monkeypatch.setattr("cnnrs.data.cache.pillow13", lambda: True)
    loader = cnnrs.DataLoader(cnnrs.ImageFolder(writer.PHOTOS, writer.SMALL), 8, num_workers=0, cache="cache")
    ((images, _),) = list(loader)
    assert images.double().sum((1, 2, 3)).tolist() == EXPECTED["cache"]["sums"]
    assert loader.cached["images"] == EXPECTED["cache"]["images"] == 8


def test_a_cache_is_not_used_beside_another_pillow(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides the bits of a resize: such a cache has another file."""
    monkeypatch.setattr(PIL, "__version__", "99.0")
    loader = cnnrs.DataLoader(cnnrs.ImageFolder(writer.PHOTOS, writer.SMALL), 8, num_workers=0, cache="cache")
    list(loader)
    assert len(list(Path("cache").iterdir())) == 2


def test_a_run_predicts_what_it_predicted(place: Path) -> None:
    run = cnnrs.load_run("run")
    found, unreadable = run.predict([path for path, _, _ in EXPECTED["run"]], top_k=2, verbose=False)
    assert not unreadable
    for one, (path, classes, probabilities) in zip(found, EXPECTED["run"], strict=True):
        assert (one.path, one.classes) == (path, classes)
        # Float32 sums in another order, through 26 layers.
        assert one.probabilities == pytest.approx(probabilities, abs=1e-4)
    assert main(["predict", "run", str(writer.PHOTOS)]) == 0


def batches(loader: Iterator[Any]) -> list[Any]:
    return [[images.double().flatten(1).sum(1).tolist(), labels.tolist()] for images, labels in loader]


def test_a_loader_goes_on(place: Path) -> None:
    loader = writer.shuffled()
    loader.load_state_dict(torch.load("loader.pt", weights_only=True))
    assert [*batches(loader), *batches(loader)] == EXPECTED["loader"]


def test_the_best_weights_come_back(place: Path) -> None:
    expected = EXPECTED["checkpoint"]
    model = torch.nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
    best = cnnrs.BestCheckpoint("best.pt", model, sgd)
    assert best.restore() == expected["epoch"] and best.best == expected["figure"]
    assert [p.tolist() for p in model.parameters()] == expected["parameters"]
    assert [sgd.state[p]["momentum_buffer"].tolist() for p in model.parameters()] == expected["momentum"]
