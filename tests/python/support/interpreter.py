"""Code in an interpreter of its own, which sees other packages than this one does."""

import os
import subprocess
import sys
from pathlib import Path

import cnnrs

PACKAGE = Path(cnnrs.__file__).parent


def run(path: Path, *flags: str, code: str = "import cnnrs") -> "subprocess.CompletedProcess[str]":
    """Run `code` with `path` first on the search path, then the cnnrs under test."""
    search = os.pathsep.join([str(path), str(PACKAGE.parent)])
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        env={**os.environ, "PYTHONPATH": search},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def output(path: Path, code: str) -> str:
    result = run(path, code=code)
    assert result.returncode == 0, result.stderr
    return result.stdout


def last_line(result: "subprocess.CompletedProcess[str]") -> str:
    """The exception's line."""
    # A signal (segmentation fault) would be negative.
    assert result.returncode == 1, (result.returncode, result.stderr)
    return result.stderr.strip().splitlines()[-1]


def hide(folder: Path, package: str) -> None:
    """As if nothing of that name were installed: the finder answers before site-packages does."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
