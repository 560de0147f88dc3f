"""Operations for which the host waits for a device: forbidden in a step that is recorded as a CUDA graph.

``no_host_waits()`` finds them on any device, also in tensors on the CPU, whose operations are mostly the same. Copies
from device to host and back are no others than copies there: ``fake_cuda`` finds those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: How large the result is, or what the host does next, depends on numbers on the device.
WAITS = {
    "aten::_local_scalar_dense": "item(), bool(), int() or float()",
    "aten::is_nonzero": "bool()",
    "aten::equal": "torch.equal",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::_unique2": "unique",
    "aten::bincount": "bincount",
    "aten::histc": "histc",
    "aten::_linalg_check_errors": "a check of linalg",
    "aten::_assert_scalar": "an assertion",
    "aten::_to_sparse": "to_sparse",
    "aten::_ctc_loss": "ctc_loss",
}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


class HostWait(RuntimeError):
    """The host waits for the device where it must not."""


def why(func: Any, args: Any, kwargs: Any) -> str:
    """Why the host waits for this operation's numbers; "" where it need not."""
    name = func._schema.name
    if name in WAITS:
        return WAITS[name]
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size"
    if name in INDEXED and any(
        isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1])
    ):
        return "an index of booleans"
    return ""


class _NoHostWaits(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reason := why(func, args, kwargs or {}):
            raise HostWait(f"the host waits for the device: {reason} ({func._schema.name})")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_waits() -> Iterator[None]:
    """Inside, an operation for which the host would wait for a device is an error.

    Raises:
        HostWait: at the operation.
    """
    with _NoHostWaits():
        yield
