"""The companion package ``cnnrs-libtorch``: engine ``torch``, built for exactly one torch, found by import."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from cnnrs import _cnnrs
from cnnrs.model.lowering import Lowered

#: The versions of torch that its source can be built for.
BUILT_FOR = ("2.11.0", "2.13.0")


@cache
def libtorch() -> Any:
    """The companion's extension module.

    Raises:
        ImportError: it is not installed, or built for another torch; the message says what to do.
    """
    try:
        import cnnrs_libtorch
    except ModuleNotFoundError as error:
        if error.name != "cnnrs_libtorch":
            raise
        raise _unusable("it needs the package cnnrs-libtorch, which is not installed") from None
    try:
        module = cnnrs_libtorch.load()
    except ImportError as error:
        raise _unusable(str(error)) from None
    if module.__version__ != _cnnrs.__version__:
        raise _unusable(f"cnnrs-libtorch {module.__version__} belongs to another cnnrs than {_cnnrs.__version__}")
    return module


def _unusable(why: str) -> ImportError:
    found = str(torch.__version__).split("+")[0]
    if found in BUILT_FOR:
        build = f"make libtorch LIBTORCH={found} && pip install dist/libtorch-{found}/*.whl"
        what = f"to build it for torch {found}, in a clone of cnnrs: {build}"
    else:
        what = f"it can be built for torch {' and '.join(BUILT_FOR)}, not for torch {found}"
    instead = "engine='python' has the same bits on the CPU and runs beside any torch"
    return ImportError(f"engine='torch' cannot be used: {why}; {what}; {instead}", name="cnnrs_libtorch")


def graph(lowered: Lowered) -> Any:
    """A lowered model as the companion's own graph."""
    return libtorch().Graph(lowered.operations, lowered.output, [list(t.shape) for t in lowered.tensors])


def network(lowered: Lowered) -> Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]:
    """What computes a lowered model for one batch through libtorch, with autograd behind it where Python has it on."""
    forward, compiled = libtorch().forward, graph(lowered)
    return lambda tensors, inputs: forward(compiled, tensors, inputs)


def problem() -> str | None:
    """Why engine ``torch`` cannot be used here; None where it can."""
    try:
        libtorch()
    except ImportError as error:
        return str(error)
    return None
