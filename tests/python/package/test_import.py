"""`import cnnrs` without torch, beside an old, a new or a crippled one: it works or is one readable ImportError."""

import importlib
from pathlib import Path

import pytest
import torch

from cnnrs import _torch
from interpreter import PACKAGE, hide, last_line, output, run

pytestmark = pytest.mark.wheel
LEAST = ".".join(map(str, _torch.LEAST))


def test_no_torch(tmp_path: Path) -> None:
    hide(tmp_path, "torch")
    line = last_line(run(tmp_path))
    assert line == (
        f"ImportError: cnnrs needs torch {LEAST} or newer, and torch is not installed: pip install torch torchvision"
    )


def test_too_old(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '1.13.1+cu117'\n")
    line = last_line(run(tmp_path))
    assert line == (
        f"ImportError: cnnrs needs torch {LEAST} or newer, but torch 1.13.1+cu117 is installed: "
        "pip install --upgrade torch torchvision"
    )


def test_too_old_is_seen_without_loading_it(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('loaded')\n")
    (tmp_path / "torch" / "version.py").write_text("__all__ = ['__version__']\n__version__ = '1.13.1+cu117'\n")
    assert "but torch 1.13.1+cu117 is installed" in last_line(run(tmp_path))


@pytest.mark.parametrize("version", ["2.3.1", "2.0.0+cpu", "1.13.1"])
def test_which_are_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs torch {LEAST} or newer, but torch .* is installed"):
        _torch.load()


@pytest.mark.parametrize(
    "version",
    [LEAST, f"{LEAST}.1+cpu", "2.10.0", "2.15.0+cu130", "2.16.0.dev20261101+cpu", "3.0.0a0+git1234567", "10.0"],
)
def test_any_newer_one_will_do(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert _torch.load().__name__ == "cnnrs._cnnrs"


def test_the_extension_knows_no_torch(tmp_path: Path) -> None:
    hide(tmp_path, "torch")
    (extension,) = PACKAGE.glob("_cnnrs.*so")
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_cnnrs', {str(extension)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.__version__, 'torch' in sys.modules)\n"
    )
    assert output(tmp_path, code).split() == [importlib.import_module("cnnrs").__version__, "False"]


def test_import_is_cheap_and_torch_may_come_after(tmp_path: Path) -> None:
    # torch, torchvision and matplotlib take a second each: they are loaded by what needs them.
    code = (
        "import sys, cnnrs\n"
        "print(*sorted({'torch', 'numpy', 'torchvision', 'matplotlib'} & set(sys.modules)))\n"
        "import torch\n"
        "model = torch.nn.Linear(3, 2)\n"
        "data = cnnrs.DataLoader(torch.utils.data.TensorDataset(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])), 2)\n"
        "step = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "loss, _ = cnnrs.fit(0, model, data, 'training', optimizer=step, loss_fn=torch.nn.functional.cross_entropy)\n"
        "print('trained', loss)\n"
    )
    loaded, *printed = output(tmp_path, code).splitlines()
    assert loaded == "" and "trained" in "\n".join(printed)


def test_no_numpy(tmp_path: Path) -> None:
    hide(tmp_path, "numpy")
    line = last_line(run(tmp_path))
    assert line == "ModuleNotFoundError: No module named 'numpy'"


def test_a_bug_of_ours_is_not_blamed_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("cannot import name x")

    monkeypatch.setattr(_torch, "import_module", broken)
    with pytest.raises(ImportError, match=r"^cannot import name x$"):
        _torch.load()


def test_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_torch, "import_module", missing)
    with pytest.raises(ImportError, match=r"cnnrs\._cnnrs is missing: install the wheel, or run `make setup`"):
        _torch.load()
