"""`cnnrs predict`: forms of output, agreement with a notebook, bad photos and damaged runs."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cnnrs
from cnnrs.app.cli import main


def predict(workplace: Path, *arguments: str | Path) -> int:
    return main(["predict", str(workplace / "runs" / "fruit"), *map(str, arguments)])


def test_predict_json(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(workplace, workplace / "fruit", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 40
    assert all(list(entry) == ["path", "class", "probability", "novelty", "unknown"] for entry in found)
    assert all(entry["class"] == Path(entry["path"]).parent.name for entry in found)
    assert all(0.5 <= entry["probability"] <= 1 for entry in found)


def test_predict_agrees_with_a_notebook(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Features, a head with the run's weights, both joined: the road of notebook 05."""
    body = cnnrs.backbone("resnet18", weights=workplace / "weights.pth")
    photos = cnnrs.ImageFolder(workplace / "fruit", body.transform)
    features = cnnrs.preconv(cnnrs.DataLoader(photos, batch_size=8), body, verbose=False)
    head = torch.nn.Linear(512, 2)
    state = load_file(workplace / "runs" / "fruit" / "model.safetensors")
    head.load_state_dict({"weight": state["fc.weight"], "bias": state["fc.bias"]})
    whole = features.attach(head).eval()
    with torch.no_grad():
        probabilities = torch.cat([whole(images) for images, _ in cnnrs.DataLoader(photos, batch_size=8)]).softmax(
            dim=1
        )
    assert predict(workplace, workplace / "fruit", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["path"] for entry in found] == features.paths
    assert [entry["class"] for entry in found] == [photos.classes[i] for i in probabilities.argmax(dim=1)]
    # Rounded to six digits; other sizes of batches may round otherwise.
    expected = probabilities.max(dim=1).values.tolist()
    assert [entry["probability"] for entry in found] == pytest.approx(expected, abs=2e-5)


def test_predict_csv(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [workplace / "fruit" / "plum" / "03.jpg", workplace / "fruit" / "berry" / "04.jpg"]
    assert predict(workplace, *files, "--csv") == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows[0] == ["path", "class", "probability", "novelty", "unknown"]
    assert [row[:2] for row in rows[1:]] == [[str(files[0]), "plum"], [str(files[1]), "berry"]]
    assert predict(workplace, *files, "--csv", "--top-k", "5") == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert [row[1] for row in rows[1:]] == ["1", "2", "1", "2"]
    assert float(rows[1][3]) + float(rows[2][3]) == pytest.approx(1, abs=2e-6)


def test_predict_text_and_top_k(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(workplace, workplace / "fruit" / "plum" / "03.jpg", "--top-k", "2") == 0
    line = capsys.readouterr().out
    assert line.index("plum ") < line.rindex("berry ") and line.count(" %") == 2


def test_predict_goes_on_after_bad_files(workplace: Path, bad_fruit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(workplace, bad_fruit, "--json") == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [Path(entry["path"]).name for entry in found] == ["00.jpg", "01.jpg", "02.jpg", "03.jpg", "02.jpg", "03.jpg"]
    assert all(entry["class"] == Path(entry["path"]).parent.name for entry in found)
    # Each file once, and nothing else.
    assert [line.partition(": ")[0] for line in printed.err.splitlines()] == ["cnnrs predict"] * 2


def test_predict_only_bad_files(workplace: Path, bad_fruit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(workplace, bad_fruit / "plum" / "00.jpg", bad_fruit / "plum" / "01.jpg", "--json") == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == []
    assert printed.err.count("cnnrs predict: ") == 2


def test_what_cannot_be_predicted(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(workplace / "fruit" / "plum" / "03.jpg")
    assert main(["predict", str(tmp_path / "none"), photo]) == 2
    assert "none: there is no such folder" in capsys.readouterr().err
    assert main(["predict", photo, photo]) == 2
    assert "03.jpg: is a file; a folder that cnnrs train made is wanted" in capsys.readouterr().err
    assert main(["predict", str(workplace / "runs"), photo]) == 2
    assert f"no model.json): there is one in {workplace / 'runs'}/" in capsys.readouterr().err
    assert main(["predict", str(tmp_path), photo]) == 2
    assert "holds no trained model (no model.json)" in capsys.readouterr().err
    assert predict(workplace, tmp_path / "gone.jpg") == 2
    assert "there is no such file or folder" in capsys.readouterr().err
    assert predict(workplace, tmp_path) == 2
    assert "no photos in this folder" in capsys.readouterr().err


def test_damaged_runs(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(workplace / "fruit" / "plum" / "03.jpg")
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((workplace / "runs" / "fruit" / name).read_bytes())
    card = json.loads((tmp_path / "model.json").read_text())
    for content, reason in (
        ("{", "is damaged"),
        (json.dumps({**card, "format": 99}), f"is in format 99, this cnnrs {cnnrs.__version__} reads format 1"),
        (json.dumps({**card, "classes": ["a", "b", "c"]}), "does not hold the resnet18"),
        (json.dumps({name: value for name, value in card.items() if name != "head"}), "is damaged: it lacks head"),
    ):
        (tmp_path / "model.json").write_text(content)
        assert main(["predict", str(tmp_path), photo]) == 2
        assert reason in capsys.readouterr().err
    (tmp_path / "model.json").write_text(json.dumps(card))
    os.truncate(tmp_path / "model.safetensors", 1000)
    assert main(["predict", str(tmp_path), photo]) == 2
    assert "model.safetensors does not hold the resnet18" in capsys.readouterr().err
    (tmp_path / "model.safetensors").unlink()
    assert main(["predict", str(tmp_path), photo]) == 2
    assert "model.safetensors is gone" in capsys.readouterr().err


def test_predict_takes_what_training_takes_and_says_the_rest(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = workplace / "fruit" / "plum" / "03.jpg"
    with Image.open(photo) as image:
        image.save(tmp_path / "1.gif")
    for name in ("2.JFIF", "._2.jpg", ".hidden.jpg"):
        (tmp_path / name).write_bytes(photo.read_bytes())
    (tmp_path / "notes.txt").touch()
    assert predict(workplace, tmp_path, "--json") == 0
    out, err = capsys.readouterr()
    assert [Path(one["path"]).name for one in json.loads(out)] == ["1.gif", "2.JFIF"]
    notes = [line for line in err.splitlines() if "left out, as in training" in line]
    assert {note.split("training: ")[1].split(":")[0] for note in notes} == {"1 ._*", "1 .jpg", "1 .txt"}
