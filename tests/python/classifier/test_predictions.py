"""What a run says about files, folders and images in memory; about strange photos; as tables."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_tensor

import cnnrs
from cnnrs.classifier.heads import Preprocessing, cut
from cnnrs.classifier.novelty import Novelty
from cnnrs.classifier.predictions import Prediction, Predictions
from cnnrs.classifier.run_folder import Run, load_run
from cnnrs.model.weights import find

SHAPE = Preprocessing(36, 32, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CLASSES = ["ant", "bee", "cat"]


def run_of(head: str = "linear", backbone: str = "resnet18", **options: Any) -> Run:
    torch.manual_seed(0)
    model = cut(find(backbone, None), head, len(CLASSES)).join().eval()
    # Untrained networks say the same of everything.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=2 / math.sqrt(module.in_features))
    return Run(model, CLASSES, SHAPE, backbone, head, **options)


@pytest.fixture(scope="module")
def run() -> Run:
    return run_of()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("photos")
    for i in range(5):
        picture(50 + 7 * i, 60, i).save(place / f"{i}.png")
    (place / "deep").mkdir()
    picture(64, 40, 9).save(place / "deep" / "9.png")
    (place / ".hidden.png").write_bytes((place / "0.png").read_bytes())
    (place / "notes.txt").write_text("no photo")
    return place


def files(photos: Path) -> list[str]:
    return [*(str(photos / f"{i}.png") for i in range(5)), str(photos / "deep" / "9.png")]


def said(found: Predictions) -> list[tuple[list[str], list[float]]]:
    return [(one.classes, one.probabilities) for one in found.predictions]


def test_probabilities_are_those_of_the_model(run: Run, photos: Path) -> None:
    images = torch.stack([run.transform(Image.open(path).convert("RGB")) for path in files(photos)])
    with torch.no_grad():
        expected = run.model(images).softmax(dim=1)
    predictions, unreadable = run.predict(files(photos), top_k=3)
    assert not unreadable and [one.path for one in predictions] == files(photos)
    for one, row in zip(predictions, expected, strict=True):
        assert one.classes == [CLASSES[i] for i in row.argsort(descending=True).tolist()]
        # Another engine: sums in another order, through 18 layers.
        assert one.probabilities == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-4)
        assert (one.label, one.probability) == (one.classes[0], one.probabilities[0])
        assert one.novelty is None and one.unknown is False


def test_whatever_the_photo_is_in(run: Run, photos: Path) -> None:
    """The same bits for a file, and for what is in it; in one batch, because batches of other sizes round otherwise."""
    paths = files(photos)
    listed = run.predict(paths, top_k=3)
    opened = [Image.open(path) for path in paths]
    for given in (
        photos, str(photos), os.fsencode(photos), [photos], map(Path, paths), tuple(paths),
        opened, (Image.open(path) for path in paths), [np.asarray(one) for one in opened],
        [to_tensor(one) for one in opened], [pil_to_tensor(one) for one in opened],
        cnnrs.ImageList(paths), cnnrs.ImageFolder.flat(photos, skip_hidden=True),
    ):  # fmt: skip
        assert said(run.predict(given, top_k=3)) == said(listed)
    same = [image.resize((48, 40)) for image in opened]
    one_by_one = said(run.predict(same, top_k=3))
    assert said(run.predict(torch.stack([to_tensor(one) for one in same]), top_k=3)) == one_by_one
    assert said(run.predict(np.stack([np.asarray(one) for one in same]), top_k=3)) == one_by_one
    mixed = run.predict([opened[0], photos, np.asarray(opened[1])], top_k=3)
    names = ["image 0", *paths, "image 7"]
    assert [one.path for one in mixed.predictions] == names
    for one, (classes, probabilities) in zip(
        mixed.predictions, [said(listed)[0], *said(listed), said(listed)[1]], strict=True
    ):
        assert one.classes == classes and one.probabilities == pytest.approx(probabilities, abs=1e-4)
    assert said(run.predict(opened[0], top_k=3))[0][0] == said(listed)[0][0]
    assert run.predict([]) == ([], [])


def test_data_sets_that_read_otherwise(run: Run, photos: Path) -> None:
    paths = files(photos)
    for options, how in (
        ({"scale": "full"}, "scale='full', page=0"), ({"page": 1}, "scale='none', page=1"),
        ({"loader": Image.open}, "a loader of its own"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"reads photos with {how}, the run with scale='none', page=0: give"):
            run.predict(cnnrs.ImageList(paths, **options))  # type: ignore[arg-type]
    deep = replace(run, read={"scale": "full"})
    for data in (cnnrs.ImageList(paths, scale="full"), cnnrs.ImageList(paths)):
        assert said(deep.predict(data)) == said(deep.predict(paths))


def test_what_is_no_photo(run: Run, photos: Path, tmp_path: Path) -> None:
    for wrong, kind in ((3, "int"), (None, "NoneType"), ({"a": 1}, "dict")):
        with pytest.raises(
            TypeError, match=f"paths of files or folders, PIL images, arrays or tensors, .* got a {kind}"
        ):
            run.predict(wrong)
        with pytest.raises(TypeError, match=f"got a {kind} among them"):
            run.predict([files(photos)[0], wrong])
    with pytest.raises(ValueError, match="an image of floats holds 0 to 1"):
        run.predict(run.transform(Image.open(files(photos)[0]).convert("RGB")))
    with pytest.raises(FileNotFoundError, match="no photos in this folder"):
        run.predict(tmp_path)
    (tmp_path / "bad.jpg").write_bytes(b"x")
    with pytest.warns(UserWarning, match="skips files"):
        found = run.predict([tmp_path / "gone.jpg", Image.open(files(photos)[0]), tmp_path / "bad.jpg", photos])
    assert [path for path, _ in found.unreadable] == [str(tmp_path / "gone.jpg"), str(tmp_path / "bad.jpg")]
    assert [one.path for one in found.predictions] == ["image 1", *files(photos)]
    assert repr(found) == "7 predictions, 2 unreadable files"


def test_many_photos_go_through_in_parts(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = run.predict(photos, batch_size=2)
    monkeypatch.setattr("cnnrs.classifier.predictions._CHUNK", 4)
    assert said(run.predict(photos, batch_size=2)) == said(listed)
    assert said(run.predict([Image.open(path) for path in files(photos)], batch_size=2)) == said(listed)


def test_how_files_are_read(photos: Path, tmp_path: Path) -> None:
    image = Image.open(files(photos)[1])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    turned, upright = run_of(read={"exif": True}), run_of()
    wanted = said(upright.predict(ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")), top_k=3))
    for given in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert said(turned.predict(given, top_k=3)) == wanted
        assert said(upright.predict(given, top_k=3)) != wanted


# -- strange photos ----------------------------------------------------------------------------------------------------


def features_of(run: Run, images: list[Image.Image]) -> torch.Tensor:
    """What goes into the last layer, by a hook."""
    seen: list[torch.Tensor] = []
    hook = run.model.fc.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        run.model(torch.stack([run.transform(image.convert("RGB")) for image in images]))
    hook.remove()
    return seen[0]


@pytest.fixture(scope="module")
def knowing(run: Run) -> Run:
    """A run that knows what it was trained on: waves."""
    rows = features_of(run, [picture(40, 40, i) for i in range(30)])
    return replace(run, novelty=Novelty.of(rows[:20], rows[20:]))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_halves_are_the_model(head: str, photos: Path) -> None:
    run = run_of(head)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    images = torch.stack([run.transform(Image.open(path).convert("RGB")) for path in files(photos)])
    body, top = run.halves()
    with torch.no_grad():
        assert torch.equal(top(body(images)), run.model(images))
    assert body(images).shape == (6, 512)
    assert list(run.model.state_dict()) == list(before)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(body.parameters(), run.model.parameters(), strict=False))


def test_halves_of_a_classifier() -> None:
    run = run_of("classifier", "alexnet")
    body, top = run.halves()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert body(images).shape == (2, 9216) and torch.equal(top(body(images)), run.model(images))


def test_strange_photos_are_unknown(knowing: Run, run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert knowing.novelty is not None
    images = [picture(40, 40, 100), Image.new("RGB", (40, 40), "white")]
    found = knowing.predict(images, top_k=3).predictions
    # One pass: what the head got is what is compared, and scores are the model's.
    expected = knowing.novelty.score(features_of(knowing, images)).tolist()
    assert [one.novelty for one in found] == pytest.approx(expected, abs=1e-4)
    assert [one.unknown for one in found] == [one > knowing.novelty.threshold for one in expected]
    assert found[1].unknown and found[1].novelty > found[0].novelty  # type: ignore[operator]
    for one, (classes, probabilities) in zip(found, said(run.predict(images, top_k=3)), strict=True):
        assert one.classes == classes and one.probabilities == pytest.approx(probabilities, abs=1e-4)
    assert [one.unknown for one in knowing.predict(images, unknown="off").predictions] == [False, False]
    assert [one.unknown for one in knowing.predict(images, unknown=0.0).predictions] == [True, True]
    assert [one.unknown for one in knowing.predict(images, unknown=9).predictions] == [False, False]
    with pytest.raises(ValueError, match='unknown must be "auto", "off" or a novelty, got \'on\''):
        knowing.predict(images, unknown="on")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown=0\.5, but this run does not know what it was trained on"):
        run.predict(images, unknown=0.5)
    calls = []
    real = knowing.model.layer4.forward  # type: ignore[union-attr]
    monkeypatch.setattr(knowing.model.layer4, "forward", lambda x: calls.append(len(x)) or real(x))
    # Two of the first batch check the engine, if there is one.
    knowing.predict([*images, *images], batch_size=2)
    assert sum(calls) <= 4 + 2


# -- several labels ----------------------------------------------------------------------------------------------------


def test_several_labels(photos: Path) -> None:
    run = run_of(multilabel=True)
    images = torch.stack([run.transform(Image.open(path).convert("RGB")) for path in files(photos)])
    with torch.no_grad():
        expected = run.model(images).sigmoid()
    for one, row in zip(run.predict(photos).predictions, expected, strict=True):
        likely = [CLASSES[i] for i in row.argsort(descending=True).tolist()]
        count = int((row >= 0.5).sum())
        assert one.labels == likely[:count] and one.classes == likely[: max(count, 1)]
        assert one.probabilities == pytest.approx(row.sort(descending=True).values[: max(count, 1)].tolist(), abs=1e-4)


# -- tables ------------------------------------------------------------------------------------------------------------

NAMES = [os.fsdecode(b"caf\xe9,.jpg"), "two\nlines.jpg"]
TABLES = {
    "plain": [Prediction(NAMES[0], ["cat"], [0.75]), Prediction(NAMES[1], ["dog, or wolf"], [1.0])],
    "ranked": [Prediction(NAMES[0], ["cat", "dog"], [0.75, 0.25]), Prediction(NAMES[1], ["dog", "cat"], [1.0, 0.0])],
    "strange": [Prediction(NAMES[0], ["cat"], [0.75], 0.125, False), Prediction(NAMES[1], ["cat"], [1.0], 0.5, True)],
}
COLUMNS = {
    "plain": ["path", "class", "probability"],
    "ranked": ["path", "rank", "class", "probability"],
    "strange": ["path", "class", "probability", "novelty", "unknown"],
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(kind: str, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    found = Predictions(TABLES[kind], [("bad.jpg", "is bad")])
    found.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows[0] == COLUMNS[kind]
    expected = [
        {
            "path": one.path,
            "rank": rank,
            "class": name,
            "probability": p,
            "novelty": one.novelty,
            "unknown": one.unknown,
        }
        for one in TABLES[kind]
        for rank, (name, p) in enumerate(zip(one.classes, one.probabilities, strict=True), 1)
    ]
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.columns) == COLUMNS[kind]
    assert frame.to_dict("records") == [{name: row[name] for name in COLUMNS[kind]} for row in expected]
    assert [dict(zip(rows[0], row, strict=True)) for row in rows[1:]] == [
        {name: f"{row[name]:.6f}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS[kind]}
        for row in expected
    ]
    stream = io.StringIO()
    found.to_csv(stream)
    assert stream.getvalue().encode(errors="surrogateescape") == (tmp_path / "table.csv").read_bytes()
    predictions, unreadable = found
    assert predictions is found.predictions and unreadable == [("bad.jpg", "is bad")] and len(found) == 2


def test_a_table_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas: pip install pandas"):
        Predictions([], []).to_pandas()


# -- the folder --------------------------------------------------------------------------------------------------------


def test_all_of_it_comes_back(knowing: Run, photos: Path, tmp_path: Path) -> None:
    whole = replace(knowing, read={"exif": True, "truncated": "accept"}, multilabel=True, facts={"accuracy": 50.0})
    whole.save(tmp_path)
    again = load_run(tmp_path)
    assert (again.read, again.multilabel, again.facts) == (whole.read, True, whole.facts)
    assert torch.equal(again.novelty.rows, knowing.novelty.rows)  # type: ignore[union-attr]
    assert again.novelty.threshold == knowing.novelty.threshold  # type: ignore[union-attr]
    assert again.predict(photos, top_k=3) == whole.predict(photos, top_k=3)
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors", "novelty.safetensors"]
    (tmp_path / "novelty.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=r"novelty\.safetensors does not hold what belongs to the classifier of model\.json"
    ):
        load_run(tmp_path)
    (tmp_path / "novelty.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"novelty\.safetensors is gone, only model\.json is there"):
        load_run(tmp_path)
    run_of(facts={"accuracy": 60.0}).save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors"]
    plain = load_run(tmp_path)
    assert (plain.read, plain.multilabel, plain.novelty) == ({}, False, None)


def test_a_better_run_stays(tmp_path: Path) -> None:
    place = tmp_path / "pets"
    run_of(facts={"accuracy": 80.0}).save(place)
    run_of(facts={"accuracy": 80.0, "which": "second"}).save(place)
    worse = run_of(facts={"accuracy": 70.5, "which": "third"})
    with pytest.raises(FileExistsError, match=r"accuracy 80\.00 %, 70\.50 % by this one; .*pets-2' for"):
        worse.save(place)
    assert load_run(place).facts["which"] == "second"
    # Measured with other photos it says nothing about this one.
    run_of(facts={"accuracy": 70.0, "measured_with": "others"}).save(place)
    run_of(facts={"accuracy": 80.0, "which": "second"}).save(place)
    assert sorted(os.listdir(place)) == ["model.json", "model.safetensors"]
    run_of(facts={}).save(tmp_path / "unmeasured")
    worse.save(tmp_path / "unmeasured")
    worse.save(place, force=True)
    assert load_run(place).facts["which"] == "third"
    (place / "model.json").write_text("{")
    run_of(facts={"accuracy": 1.0}).save(place)


def test_a_run_in_one_line(run: Run) -> None:
    assert repr(replace(run, facts={"accuracy": 98.765})) == (
        "Run(resnet18, head 'linear', 3 classes: ant, bee, cat, 98.77 % right)"
    )
    assert repr(replace(run, classes=list("abcdefgh"))) == (
        "Run(resnet18, head 'linear', 8 classes: a, b, c, d, e, f, ...)"
    )
