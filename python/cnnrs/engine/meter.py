"""The losses of an epoch, read some steps behind the device that computes them."""

from __future__ import annotations

import math
from typing import Any

import torch

from cnnrs.engine.losses import Totals, counts
from cnnrs.errors import NonFiniteLossError


class Meter:
    """Adds up an epoch's losses, one window behind the device.

    Args:
        where: phase and epoch, for messages.
        rows: float64 (window, 4): what :func:`~cnnrs.engine.losses.measured` found at the last steps, the latest last.
    """

    def __init__(self, where: str, rows: torch.Tensor) -> None:
        self.totals = Totals()
        self._where = where
        self._rows = rows
        self._sizes: list[int] = []
        self._pending: tuple[torch.Tensor, Any, list[int]] | None = None

    def expect(self, batches: int) -> None:
        """So many more are about to start: what their rows would push out is fetched."""
        if len(self._sizes) + batches > len(self._rows):
            self._look()

    def count(self, samples: int) -> None:
        """One more batch is under way."""
        self._sizes.append(samples)

    def close(self) -> None:
        """Wait for all of them."""
        if self._sizes:
            self._look()
        self._add_pending()

    def _look(self) -> None:
        on_gpu = self._rows.device.type == "cuda"
        steps = len(self._sizes)
        rows = torch.empty(steps, 4, dtype=torch.float64, pin_memory=on_gpu)
        rows.copy_(self._rows[-steps:], non_blocking=True)
        event = None
        if on_gpu:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._rows.device))
        # The device has this window to do while the host waits for the one before.
        self._add_pending()
        self._pending, self._sizes = (rows, event, self._sizes), []

    def _add_pending(self) -> None:
        if self._pending is None:
            return
        (rows, event, sizes), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        for row, samples in zip(rows, sizes, strict=True):
            self._add(*counts(row), samples)

    def _add(self, loss: float, weight: float, correct: int | None, counted: int, samples: int) -> None:
        so_far = self.totals
        if weight == 0 and counted > 0:
            loss = math.nan
        if not math.isfinite(loss):
            last = "none" if so_far.last is None else f"{so_far.last:.4f}"
            value = "NaN" if math.isnan(loss) else loss
            raise NonFiniteLossError(
                f"loss is {value} in {self._where}, batch {so_far.batches}; the last finite loss was {last}"
            )
        both = correct is not None and so_far.correct is not None
        self.totals = Totals(
            so_far.loss + loss,
            so_far.weight + weight,
            so_far.correct + correct if both else None,  # type: ignore[operator]
            so_far.counted + counted,
            so_far.samples + samples,
            so_far.batches + 1,
            loss / weight if weight else math.nan,
        )
