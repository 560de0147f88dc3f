"""Every Python block of the READMEs runs, in order, one namespace per file, in a folder as the text describes it."""

import functools
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import WeightsEnum

from cnnrs.app.cli import main

ROOT = Path(__file__).resolve().parents[3]


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), flags=re.M | re.S)


@functools.cache
def vgg16() -> dict[str, torch.Tensor]:
    """Random numbers; 138 million of them take seconds, so they are drawn once."""
    return torchvision.models.vgg16(weights=None).state_dict()


@pytest.fixture
def cats_and_dogs(cat_and_dog: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `cat_and_dog` of noise, and random numbers where the weights would be downloaded."""

    def random_weights(self: WeightsEnum, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        assert self is torchvision.models.VGG16_Weights.IMAGENET1K_V1
        return vgg16()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", random_weights)
    return cat_and_dog


@pytest.mark.filterwarnings("ignore:dropout2d. Received a 2-D input")
@pytest.mark.parametrize(("name", "number"), [("README.md", 3), ("README.zh.md", 2)])
def test_examples_run(name: str, number: int, cats_and_dogs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(name)
    assert len(code) == number
    namespace: dict[str, object] = {}
    for block in code:
        exec(compile(block, name, "exec"), namespace)
    assert namespace["conv_feat"].shape == (8, 25088)  # type: ignore[attr-defined]
    assert (cats_and_dogs / "features" / "train" / "features.npy").exists()
    printed = capsys.readouterr().out
    assert len(re.findall(r"^training loss is", printed, flags=re.M)) == (5 if name == "README.md" else 3)


def commands(name: str) -> list[list[str]]:
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", (ROOT / name).read_text(), flags=re.M | re.S))
    return [shlex.split(line, comments=True) for line in re.findall(r"^cnnrs .*$", shell, flags=re.M)]


def test_commands_run(cats_and_dogs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("cat_and_dog/valid/cat", "holiday")
    lines = commands("README.md")
    assert [line[1] for line in lines] == ["check", "train", "predict"]
    # The same ones: that they run is seen once.
    assert commands("README.zh.md") == lines
    for line in lines:
        capsys.readouterr()
        assert main(line[1:]) == 0, line
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert Path("runs/pets/report.html").exists()


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


def test_links_lead_somewhere() -> None:
    for name in ("README.md", "README.zh.md"):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name} links to {target}"
