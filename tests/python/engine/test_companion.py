"""The companion package missing, built for another torch or broken: never a crash, and cnnrs works without it."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

import cnnrs
from cnnrs.engine import companion
from interpreter import hide, output

pytestmark = pytest.mark.wheel
SOURCE = Path(__file__).resolve().parents[3] / "libtorch" / "python" / "cnnrs_libtorch" / "__init__.py"
TORCH = str(torch.__version__).split("+")[0]
TRAIN = """
import torch, cnnrs
from cnnrs.engine import companion
print(companion.problem())
def fit(engine):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    data = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))]
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.functional.cross_entropy
    return cnnrs.fit(0, model, data, "training", optimizer=step, loss_fn=loss, engine=engine)
fit("auto")
try:
    fit("torch")
except ImportError as error:
    print(error)
print("end")
"""


def install(folder: Path, extension: str | bytes | None, needed: str | None = TORCH) -> Path:
    """The companion's own Python half with another extension module, and the metadata that an installer writes."""
    package = folder / "cnnrs_libtorch"
    package.mkdir()
    (package / "__init__.py").write_bytes(SOURCE.read_bytes())
    if isinstance(extension, bytes):
        (package / "_libtorch.abi3.so").write_bytes(extension)
    elif extension is not None:
        (package / "_libtorch.py").write_text(extension)
    if needed is not None:
        info = folder / "cnnrs_libtorch-0.1.0.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.4\nName: cnnrs-libtorch\nVersion: 0.1.0\nRequires-Dist: torch=={needed}\n"
        (info / "METADATA").write_text(text)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is searched first, while no companion has been imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "cnnrs_libtorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    companion.libtorch.cache_clear()
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "cnnrs_libtorch"]:
        del sys.modules[name]
    companion.libtorch.cache_clear()


def loaded() -> ModuleType:
    module: ModuleType = import_module("cnnrs_libtorch").load()
    return module


def told(output: str) -> str:
    """What `companion.problem()` said, which asking for the engine repeats; the process went on behind it."""
    lines = [line for line in output.splitlines() if "cnnrs-libtorch" in line or line == "end"]
    problem, error, end = lines
    assert (error, end) == (problem, "end")
    return problem


def test_not_installed(tmp_path: Path) -> None:
    hide(tmp_path, "cnnrs_libtorch")
    message = told(output(tmp_path, TRAIN))
    assert "engine='torch' cannot be used: it needs the package cnnrs-libtorch, which is not installed; " in message
    assert f"torch {TORCH}" in message
    assert "engine='python' has the same bits" in message


def test_built_for_another_torch(tmp_path: Path) -> None:
    # What stands in the extension's place would end the process.
    install(tmp_path, "import os; os.abort()", needed="1.13.1")
    message = told(output(tmp_path, TRAIN))
    assert f"cnnrs-libtorch was compiled for torch 1.13.1, but torch {TORCH}" in message


def test_not_a_library(tmp_path: Path) -> None:
    install(tmp_path, b"\x7fELF and no more")
    result = output(tmp_path, TRAIN)
    assert "engine='torch' cannot be used: " in result
    assert "_libtorch.abi3.so: file too short" in result
    assert result.endswith("end\n")


@pytest.mark.parametrize(
    "detail",
    [
        "_libtorch.abi3.so: undefined symbol: _ZN2at4_ops3add4callE",
        "libtorch_cpu.so: cannot open shared object file: No such file or directory",
    ],
)
def test_another_build_of_the_same_version(place: Path, detail: str) -> None:
    install(place, f"raise ImportError({detail!r})")
    with pytest.raises(ImportError, match=re.escape(f"was compiled for torch {TORCH}, but torch {TORCH}")) as caught:
        loaded()
    assert f"({detail})" in str(caught.value)


def test_a_bug_of_ours_is_not_blamed_on_torch(place: Path) -> None:
    install(place, "raise ImportError('cannot import name x')")
    with pytest.raises(ImportError, match=r"^cannot import name x$"):
        loaded()


def test_missing_extension(place: Path) -> None:
    install(place, None)
    with pytest.raises(ImportError, match=r"cnnrs_libtorch\._libtorch is missing: install the wheel"):
        loaded()


@pytest.mark.parametrize("suffix", ["", "+cpu", "+cu130"])
def test_a_build_for_another_machine_is_the_same_version(
    place: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    install(place, f"__version__ = {cnnrs.__version__!r}\nname = 'it'", needed="2.13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0" + suffix)
    assert loaded().name == "it"
    assert companion.libtorch().name == "it"
    assert companion.problem() is None


def test_a_companion_of_another_cnnrs_is_not_taken(place: Path) -> None:
    install(place, "__version__ = '0.0.9'", needed=None)
    with pytest.raises(ImportError, match=rf"cnnrs-libtorch 0\.0\.9 belongs to another cnnrs than {cnnrs.__version__}"):
        companion.libtorch()


@pytest.mark.parametrize("version", ["2.13.1", "2.1", "2.13.0.dev20260101", "2.13.0a0+git1234567"])
def test_what_is_another_version(place: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(place, f"__version__ = {cnnrs.__version__!r}\nname = 'it'", needed="2.13.0")
    monkeypatch.setattr(torch, "__version__", version)
    problem = companion.problem()
    assert problem is not None and f"compiled for torch 2.13.0, but torch {version} is installed" in problem


def test_never_installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    install(place, "name = 'it'", needed=None)
    monkeypatch.setattr(metadata, "requires", none)
    assert import_module("cnnrs_libtorch").required() is None
    assert loaded().name == "it"


@pytest.mark.parametrize("version", companion.BUILT_FOR)
def test_says_how_to_build_it(place: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(place, "__version__ = '0.0.9'", needed=None)
    monkeypatch.setattr(torch, "__version__", version + "+cpu")
    assert f"make libtorch LIBTORCH={version} && pip install" in (companion.problem() or "")


def test_what_it_can_be_built_for_is_what_the_source_says() -> None:
    folder = SOURCE.parents[2]
    own = re.findall(r'dependencies = \["torch==([^"]+)"', (folder / "pyproject.toml").read_text())
    locks = [path.name.removeprefix("torch-").removesuffix(".lock") for path in (folder / "locks").iterdir()]
    assert sorted([*own, *locks]) == sorted(companion.BUILT_FOR)
