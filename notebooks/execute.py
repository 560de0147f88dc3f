"""Run notebooks from top to bottom and keep their outputs.

``python notebooks/execute.py 02 PHOTOS=cat_and_dog EPOCHS=6``: those whose names begin with 02, all without a name.
NAME=VALUE replaces the value that the cell tagged "parameters" gives; the notebook itself keeps its own.
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


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


def main() -> None:
    """Execute the notebooks whose names begin as the arguments do, all without."""
    names = [argument for argument in sys.argv[1:] if "=" not in argument]
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    for path in sorted(HERE.glob("*.ipynb")):
        if names and not path.name.startswith(tuple(names)):
            continue
        text = path.read_text(encoding="utf-8")
        values = {name: _value(value) for name, value in given.items() if f"{name} = " in text}
        print(path.name, values, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder), **values)
        for cell in notebook.cells:
            # Other people's photos are not ours to publish.
            if "photos" in cell.metadata.get("tags", []):
                cell.outputs = []
        nbformat.write(notebook, path)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    main()
