"""Progress bars: on a terminal and in a notebook, silent in pipes and logs; and where the time of each step went."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

# Who wants to know about the steps that run now; the innermost is last.
_listeners: list[list[Step]] = []
# A bar says what it waits for once there is something to measure.
_ENOUGH_SECONDS = 0.5


@dataclass
class Step:
    """One pass over batches.

    Attributes:
        name: what the bar says, "features" or "training epoch 3".
        samples: how many images, or rows, went by.
        waiting: seconds spent waiting for the next batch: reading and decoding that nothing hides.
        working: seconds the consumer took: the model.
    """

    name: str
    samples: int = 0
    waiting: float = 0.0
    working: float = 0.0

    @property
    def seconds(self) -> float:
        """Waiting and working."""
        return self.waiting + self.working

    @property
    def bottleneck(self) -> str:
        """What more threads or a faster disk ("reading"), or a faster model ("model") would shorten."""
        return "reading" if self.waiting > self.working else "model"

    def __str__(self) -> str:
        rate = self.samples / self.seconds if self.seconds else 0.0
        share = 100 * max(self.waiting, self.working) / self.seconds if self.seconds else 0.0
        digits = 0 if rate >= 10 else 1
        return f"{rate:,.{digits}f} images/s, {share:.0f} % of the time is {self.bottleneck}"


@contextmanager
def steps() -> Iterator[list[Step]]:
    """The steps that begin inside the block, in order, as they go."""
    found: list[Step] = []
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners.remove(found)


def progress(
    items: Iterable[T], description: str, unit: str = "batch", verbose: bool = True, samples: int | None = None
) -> Iterator[T]:
    """Iterate over ``items`` behind a bar that says images/s and what it waits for; it disappears when it is done.

    Args:
        items: batches.
        description: what is done to them.
        unit: what one item is called.
        verbose: whether there is a bar, on a terminal or in a notebook.
        samples: how many images there are in all, where ``items`` does not know its length: the bar then counts images.
    """
    step = Step(description)
    for listener in _listeners:
        listener.append(step)
    bar = None
    if verbose and is_shown():
        bar = _bar(description, "image", samples) if samples else _bar(description, unit, _length(items))
    if bar is None and not _listeners:
        return iter(items)
    return _timed(iter(items), step, bar, bool(samples))


def _timed(items: Iterator[T], step: Step, bar: Any, by_sample: bool) -> Iterator[T]:
    try:
        before = time.perf_counter()
        for item in items:
            there = time.perf_counter()
            step.waiting += there - before
            yield item
            before = time.perf_counter()
            step.working += before - there
            size = _size(item)
            step.samples += size
            if bar is not None:
                bar.update(size if by_sample else 1)
                if step.seconds > _ENOUGH_SECONDS:
                    bar.set_postfix_str(str(step), refresh=False)
    finally:
        if bar is not None:
            bar.close()


def _bar(description: str, unit: str, total: int | None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(desc=description, unit=unit, leave=False, total=total)


def _size(item: Any) -> int:
    try:
        return len(item[0])
    except (TypeError, IndexError, KeyError):
        return 1


def is_shown() -> bool:
    """Whether there is somebody to see a bar."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _length(items: Iterable[Any]) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None
