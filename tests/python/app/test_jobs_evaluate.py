"""`cnnrs.evaluate`: new labelled photos, the same numbers as by hand."""

from pathlib import Path

import pytest
from PIL import Image

import cnnrs
from cnnrs.app.cli import main
from fruit import fruit


def test_numbers_are_those_of_predict(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = fruit(tmp_path / "new", 7)
    # Two of the wrong kind.
    for name in ("00.jpg", "01.jpg"):
        (root / "plum" / name).rename(root / "berry" / f"plum-{name}")
    run = cnnrs.load_run(workplace / "runs" / "fruit")
    files = sorted(root.rglob("*.jpg"))
    predictions, _ = run.predict(files, verbose=False)
    right = sum(one.label == path.parent.name for one, path in zip(predictions, files, strict=True))
    found = cnnrs.evaluate(run, root, verbose=False)
    assert found.facts["accuracy"] == pytest.approx(100 * right / 14, abs=1e-4)
    assert found.confusion is not None and found.confusion.support == [9, 5]
    assert found.report is None
    assert (
        main(["evaluate", str(workplace / "runs" / "fruit"), str(root), "--report", str(tmp_path / "page.html")]) == 0
    )
    printed = capsys.readouterr().out
    assert "of 14 new photos are right" in printed and "rows: true class" in printed
    assert "new photos" in (tmp_path / "page.html").read_text()


def test_a_table_and_a_missing_class(workplace: Path, tmp_path: Path) -> None:
    files = sorted((workplace / "fruit" / "plum").glob("*.jpg"))
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *(f"{path},plum" for path in files)]))
    found = cnnrs.evaluate(
        workplace / "runs" / "fruit", tmp_path / "labels.csv", report=tmp_path / "p.html", verbose=False
    )
    assert found.facts["measured_photos"] == 20 and found.facts["accuracy"] == 100.0


def test_what_it_cannot_do(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "new" / "kiwi").mkdir(parents=True)
    Image.new("RGB", (30, 30)).save(tmp_path / "new" / "kiwi" / "1.png")
    with pytest.raises(ValueError, match="has the classes kiwi, the classifier knows berry, plum"):
        cnnrs.evaluate(workplace / "runs" / "fruit", tmp_path / "new", verbose=False)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cnnrs.evaluate(workplace / "runs" / "fruit", tmp_path / "nowhere", verbose=False)


def test_several_labels_are_not_measured_as_one(workplace: Path, tmp_path: Path) -> None:
    file = next((workplace / "fruit" / "plum").glob("*.jpg"))
    (tmp_path / "labels.csv").write_text(f"path,labels\n{file},plum|berry\n")
    with pytest.raises(ValueError, match="several labels per photo, the classifier was trained to name one"):
        cnnrs.evaluate(workplace / "runs" / "fruit", tmp_path / "labels.csv", separator="|", verbose=False)


def test_the_photos_of_training_are_not_new(workplace: Path, tmp_path: Path) -> None:
    found = cnnrs.evaluate(workplace / "runs" / "fruit", workplace / "fruit", report=tmp_path / "p.html", verbose=False)
    assert any("it was trained on" in text for text in found.warnings)
    # Beside the page, not in place of the run's own.
    assert (tmp_path / "p-mistakes.csv").exists()
