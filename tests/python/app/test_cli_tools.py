"""`cnnrs features`, `summary`, `info` and `bench`."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models import ResNet18_Weights

import cnnrs
from cnnrs.app.cli import main
from cnnrs.engine import companion
from fruit import fruit


def test_features(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    folder = cnnrs.ImageFolder(workplace / "fruit", ResNet18_Weights.DEFAULT.transforms())
    cnnrs.preconv(cnnrs.DataLoader(folder, batch_size=8), torch.nn.AvgPool2d(56), out=store, verbose=False)
    assert main(["features", "info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "40 rows of 3 x 4 x 4 float32" in text and "berry 20, plum 20" in text
    assert main(["features", "verify", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["ok"] is True

    with open(store / "features.npy", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32("nan").tobytes())
    assert main(["features", "verify", str(store)]) == 1
    assert "row" in capsys.readouterr().out

    (store / "notes.txt").write_text("mine")
    assert main(["features", "clear", str(store)]) == 0
    assert [path.name for path in store.iterdir()] == ["notes.txt"]
    assert main(["features", "info", str(store)]) == 2
    assert "holds no features" in capsys.readouterr().err


def test_features_clear_removes_the_folder(tmp_path: Path) -> None:
    folder = cnnrs.ImageFolder(fruit(tmp_path / "fruit", 2), torchvision.transforms.ToTensor())
    cnnrs.preconv(cnnrs.DataLoader(folder), torch.nn.AvgPool2d(10), out=tmp_path / "store", verbose=False)
    assert main(["features", "clear", str(tmp_path)]) == 0
    assert not (tmp_path / "store").exists() and (tmp_path / "fruit").exists()


def test_summary(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "vgg16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 138_357_544
    assert main(["summary", "MnistNet"]) == 0
    assert "21,840 parameters" in capsys.readouterr().out
    assert main(["summary", str(workplace / "runs" / "fruit"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][-1]["output_shape"] == [1, 2]
    assert main(["summary", "MnistNet", "--size", "9"]) == 2
    assert "MnistNet cannot take images of 9 x 9" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch build"] == torch.__version__
    engines = facts["engines"]
    assert engines["python"] == engines["cpu"] == "usable" and engines["auto"].startswith("usable; picks ")
    assert engines["torch"] == ("usable" if companion.problem() is None else f"not here: {companion.problem()}")
    # The wheel and this tree are built with libjpeg-turbo's private headers.
    assert facts["images"]["JPEG"] == "libjpeg-turbo with the entropy decoder of cnnrs"
    assert main(["info"]) == 0
    assert f"cnnrs        {cnnrs.__version__}" in capsys.readouterr().out


def test_bench(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "bench",
                str(workplace / "fruit"),
                "--rounds",
                "1",
                "--threads",
                "0",
                "--json",
                "--backbone",
                "squeezenet1_1",
            ]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    names = [[one["name"] for one in row["contenders"]] for row in rows]
    assert names[0] == ["torchvision + DataLoader, 0 workers", "cnnrs, inline"]
    assert names[1] == ["torch eager", "torch eager, channels_last", "cnnrs.preconv"]
    assert names[2] == ["the loop in PyTorch", "cnnrs.fit, engine cpu"]
    for row in rows:
        *others, ours = (one["rate"] for one in row["contenders"])
        # One round: the ratio of the medians is the median of the ratios, and there is no spread.
        assert row["ratio"] == pytest.approx(ours / max(others))
        assert row["ratio_smallest"] == row["ratio_largest"] == row["ratio"]
