"""`cnnrs check`: what is found, and that only --fix changes anything."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cnnrs.app.cli import main
from deep_images import deep, write
from fruit import fruit


def test_check_of_good_photos(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(workplace / "fruit")]) == 0
    text = capsys.readouterr().out
    assert "40 images, all can be loaded" in text
    assert "32-63       40  ####" in text


def test_check_changes_nothing_unless_asked(bad_fruit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in bad_fruit.rglob("*")}
    assert main(["check", str(bad_fruit), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and report["classes"] == {"berry": 4, "plum": 4}
    assert [Path(path).name for path, _ in (*report["corrupt"], *report["truncated"])] == ["00.jpg", "01.jpg"]
    assert {path: path.stat().st_mtime_ns for path in bad_fruit.rglob("*")} == before


@pytest.mark.parametrize("how", ["move", "delete"])
def test_check_fix(how: str, bad_fruit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [bad_fruit / "plum" / name for name in ("00.jpg", "01.jpg")]
    contents = [path.read_bytes() for path in bad]
    assert main(["check", str(bad_fruit), "--fix", how]) == 0
    aside = bad_fruit.with_name("fruit-bad" if how == "move" else "fruit.cnnrs-trash")
    assert f"2 files moved to {aside}; nothing is deleted" in capsys.readouterr().out
    assert not any(path.exists() for path in bad)
    assert [(aside / "plum" / path.name).read_bytes() for path in bad] == contents
    assert main(["check", str(bad_fruit)]) == 0


def test_check_fix_overwrites_nothing(bad_fruit: Path) -> None:
    aside = bad_fruit.with_name("fruit-bad") / "plum" / "00.jpg"
    aside.parent.mkdir(parents=True)
    aside.write_bytes(b"moved before")
    assert main(["check", str(bad_fruit), "--fix", "move"]) == 0
    assert aside.read_bytes() == b"moved before"
    assert aside.with_name("00-1.jpg").read_bytes() == b""


def test_check_of_two_halves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for half, number in (("train", 4), ("valid", 3)):
        fruit(tmp_path / half, number)
    twin = (tmp_path / "train" / "plum" / "01.jpg").read_bytes()
    for path in (tmp_path / "valid").rglob("*.jpg"):
        path.unlink() if path.name == "02.jpg" else Image.effect_noise((30, 30), 90).convert("RGB").save(path)
    (tmp_path / "valid" / "plum" / "copy.jpg").write_bytes(twin)
    assert main(["check", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["classes"] == {"train/berry": 4, "train/plum": 4, "valid/berry": 2, "valid/plum": 3}
    (leak,) = report["in_train_and_valid"]
    assert {Path(path).name for path in leak} == {"01.jpg", "copy.jpg"}
    assert main(["check", str(tmp_path)]) == 0
    assert "1 photo is in both train and valid" in capsys.readouterr().out


def test_check_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path)]) == 1
    assert "no photos here; expected one folder per class" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_check_says_what_is_left_out_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = fruit(tmp_path / "fruit", 6)
    for name in ("plum/._00.jpg", "plum/a.cr2", "berry/a.cr2", "berry/Thumbs.db"):
        (root / name).write_bytes(b"x")
    Image.new("RGB", (30, 20)).save(root / "plum" / "web.jfif", format="JPEG")
    assert main(["check", str(root), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["classes"] == {"berry": 6, "plum": 7} and report["wrong_extension"] == []
    assert [(one["ending"], one["files"]) for one in report["left_out"]] == [(".cr2", 2), ("thumbs.db", 1), ("._*", 1)]
    assert report["left_out"][0]["example"] == str(root / "berry" / "a.cr2")
    assert main(["check", str(root)]) == 0
    text = capsys.readouterr().out
    assert f"2 .cr2: a camera's raw file: export it as JPEG or TIFF ({root}/berry/a.cr2)" in text
    for folder in ("berry", "plum"):
        for path in (root / folder).glob("[0-9w]*"):
            path.unlink()
    assert main(["check", str(root)]) == 1
    assert "left out: 2 .cr2: a camera's raw file" in capsys.readouterr().out


def test_check_finds_contradicting_labels_in_both_halves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for half in ("train", "valid"):
        fruit(tmp_path / half, 1)
        for i, path in enumerate(sorted((tmp_path / half).rglob("*.jpg"))):
            Image.effect_noise((30 + i, 30), 90).convert("RGB").save(path)
    same = (tmp_path / "train" / "plum" / "00.jpg").read_bytes()
    (tmp_path / "valid" / "plum" / "same.jpg").write_bytes(same)
    assert main(["check", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["in_two_classes"] == [] and len(report["in_train_and_valid"]) == 1
    assert report["small_classes"] == {"train/berry": 1, "train/plum": 1, "valid/berry": 1, "valid/plum": 2}
    (tmp_path / "valid" / "berry" / "wrong.jpg").write_bytes(same)
    assert main(["check", str(tmp_path), "--json"]) == 0
    ((*paths,),) = json.loads(capsys.readouterr().out)["in_two_classes"]
    assert {Path(path).parent.name for path in paths} == {"berry", "plum"}


def test_check_of_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        path = write(tmp_path / name / "1.tif", deep("u2"))
    assert main(["check", str(tmp_path), "--all"]) == 0
    text = capsys.readouterr().out
    assert "lost without --scale percentile (2)" in text and f"{path} is 16-bit gray, 100 to 4,09" in text
