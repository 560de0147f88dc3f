"""Every Python block of the READMEs runs, in order, one namespace per file, in a folder as the text describes it."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import WeightsEnum

from cnnrs.cli import main

ROOT = Path(__file__).resolve().parents[2]


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), flags=re.M | re.S)


@pytest.fixture
def cats_and_dogs(cat_and_dog: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `cat_and_dog` of noise, and random numbers where the weights would be downloaded."""

    def random_weights(self: WeightsEnum, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        assert self is torchvision.models.VGG16_Weights.IMAGENET1K_V1
        return torchvision.models.vgg16(weights=None).state_dict()

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


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_commands_run(name: str, cats_and_dogs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("cat_and_dog/valid/cat", "holiday")
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", (ROOT / name).read_text(), flags=re.M | re.S))
    lines = re.findall(r"^cnnrs .*$", shell, flags=re.M)
    assert [line.split()[1] for line in lines] == ["check", "train", "predict"]
    for line in lines:
        capsys.readouterr()
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
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
