"""`cnnrs predict --sort-into` and `--unknown`: copies, and what is told of strange photos."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import cnnrs
from cnnrs.app.cli import main
from cnnrs.app.cli.sort_photos import SortedCopies
from cnnrs.classifier.novelty import Novelty
from cnnrs.classifier.predictions import Prediction


@pytest.fixture
def run(workplace: Path, tmp_path: Path) -> Path:
    """The run of the fruit, which knows what it was trained on."""
    whole = cnnrs.load_run(workplace / "runs" / "fruit")
    body, _ = whole.halves()
    data = cnnrs.ImageFolder(workplace / "fruit", whole.transform)
    rows = cnnrs.preconv(data, body, verbose=False).features
    novelty = Novelty.of(rows[::2], rows[1::2])
    # All of the fruit is known.
    whole.novelty = replace(novelty, threshold=float(novelty.score(rows).max()) + 1e-4)
    whole.save(tmp_path / "run")
    return tmp_path / "run"


def tree(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def test_photos_are_copied(run: Path, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, sorted_into = tmp_path / "photos", tmp_path / "sorted"
    for folder, kind, number in (("a", "plum", 3), ("b", "plum", 4), ("a", "berry", 5)):
        (photos / folder).mkdir(parents=True, exist_ok=True)
        target = photos / folder / ("1.jpg" if kind == "plum" else "2.jpg")
        target.write_bytes((workplace / "fruit" / kind / f"{number:02}.jpg").read_bytes())
    Image.new("RGB", (50, 40), "white").save(photos / "strange.png")
    os.utime(photos / "a" / "1.jpg", (1e9, 1e9))
    before = {path: (photos / path).read_bytes() for path in tree(photos)}
    arguments = ["predict", str(run), str(photos), "--sort-into", str(sorted_into)]
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [list(one) for one in found] == [["path", "class", "probability", "novelty", "unknown", "copies"]] * 4
    assert [one["unknown"] for one in found] == [True, False, False, False]
    assert tree(sorted_into) == ["berry/2.jpg", "plum/1-2.jpg", "plum/1.jpg", "unknown/strange.png"]
    assert [one["copies"] for one in found] == [
        [f"{sorted_into}/{name}"] for name in ("unknown/strange.png", "plum/1.jpg", "berry/2.jpg", "plum/1-2.jpg")
    ]
    for one in found:
        assert Path(one["copies"][0]).read_bytes() == Path(one["path"]).read_bytes()
    assert os.stat(sorted_into / "plum" / "1.jpg").st_mtime == 1e9
    assert f"another photo had the name of {photos}/b/1.jpg, it is {sorted_into}/plum/1-2.jpg" in printed.err
    assert f"note: 4 photos are copied into {sorted_into}" in printed.err
    # Again: what is there is there. Other photos of the names stay, whatever comes.
    assert main(arguments) == 0
    assert "unknown (if anything, " in capsys.readouterr().out
    assert tree(sorted_into) == ["berry/2.jpg", "plum/1-2.jpg", "plum/1.jpg", "unknown/strange.png"]
    (sorted_into / "berry" / "2.jpg").write_bytes(b"mine")
    assert main(arguments) == 0
    assert (sorted_into / "berry" / "2.jpg").read_bytes() == b"mine"
    assert "berry/2-2.jpg" in tree(sorted_into)
    assert {path: (photos / path).read_bytes() for path in tree(photos)} == before


def test_unknown(run: Path, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(workplace / "fruit" / "plum" / "03.jpg")
    for value, unknown in (("off", False), ("0", True), ("1.5", False)):
        assert main(["predict", str(run), photo, "--unknown", value, "--csv"]) == 0
        header, row = capsys.readouterr().out.splitlines()
        assert header == "path,class,probability,novelty,unknown" and row.endswith(f",{unknown}")
    for wrong in ("on", "-1", "nan"):
        with pytest.raises(SystemExit):
            main(["predict", str(run), photo, "--unknown", wrong])
        assert "auto, off or a number from 0 on is wanted" in capsys.readouterr().err
    plain = cnnrs.load_run(run)
    plain.novelty = None
    plain.save(tmp_path / "plain")
    assert main(["predict", str(tmp_path / "plain"), photo, "--unknown", "0.5"]) == 2
    assert "does not know what it was trained on" in capsys.readouterr().err


def test_copies_do_not_lie_among_the_photos(
    run: Path, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = workplace / "fruit"
    for place in (photos, photos / "sorted"):
        assert main(["predict", str(run), str(photos), "--sort-into", str(place)]) == 2
        assert f"--sort-into {place} is inside {photos}: the next time" in capsys.readouterr().err
    assert not (photos / "sorted").exists()
    (tmp_path / "file").write_text("x")
    assert main(["predict", str(run), str(photos), "--sort-into", str(tmp_path / "file")]) == 2
    assert "is a file; a folder is wanted" in capsys.readouterr().err


def test_names_of_folders(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"pixels")
    classes = ["unknown", "../..", "a/b", "", "none"]
    copies = SortedCopies(tmp_path / "s", classes)
    for name in classes:
        copies.add(Prediction(str(photo), [name], [1.0]))
    copies.add(Prediction(str(photo), ["unknown"], [1.0], 0.5, True))
    folders = [".._..", "_", "a_b", "none", "unknown", "unknown-2"]
    assert tree(tmp_path / "s") == sorted(f"{name}/photo.jpg" for name in folders)
    assert tree(tmp_path)[0] == "photo.jpg"
    several = SortedCopies(tmp_path / "m", ["sea", "dusk"], multilabel=True)
    several.add(Prediction(str(photo), ["sea", "dusk"], [0.9, 0.5], labels=["sea", "dusk"]))
    several.add(Prediction(str(photo), ["sea"], [0.4]))
    assert tree(tmp_path / "m") == ["dusk/photo.jpg", "none/photo.jpg", "sea/photo.jpg"]


def test_classes_that_would_share_a_folder(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"pixels")
    classes = ["AC/DC", "AC\\DC", "AC_DC", "AC_DC-2"]
    copies = SortedCopies(tmp_path / "s", classes)
    found = [copies.add(Prediction(str(photo), [name], [1.0])) for name in classes]
    folders = ["AC_DC-3", "AC_DC-4", "AC_DC", "AC_DC-2"]
    assert found == [[str(tmp_path / "s" / name / "photo.jpg")] for name in folders]


def test_a_photo_that_cannot_be_copied_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"pixels")

    def full(source: str, target: Path) -> None:
        target.write_bytes(b"pi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cnnrs.app.cli.sort_photos.shutil.copy2", full)
    with pytest.raises(OSError, match="No space left"):
        SortedCopies(tmp_path / "s", ["a"]).add(Prediction(str(photo), ["a"], [1.0]))
    assert tree(tmp_path / "s") == []
