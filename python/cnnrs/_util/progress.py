"""Progress bars: on a terminal and in a notebook, silent in pipes and logs; and where the time of each step went."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from cnnrs._util.units import about

T = TypeVar("T")

# Who wants to know about the steps that run now; the innermost is last.
_listeners: list[list[Step]] = []
# A bar says how fast it goes, and what limits that, once there is something to measure.
_ENOUGH_SECONDS = 0.5
# Below this a bar says less than the words that could stand in its place.
_LEAST_BAR = 6
_LIMITS = {"reading": "limited by reading", "model": "limited by the network"}


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

    @property
    def rate(self) -> str:
        """Images per second, in words."""
        rate = self.samples / self.seconds if self.seconds else 0.0
        return f"{rate:,.{0 if rate >= 10 else 1}f} images/s"

    @property
    def limit(self) -> str:
        """The bottleneck in words."""
        return _LIMITS[self.bottleneck]

    def __str__(self) -> str:
        share = 100 * max(self.waiting, self.working) / self.seconds if self.seconds else 0.0
        return f"{self.rate}, {self.limit} ({share:.0f} % of the time)"


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
    """Iterate over ``items`` behind a bar that says images/s and what limits them; it disappears when it is done.

    Args:
        items: batches, or anything else that is counted one by one.
        description: what is done to them.
        unit: what one item is called; of anything but a "batch" no images are counted.
        verbose: whether there is a bar, on a terminal or in a notebook.
        samples: how many images there are in all, where ``items`` does not know its length: the bar then counts images.
    """
    step = Step(description)
    for listener in _listeners:
        listener.append(step)
    bar = None
    if verbose and is_shown():
        bar = _bar(step, samples or _length(items), unit)
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
    finally:
        if bar is not None:
            bar.close()


def _bar(step: Step, total: int | None, unit: str) -> Any:
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """Has room for as many words as the terminal is wide."""

        @property
        def format_dict(self) -> dict[str, Any]:
            found: dict[str, Any] = super().format_dict
            columns = found["ncols"] if isinstance(found["ncols"], int) else 120
            return {**found, "postfix": beside(step, self.n, total, columns, counts_images=unit == "batch")}

    units = "batches" if unit == "batch" else f"{unit}s"
    shape = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}" if total else f"{{desc}} {{n_fmt}} {units}{{postfix}}"
    return Bar(desc=step.name, unit=unit, leave=False, total=total, bar_format=shape, dynamic_ncols=True)


def beside(step: Step, done: int, total: int | None, columns: int, counts_images: bool = True) -> str:
    """What stands beside a bar: the rate, the time left, what limits; the first of these that fit.

    Args:
        step: what was measured so far.
        done: items that went by.
        total: of so many, None where nobody knows.
        columns: of the terminal.
        counts_images: whether items hold images.
    """
    if step.seconds < _ENOUGH_SECONDS or not done:
        return ""
    words = [step.rate] if counts_images else []
    if total:
        words.append(f"{about(step.seconds / done * max(total - done, 0))} left")
    if counts_images:
        words.append(step.limit)
    # "features |", "| 12/500", and ", " before each of the words.
    room = columns - len(step.name) - _LEAST_BAR - len(f" || {total}/{total}")
    while words and sum(len(word) + 2 for word in words) > room:
        words.pop()
    return ", ".join(words)


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
