"""What the compiled module links: the C library, nothing of torch, nothing of CUDA, no path of the build machine."""

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import cnnrs._cnnrs
import cnnrs.app.cli
from cnnrs._torch import LEAST

pytestmark = pytest.mark.wheel
MODULE = Path(cnnrs._cnnrs.__file__)
ROOT = Path(__file__).resolve().parents[3]
EDITABLE = MODULE.is_relative_to(ROOT / "python")
#: The C library by its parts (one since glibc 2.34), and the unwinder of the C compiler.
SYSTEM = re.compile(r"(libc|libm|libdl|libpthread|librt|libgcc_s|ld-linux-[a-z0-9-]+)\.so\.\d+")


def readelf(*flags: str) -> str:
    program = shutil.which("readelf")
    if program is None:
        pytest.skip("readelf is not installed")
    return subprocess.run([program, *flags, str(MODULE)], check=True, capture_output=True, text=True).stdout


def test_needs_nothing_but_the_system() -> None:
    # abi3: the interpreter provides its own symbols; libjpeg-turbo is inside, so decoding is the same everywhere.
    needed = re.findall(r"\(NEEDED\)[^\[]*\[([^\]]*)\]", readelf("-dW"))
    assert needed
    assert not [name for name in needed if not SYSTEM.fullmatch(name)]


def test_undefined_symbols_are_those_of_python_and_the_c_library() -> None:
    # Of torch they would be `at::`, `c10::` or `torch::`, mangled, or `THP...`.
    # What is weak may be missing, e.g. in an old C library.
    names = re.findall(r" GLOBAL +DEFAULT +UND (\S+)", readelf("--dyn-syms", "-W"))
    assert any(name.startswith("Py") for name in names)
    assert not [name for name in names if not re.match(r"_?Py|.*@(GLIBC|GCC)_", name)]


def test_no_path_of_the_build_machine() -> None:
    assert not re.findall(r"\((RPATH|RUNPATH)\)", readelf("-dW"))
    if not EDITABLE:
        module = MODULE.read_bytes()
        assert not [path for path in (str(ROOT), str(Path.home() / ".cargo")) if path.encode() in module]


def test_one_wheel_for_every_python_and_old_systems() -> None:
    assert MODULE.name == "_cnnrs.abi3.so"
    if EDITABLE:
        pytest.skip("this is the source tree; make test TORCH=2.13.0 installs the wheel")
    tags = re.findall(r"^Tag: (.*)$", metadata.distribution("cnnrs").read_text("WHEEL") or "", re.MULTILINE)
    assert tags and all(re.fullmatch(r"cp310-abi3-manylinux(2014|_2_17)_\w+", tag) for tag in tags), tags
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", readelf("-VW"))
    assert max((int(major), int(minor)) for major, minor in versions) <= (2, 17)


def test_metadata_takes_any_torch_from_the_least_on() -> None:
    requirements = metadata.requires("cnnrs") or []
    (torch,) = (r for r in requirements if re.match(r"torch\b", r))
    assert re.fullmatch(r"torch\s*>=\s*" + re.escape(".".join(map(str, LEAST))), torch)
    tested = [path.stem.removeprefix("torch-") for path in (ROOT / "requirements").glob("torch-*.txt")]
    assert min(tuple(map(int, version.split(".")[:2])) for version in tested) == LEAST
    (vision,) = (r for r in requirements if r.startswith("torchvision"))
    # No rule gives the number from torch's: the pair stands here.
    assert re.fullmatch(r"torchvision\s*>=\s*0\.19", vision)
    assert metadata.metadata("cnnrs")["Requires-Python"] == ">=3.10"


def test_wheel_holds_the_package_and_nothing_else() -> None:
    if EDITABLE:
        pytest.skip("this is the source tree; make test TORCH=2.13.0 installs the wheel")
    files = {str(file) for file in metadata.files("cnnrs") or [] if "__pycache__" not in file.parts}
    ours = {file for file in files if file.startswith("cnnrs/")}
    source = ROOT / "python"
    expected = {
        str(path.relative_to(source)) for path in (source / "cnnrs").rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }  # fmt: skip
    assert ours == expected | {"cnnrs/_cnnrs.abi3.so"}
    assert {
        "cnnrs/app/report/page.html",
        "cnnrs/app/report/style.css",
        "cnnrs/py.typed",
        "cnnrs/app/cli/train.py",
    } <= ours
    # Beside it only metadata and the script: no tests, no photos.
    rest = files - ours
    assert all(file.startswith("cnnrs-") or Path(file).name == "cnnrs" for file in rest), rest


def test_command() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="cnnrs")
    assert script.load() is cnnrs.app.cli.main


def test_typed() -> None:
    assert (MODULE.parent / "py.typed").exists()
    assert (MODULE.parent / "_cnnrs.pyi").exists()
