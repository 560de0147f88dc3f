"""`import cnnrs` beside a missing, another or a broken torch: one readable ImportError, never a crash.

Each case runs in its own interpreter that sees a fake `torch` package first.
"""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import cnnrs

PACKAGE = Path(cnnrs.__file__).parent
NEEDED = next(
    match[1] for r in metadata.requires("cnnrs") or [] if (match := re.match(r"torch\s*==\s*([\d.]+)", r)) is not None
)


def import_cnnrs(path: Path, *flags: str, code: str = "import cnnrs") -> subprocess.CompletedProcess[str]:
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


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    # A signal (segmentation fault) would be negative.
    assert result.returncode == 1, (result.returncode, result.stderr)
    return result.stderr.strip().splitlines()[-1]


def fake_torch(folder: Path, version: str) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")


def without_torch(folder: Path) -> None:
    # As if nothing of that name were installed: the finder answers before site-packages does.
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )


def test_no_torch(tmp_path: Path) -> None:
    without_torch(tmp_path)
    line = last_line(import_cnnrs(tmp_path))
    assert line == (f"ImportError: cnnrs needs torch {NEEDED}, and torch is not installed: pip install torch=={NEEDED}")


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0+cpu", "1.13.1+cu117", "3.0.0.dev20260101"])
def test_torch_of_another_version(tmp_path: Path, version: str) -> None:
    fake_torch(tmp_path, version)
    line = last_line(import_cnnrs(tmp_path))
    assert line.startswith(f"ImportError: cnnrs was compiled for torch {NEEDED}, but torch {version} is installed")
    assert f"pip install torch=={NEEDED}" in line


@pytest.mark.parametrize("suffix", ["", "+cpu", "+cu130"])
def test_same_version_built_for_another_machine_passes_the_check(tmp_path: Path, suffix: str) -> None:
    fake_torch(tmp_path, NEEDED + suffix)
    # The check passes; the fake has no libraries, so linking fails next, and that is reported the same way.
    line = last_line(import_cnnrs(tmp_path))
    assert line.startswith(
        f"ImportError: cnnrs was compiled for torch {NEEDED}, but torch {NEEDED}{suffix} is installed"
    )
    assert re.search(r"\((.*cannot open shared object file.*|.*undefined symbol.*)\)$", line)


def test_undefined_symbol_is_explained(tmp_path: Path) -> None:
    code = (
        "import importlib, cnnrs._torch as guard\n"
        "def broken(name):\n"
        "    raise ImportError('_cnnrs.abi3.so: undefined symbol: _ZN2at4_ops3add4callE')\n"
        "guard.import_module = broken\n"
        "guard.load()\n"
    )
    line = last_line(import_cnnrs(tmp_path, code=code))
    assert f"compiled for torch {NEEDED}" in line
    assert "undefined symbol: _ZN2at4_ops3add4callE" in line


def test_a_bug_of_ours_is_not_blamed_on_torch(tmp_path: Path) -> None:
    code = (
        "import cnnrs._torch as guard\n"
        "def broken(name):\n"
        "    raise ImportError('cannot import name x')\n"
        "guard.import_module = broken\n"
        "guard.load()\n"
    )
    assert last_line(import_cnnrs(tmp_path, code=code)) == "ImportError: cannot import name x"


def test_missing_extension_says_how_to_build_it(tmp_path: Path) -> None:
    code = (
        "import cnnrs._torch as guard\n"
        "def missing(name):\n"
        "    raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "guard.import_module = missing\n"
        "guard.load()\n"
    )
    assert "make setup" in last_line(import_cnnrs(tmp_path, code=code))


def test_import_is_cheap(tmp_path: Path) -> None:
    # torchvision and matplotlib take a second each; nobody who only trains from features needs them.
    code = "import sys, cnnrs; print(*sorted({'torchvision', 'matplotlib', 'tqdm', 'torch.fx'} & set(sys.modules)))"
    result = import_cnnrs(tmp_path, code=code)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert not loaded & {"torchvision", "matplotlib"}


def test_import_without_source_tree_on_the_path(tmp_path: Path) -> None:
    result = import_cnnrs(tmp_path, code="import cnnrs; print(cnnrs._torch.required())")
    assert result.stdout.strip() == NEEDED, result.stderr
