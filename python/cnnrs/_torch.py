"""The one torch this extension was compiled for, checked before the extension is loaded.

The C++ interface of torch changes between versions: an extension loaded beside another torch ends in an
"undefined symbol" or a segmentation fault. So ``import cnnrs`` calls `load` first, and a mismatch is one readable
ImportError. The version that is needed stands in the metadata of the installed distribution (``torch==...``).
"""

import re
from importlib import import_module, metadata
from types import ModuleType


def required() -> str | None:
    """The torch version this distribution declares, e.g. ``"2.13.0"``; None in a tree that was never installed."""
    try:
        requirements = metadata.requires("cnnrs") or []
    except metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        match = re.match(r"torch\s*\(?==\s*([^\s;,)]+)", requirement)
        if match:
            return match[1]
    return None


def load() -> ModuleType:
    """Load ``cnnrs._cnnrs`` beside the torch it was compiled for.

    Returns:
        The extension module.

    Raises:
        ImportError: torch is missing, has another version, or the extension cannot be linked with it.
    """
    needed = required()
    found = _import_torch(needed)
    # "2.13.0+cpu" and "2.13.0+cu130" are the same version, built for different machines.
    if needed is not None and found.split("+")[0] != needed:
        raise _mismatch(needed, found) from None
    try:
        return import_module("cnnrs._cnnrs")
    except ModuleNotFoundError:
        raise ImportError(
            "the compiled module cnnrs._cnnrs is missing: install the wheel, or run `make setup` in the source tree"
        ) from None
    except ImportError as error:
        # A torch of the right name with other contents, e.g. a nightly or a build of one's own.
        if "undefined symbol" not in str(error) and "cannot open shared object" not in str(error):
            raise
        raise _mismatch(needed, found, detail=str(error)) from None


def _import_torch(needed: str | None) -> str:
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        version = f" {needed}" if needed else ""
        raise ImportError(
            f"cnnrs needs torch{version}, and torch is not installed: {_advice(needed)}", name="torch"
        ) from None
    return str(torch.__version__)


def _mismatch(needed: str | None, found: str, detail: str = "") -> ImportError:
    compiled = f"torch {needed}" if needed else "another torch"
    text = f"cnnrs was compiled for {compiled}, but torch {found} is installed: {_advice(needed)}"
    if needed:
        text += f", or install a cnnrs wheel built for torch {found.split('+')[0]}"
    return ImportError(f"{text} ({detail})" if detail else text, name="torch")


def _advice(needed: str | None) -> str:
    return f"pip install torch=={needed}" if needed else "rebuild cnnrs beside the installed torch (make setup)"
