"""What the compiled module links: torch's CPU libraries by name, nothing of CUDA, no path of the build machine."""

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import cnnrs._cnnrs
import cnnrs.cli

MODULE = Path(cnnrs._cnnrs.__file__)


@pytest.fixture(scope="module")
def dynamic() -> list[tuple[str, str]]:
    """The dynamic section as pairs, e.g. ``("NEEDED", "libc10.so")``."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    text = subprocess.run([readelf, "-dW", str(MODULE)], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\((NEEDED|RPATH|RUNPATH)\)[^\[]*\[([^\]]*)\]", text)


def test_links_torch_but_not_cuda(dynamic: list[tuple[str, str]]) -> None:
    needed = {name for tag, name in dynamic if tag == "NEEDED"}
    assert {"libtorch_cpu.so", "libc10.so"} <= needed
    cuda = {name for name in needed if re.match(r"lib(cuda|cudart|cudnn|cublas|nvrtc|torch_cuda|c10_cuda)", name)}
    assert not cuda


def test_links_no_python_and_no_jpeg_of_the_system(dynamic: list[tuple[str, str]]) -> None:
    # abi3: the interpreter provides its own symbols; libjpeg-turbo is inside, so decoding is the same everywhere.
    needed = {name for tag, name in dynamic if tag == "NEEDED"}
    assert not {name for name in needed if re.match(r"lib(python|jpeg|turbojpeg|png|webp)", name)}


def test_no_path_of_the_build_machine(dynamic: list[tuple[str, str]]) -> None:
    editable = MODULE.parents[2].joinpath("Cargo.toml").exists()
    if editable and shutil.which("patchelf"):
        pytest.skip(
            "where patchelf is installed, an editable build carries the path of its target folder; wheels do not"
        )
    paths = [path for tag, value in dynamic if tag in {"RPATH", "RUNPATH"} for path in value.split(":")]
    assert not [path for path in paths if path.startswith("/")]


def test_one_wheel_for_every_python() -> None:
    assert MODULE.name == "_cnnrs.abi3.so"


def test_metadata_pins_one_torch() -> None:
    requirements = metadata.requires("cnnrs") or []
    assert len([r for r in requirements if re.match(r"torch\s*==\s*\d+\.\d+\.\d+$", r)]) == 1
    assert metadata.metadata("cnnrs")["Requires-Python"] == ">=3.10"


def test_wheel_holds_the_package_and_nothing_else() -> None:
    root = Path(__file__).resolve().parents[2]
    if MODULE.is_relative_to(root / "python"):
        pytest.skip("this is the source tree; make test-wheel installs a wheel")
    files = {str(file) for file in metadata.files("cnnrs") or [] if "__pycache__" not in file.parts}
    ours = {file for file in files if file.startswith("cnnrs/")}
    source = root / "python"
    expected = {
        str(path.relative_to(source)) for path in (source / "cnnrs").rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }  # fmt: skip
    assert ours == expected | {"cnnrs/_cnnrs.abi3.so"}
    assert {"cnnrs/report/style.css", "cnnrs/py.typed", "cnnrs/cli/train.py"} <= ours
    # Beside it only metadata and the script: no tests, no photos.
    rest = files - ours
    assert all(file.startswith("cnnrs-") or Path(file).name == "cnnrs" for file in rest), rest


def test_command() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="cnnrs")
    assert script.load() is cnnrs.cli.main


def test_typed() -> None:
    assert (MODULE.parent / "py.typed").exists()
    assert (MODULE.parent / "_cnnrs.pyi").exists()
