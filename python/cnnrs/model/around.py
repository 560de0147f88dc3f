"""What has been switched on around a call: state of torch that a plain loop obeys without naming it."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What an enclosing ``torch.autocast`` computes in on this device, None without one."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def global_hooks() -> bool:
    """Whether hooks of all modules are registered."""
    of: Any = torch.nn.modules.module
    # torch has a function for it since 2.5.
    return any(
        (
            of._global_forward_pre_hooks,
            of._global_forward_hooks,
            of._global_backward_pre_hooks,
            of._global_backward_hooks,
        )
    )


def unseen_by_libtorch() -> list[str]:
    """Modes that only Python's side of torch obeys: the user's module must be called."""
    modes = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]  # type: ignore[no-untyped-call]
    return [f"the mode {type(mode).__name__} is on" for mode in modes]


def unseen_by_cpu() -> list[str]:
    """Modes that only libtorch's kernels obey."""
    reasons = [f"the mode {type(mode).__name__} is on" for mode in _get_current_dispatch_mode_stack()]
    if torch.is_anomaly_enabled():
        reasons.append("anomaly detection is on, and it has no autograd")
    return reasons


def check_gradients_are_on() -> None:
    """Training where the plain loop's ``backward`` would fail is refused before anything has changed.

    Raises:
        RuntimeError: inside ``torch.no_grad()`` or ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        name = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise RuntimeError(
            f"training inside torch.{name}(), where a loss does not require grad and does not have a grad_fn: call fit "
            "outside of it, or phase='validation'"
        )
