"""Any torch from a least version on, checked before the extension is loaded: a mismatch is one readable ImportError.

Torch itself is not loaded here, because that takes a second: ``cnnrs --help`` does not need it.
"""

import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

#: The oldest torch that passes the tests.
LEAST = (2, 4)


def load() -> ModuleType:
    """Load ``cnnrs._cnnrs``.

    Returns:
        The extension module.

    Raises:
        ImportError: torch is missing or too old, NumPy is missing, or the extension was not built.
    """
    _check_torch()
    # Without it half of cnnrs would fail at its first use.
    if "numpy" not in sys.modules and _place("numpy") is None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")
    try:
        return import_module("cnnrs._cnnrs")
    except ModuleNotFoundError:
        raise ImportError(
            "the compiled module cnnrs._cnnrs is missing: install the wheel, or run `make setup` in the source tree"
        ) from None


def _check_torch() -> None:
    least = ".".join(map(str, LEAST))
    found = _version()
    if found is None:
        raise ImportError(
            f"cnnrs needs torch {least} or newer, and torch is not installed: pip install torch torchvision",
            name="torch",
        )
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if numbers < LEAST:
        raise ImportError(
            f"cnnrs needs torch {least} or newer, but torch {found} is installed: "
            "pip install --upgrade torch torchvision",
            name="torch",
        )


def _version() -> str | None:
    """As torch says or, where it is not loaded yet, the file that its build writes; None without torch."""
    if "torch" not in sys.modules:
        place = _place("torch")
        if place is None:
            return None
        try:
            match = re.search(r"^__version__ = '([^']+)'", (place / "version.py").read_text(), flags=re.M)
        except OSError:
            match = None
        if match is not None:
            return match[1]
    import torch

    return str(torch.__version__)


def _place(package: str) -> Path | None:
    """The folder of an installed package; None without one."""
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent
