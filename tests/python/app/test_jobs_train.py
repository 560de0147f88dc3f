"""`cnnrs.train`: who trains, who chooses, who measures, and what is said beside the headline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cnnrs
from cnnrs.classifier.run_folder import Run
from fruit import fruit


@pytest.fixture(scope="module")
def weights(workplace: Path) -> dict[str, Any]:
    """A network without download, and features of the fruit that are there."""
    return {
        "backbone": "resnet18", "weights": str(workplace / "weights.pth"), "features": workplace / "runs" / "features",
        "verbose": False,
    }  # fmt: skip


def photo(path: Path, color: tuple[int, int, int], seed: int) -> None:
    """Noise around one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-40, 40, (32, 40, 3))
    Image.fromarray(np.clip(noise + np.array(color), 0, 255).astype(np.uint8)).save(path)


def test_folders_say_who_measures(tmp_path: Path, weights: dict[str, Any]) -> None:
    for part, number in (("train", 20), ("valid", 6), ("test", 9)):
        fruit(tmp_path / "data" / part, number, seed=number)
    facts = cnnrs.train(tmp_path / "data", out=tmp_path / "run", **weights).facts
    assert (facts["train_photos"], facts["valid_photos"], facts["test_photos"]) == (40, 12, 18)
    assert (facts["measured"], facts["measured_photos"], facts["untouched"]) == ("test photos", 18, True)


@pytest.mark.parametrize("held", ["valid", "test"])
def test_one_folder_measures_and_a_share_of_training_chooses(
    held: str, tmp_path: Path, weights: dict[str, Any]
) -> None:
    fruit(tmp_path / "data" / "training_set", 20)
    fruit(tmp_path / "data" / held, 8, seed=1)
    facts = cnnrs.train(tmp_path / "data", out=tmp_path / "run", **weights).facts
    assert (facts["train_photos"], facts["valid_photos"], facts["test_photos"]) == (34, 6, 16)


def test_few_photos_are_all_measured(workplace: Path, tmp_path: Path, weights: dict[str, Any]) -> None:
    facts = cnnrs.train(workplace / "fruit", out=tmp_path / "run", **weights).facts
    assert facts["measured"] == "photos, each by a classifier that had not seen it (5 folds)"
    assert facts["measured_photos"] == facts["train_photos"] == 40
    assert facts["accuracy"] == 100.0 and facts["interval"][0] < 100.0 == facts["interval"][1]
    assert {one["kind"] for one in facts["heads"]} == {"linear", "logistic", "ridge", "knn"}


def test_groups_that_nothing_matches(tmp_path: Path, weights: dict[str, Any]) -> None:
    for i in range(4):
        photo(tmp_path / "data" / ("sick" if i % 2 else "well") / f"p{i}-0.png", (128, 128, 128), i)
    with pytest.raises(ValueError, match=r"nothing in sick/p1-0\.png matches"):
        cnnrs.train(tmp_path / "data", out=tmp_path / "none", groups="leaf", **weights)
    with pytest.raises(ValueError, match="no regular expression"):
        cnnrs.train(tmp_path / "data", out=tmp_path / "none", groups="(", **weights)


@pytest.mark.parametrize("head", ["linear", "mlp", "logistic", "ridge", "knn", "auto"])
def test_every_head_is_kept(head: str, workplace: Path, tmp_path: Path, weights: dict[str, Any]) -> None:
    run = cnnrs.train(workplace / "fruit", out=tmp_path / "run", head=head, epochs=30, **weights)
    opened = cnnrs.load_run(tmp_path / "run")
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(run.model(images), opened.model(images))
    assert opened.head == run.head and (head == "auto" or opened.head == head)
    files = sorted((workplace / "fruit").rglob("*.jpg"))
    predictions, unreadable = opened.predict(files, verbose=False)
    assert not unreadable
    assert [one.label for one in predictions] == [path.parent.name for path in files]


def test_a_better_run_stays(
    workplace: Path, tmp_path: Path, weights: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**weights, "out": tmp_path / "run", "test": 0.3, "verbose": True}
    good = cnnrs.train(workplace / "fruit", epochs=60, **options)
    assert good.facts["accuracy"] == 100.0
    card = (tmp_path / "run" / "model.json").read_bytes()
    capsys.readouterr()
    worse = cnnrs.train(workplace / "fruit", epochs=1, lr=1e-9, **options)
    assert worse.facts["accuracy"] < 100.0
    assert (tmp_path / "run" / "model.json").read_bytes() == card
    assert "which was better; --force replaces it" in capsys.readouterr().out
    assert isinstance(cnnrs.load_run(tmp_path / "run-2"), Run)
    cnnrs.train(workplace / "fruit", epochs=1, lr=1e-9, force=True, **options)
    assert (tmp_path / "run" / "model.json").read_bytes() != card


def test_a_class_is_added(
    workplace: Path, tmp_path: Path, weights: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(20):
        photo(tmp_path / "lime" / f"{i}.png", (40, 200, 40), i)
    options = {**weights, "features": tmp_path / "features", "head": "ridge", "verbose": True}
    cnnrs.train(workplace / "fruit", out=tmp_path / "two", **options)
    capsys.readouterr()
    run = cnnrs.train(workplace / "fruit", out=tmp_path / "three", add_class=[tmp_path / "lime"], **options)
    assert "all: 20 images are new or changed" in capsys.readouterr().out
    assert run.classes == ["berry", "plum", "lime"] and run.facts["accuracy"] > 95
    with pytest.raises(ValueError, match="there is a class plum already"):
        cnnrs.train(workplace / "fruit", out=tmp_path / "none", add_class=[workplace / "fruit" / "plum"], **options)


def test_a_table(workplace: Path, tmp_path: Path, weights: dict[str, Any]) -> None:
    files = sorted((workplace / "fruit").rglob("*.jpg"))
    lines = ["picture,kind,crate", *(f"{path},{path.parent.name},{i // 4}" for i, path in enumerate(files))]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    run = cnnrs.train(
        tmp_path / "labels.csv",
        out=tmp_path / "run",
        path_column="picture",
        label_column="kind",
        groups="crate",
        **weights,
    )
    assert run.classes == ["berry", "plum"] and run.facts["measured_photos"] == 40


def test_several_labels(tmp_path: Path, weights: dict[str, Any]) -> None:
    """Red and blue may both be in a picture."""
    lines = ["path,labels"]
    for i in range(120):
        red, blue = i % 2, i // 2 % 2
        photo(tmp_path / f"{i}.png", (60 + 150 * red, 60, 60 + 150 * blue), i)
        lines.append(f"{i}.png,{'|'.join(name for name, on in (('red', red), ('blue', blue)) if on)}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    run = cnnrs.train(tmp_path / "labels.csv", out=tmp_path / "run", separator="|", epochs=150, **weights)
    assert run.classes == ["blue", "red"]
    assert run.facts["mean_average_precision"] > 95 and run.facts["exact"] > 80
    assert len(run.facts["thresholds"]) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head": "big"}, "head must be one of linear"),
        ({"balance": "yes"}, "balance must be one of auto"),
        ({"valid": 0.0}, "leaves no photos to choose with"),
        ({"label_column": "kind"}, "is a folder: columns and separators are for tables"),
        ({"test": 0.9, "valid": 0.3}, "leave nothing to train on"),
    ],
)
def test_options(
    options: dict[str, Any], reason: str, workplace: Path, tmp_path: Path, weights: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=reason):
        cnnrs.train(workplace / "fruit", out=tmp_path / "run", **{**weights, **options})
    assert not (tmp_path / "run").exists()
