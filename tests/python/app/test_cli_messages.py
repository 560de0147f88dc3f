"""What commands print: no control characters, strict JSON, one clear line where something is wrong."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cnnrs
from cnnrs._util.json import dumps
from cnnrs._util.text import message
from cnnrs.app.cli import main
from fruit import fruit

ESCAPE = "\x1b[31m\x07\x9b2J\rred"


def is_printable(text: str) -> bool:
    return not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in text.replace("\n", ""))


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A folder below which every name drives the terminal; two photos of each class, one of them broken."""
    root = fruit(tmp_path / ESCAPE / f"photos {ESCAPE}", 2)
    for kind in ("berry", "plum"):
        photos = sorted((root / kind).iterdir())
        for i in range(4):
            (root / kind / f"{i} {ESCAPE}\nline.jpg").write_bytes(photos[0].read_bytes())
        (root / kind / f"bad {ESCAPE}\nline.jpg").write_bytes(b"no photo")
    return root


def test_train_with_names_that_drive_terminals(
    strange: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    above = strange.parent
    fixed = ["--backbone", "resnet18", "--weights", str(workplace / "weights.pth"), "--epochs", "1"]
    arguments = ["train", str(strange), *fixed, "--out", str(above / f"run {ESCAPE}")]
    assert main(arguments) == 2
    for more in ([], ["--json"]):
        assert main([*arguments, "--skip-bad", *more]) == 0
    out, err = capsys.readouterr()
    left_out = [line for line in out.splitlines() if line.startswith("left out ")]
    assert len(left_out) >= 2 and all(r"\x1b[31m\x07\x9b2J\rred\nline.jpg" in line for line in left_out)
    assert is_printable(out) and is_printable(err)

    store = above / "features"
    for action in ("info", "verify", "info"):
        main(["features", action, str(store)])
        main(["features", action, str(store), "--json"])
        # Once more with damage.
        for name in ("features.npy", "labels.npy", "meta.json"):
            for path in store.rglob(name):
                os.truncate(path, 10)
                main(["features", action, str(store)])
    main(["features", "clear", str(store)])
    for command in (["check", str(strange), "--all"], ["predict", str(above / f"run {ESCAPE}"), str(strange)]):
        main(command)
        main([*command, "--json"])
    out, err = capsys.readouterr()
    assert "Traceback" not in err and is_printable(out) and is_printable(err)


NAME = f"no {ESCAPE}\nsuch"


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", NAME], ["train", NAME], ["train", ".", "--valid", NAME], ["train", ".", "--backbone", NAME],
        ["train", ".", "--backbone", "resnet18", "--weights", NAME], ["train", ".", "--device", NAME],
        ["train", ".", "--out", f"fruit/{NAME}"], ["predict", NAME, NAME], ["features", "info", NAME],
        ["features", "verify", NAME], ["features", "clear", NAME], ["summary", NAME], ["bench", NAME],
        ["check", "fruit", NAME], ["check", "fruit", f"--{NAME}"], [NAME], ["train", "fruit", "--epochs", NAME],
        ["features", NAME, "."],
    ],
)  # fmt: skip
def test_wrong_names_are_repeated_harmlessly(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fruit(tmp_path / "fruit", 2)
    monkeypatch.chdir(tmp_path / "fruit")
    try:
        assert main(arguments) == 2
    except SystemExit as stop:
        assert stop.code == 2
    printed = capsys.readouterr().err
    assert "cnnrs" in printed and is_printable(printed) and "\nsuch" not in printed


def test_our_own_line_breaks_stay() -> None:
    assert message("a\nb\x1b\n  c\n") == "a\\nb\\x1b\n  c"


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", ""], ["train", ""], ["train", ".", "--out", ""], ["train", ".", "--features", ""],
        ["train", ".", "--valid", ""], ["train", ".", "--weights", ""], ["predict", "", "x"], ["predict", "x", ""],
        ["features", "clear", ""], ["summary", ""], ["bench", ""], ["check", "a\0b"],
    ],
)  # fmt: skip
def test_empty_names(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An empty variable in a script must not mean the current folder."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert f"cnnrs {arguments[0]}: error: argument " in capsys.readouterr().err


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "cpu:7", "cuda:99", "gpu", "", "cuda:x"])
def test_devices(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(fruit(tmp_path / "fruit", 2)), "--out", str(tmp_path / "run"), f"--device={device}"]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"cnnrs train: --device {device}: ") and printed.count("\n") == 1


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_strict_json() -> None:
    value = {"a": [math.nan, math.inf, (-math.inf, 1.5)], "b\x9b\u2028": "\x7f\x1b猫\udcff"}
    for encoding in ("utf-8", "ascii"):
        text = dumps(value, encoding)
        assert strict(text) == {"a": [None, None, [None, 1.5]], "b\x9b\u2028": "\x7f\x1b猫\udcff"}
        assert is_printable(text)


def test_a_run_without_numbers(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that are not finite: what is not a number is null, in every document."""
    run = cnnrs.load_run(workplace / "runs" / "fruit")
    with torch.no_grad():
        run.model.fc.weight.fill_(math.nan)
    run.facts["accuracy"] = math.nan
    run.save(tmp_path / "run")
    assert strict((tmp_path / "run" / "model.json").read_text())["accuracy"] is None
    assert main(["predict", str(tmp_path / "run"), str(workplace / "fruit" / "plum" / "03.jpg"), "--json"]) == 0
    assert [entry["probability"] for entry in strict(capsys.readouterr().out)] == [None]


@pytest.mark.parametrize(
    ("names", "goes"),
    [
        (["features.npy"], False),
        (["features.npy", "labels.npy"], False),
        (["features.npy", "labels.npy", "meta.json"], True),
        (["features.npy.partial", "features.journal"], True),
    ],
)
def test_clear_deletes_only_what_cnnrs_wrote(
    names: list[str], goes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert main(["features", "clear", str(tmp_path)]) == (0 if goes else 1)
    assert all((tmp_path / name).exists() for name in names) == (not goes)
    (tmp_path / "meta.json").parent.mkdir(exist_ok=True)
    for name in ("features.npy", "meta.json"):
        (tmp_path / name).write_text('{"author": "somebody"}')
    assert main(["features", "clear", str(tmp_path)]) == 1
    assert "delete it yourself" in capsys.readouterr().out


Do = Callable[[Path], object]


@pytest.mark.parametrize(
    "do",
    [
        lambda place: (place / "features.npy").write_bytes(b"\x93NUMPY\x01\0\xff"),
        lambda place: (place / "meta.json").write_text("[1]"),
    ],
)
def test_info_of_damaged_features(do: Do, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [(torch.rand(4, 3, 8, 8), torch.arange(4))]
    cnnrs.preconv(data, torch.nn.Flatten(), out=tmp_path / "x", verbose=False)
    do(tmp_path / "x")
    for action in ("info", "verify"):
        assert main(["features", action, str(tmp_path)]) == 1
        assert f"{tmp_path}/x: " in capsys.readouterr().out
