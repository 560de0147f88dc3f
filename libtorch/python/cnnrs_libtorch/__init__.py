"""Engine ``torch`` of cnnrs, built for exactly one torch: `load` checks which one before the extension is loaded.

The C++ interface of torch changes between versions: an extension loaded beside another torch ends in an
"undefined symbol" or a segmentation fault. The version that is needed stands in the metadata of the installed
distribution (``torch==...``).
"""

import re
from importlib import import_module, metadata
from types import ModuleType

import torch


def required() -> str | None:
    """The torch version this distribution declares, e.g. ``"2.13.0"``; None in a tree that was never installed."""
    try:
        requirements = metadata.requires("cnnrs-libtorch") or []
    except metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        match = re.match(r"torch\s*\(?==\s*([^\s;,)]+)", requirement)
        if match:
            return match[1]
    return None


def load() -> ModuleType:
    """Load the extension beside the torch it was compiled for.

    Returns:
        The extension module: ``fit``, ``forward``, ``Graph``, ``NativeOptimizer``.

    Raises:
        ImportError: torch has another version, or the extension cannot be linked with it.
    """
    needed, found = required(), str(torch.__version__)
    # "2.13.0+cpu" and "2.13.0+cu130" are the same version, built for different machines.
    if needed is not None and found.split("+")[0] != needed:
        raise _mismatch(needed, found)
    try:
        return import_module("cnnrs_libtorch._libtorch")
    except ModuleNotFoundError:
        raise ImportError("the compiled module cnnrs_libtorch._libtorch is missing: install the wheel") from None
    except ImportError as error:
        # A torch of the right name with other contents, e.g. a nightly or a build of one's own.
        if "undefined symbol" not in str(error) and "cannot open shared object" not in str(error):
            raise
        raise _mismatch(needed, found, detail=str(error)) from None


def _mismatch(needed: str | None, found: str, detail: str = "") -> ImportError:
    compiled = f"torch {needed}" if needed else "another torch"
    text = f"cnnrs-libtorch was compiled for {compiled}, but torch {found} is installed"
    return ImportError(f"{text} ({detail})" if detail else text, name="torch")
