"""Any torch from a least version on, checked before the extension is loaded: a mismatch is one readable ImportError."""

import re
from importlib import import_module
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
    import numpy  # noqa: F401

    try:
        return import_module("cnnrs._cnnrs")
    except ModuleNotFoundError:
        raise ImportError(
            "the compiled module cnnrs._cnnrs is missing: install the wheel, or run `make setup` in the source tree"
        ) from None


def _check_torch() -> None:
    least = ".".join(map(str, LEAST))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"cnnrs needs torch {least} or newer, and torch is not installed: pip install torch torchvision",
            name="torch",
        ) from None
    found = str(torch.__version__)
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if numbers < LEAST:
        raise ImportError(
            f"cnnrs needs torch {least} or newer, but torch {found} is installed: "
            "pip install --upgrade torch torchvision",
            name="torch",
        )
