"""Progress bars: on a terminal and in a notebook, silent in pipes and logs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], description: str, unit: str = "batch", verbose: bool = True) -> Iterator[T]:
    """Iterate over ``items`` behind a bar that disappears when it is done."""
    if not (verbose and is_shown()):
        return iter(items)
    from tqdm.auto import tqdm

    bar: Any = tqdm(items, desc=description, unit=unit, leave=False, total=_length(items))
    return iter(bar)


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
