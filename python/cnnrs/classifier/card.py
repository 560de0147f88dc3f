"""``model.json``, the card of a run: what it may say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any

from cnnrs._cnnrs import __version__
from cnnrs.classifier.heads import Preprocessing
from cnnrs.classifier.names import CARD, HEADS, NOVELTY
from cnnrs.data.read_options import ReadOptions

#: Version of ``model.json``; another number is not read.
FORMAT = 1
KEYS = ("format", "backbone", "head", "dropout", "classes", "transform")
#: What a card may say beside; cards of earlier versions do not.
MORE = ("options", "read", "multilabel", "novelty", "neighbours")


def read_card(folder: Path) -> dict[str, Any]:
    """What ``model.json`` says.

    Raises:
        FileNotFoundError: the folder is no run.
        ValueError: it is damaged or in another format.
    """
    if not folder.is_dir():
        kind = "is a file; a folder that cnnrs train made is wanted" if folder.exists() else "there is no such folder"
        raise FileNotFoundError(f"{folder}: {kind}")
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        runs = sorted(str(path.parent) for path in folder.glob(f"*/{CARD}"))
        hint = f"there is one in {', '.join(runs[:3])}" if runs else f"cnnrs train --out {folder} makes one"
        raise FileNotFoundError(f"{folder} holds no trained model (no {CARD}): {hint}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CARD} is damaged ({error}); train again") from error
    if not isinstance(card, dict) or type(card.get("format")) is not int or card["format"] != FORMAT:
        found = card.get("format") if isinstance(card, dict) else None
        raise ValueError(
            f"{folder / CARD} is in format {found}, this cnnrs {__version__} reads format {FORMAT}: "
            "use the cnnrs that wrote it, or train again"
        )
    if missing := [name for name in KEYS if name not in card]:
        raise ValueError(f"{folder / CARD} is damaged: it lacks {', '.join(missing)}; train again")
    for name, (is_right, wanted) in _CHECKS.items():
        if name in card and not is_right(card[name]):
            raise ValueError(
                f"{folder / CARD} is damaged: {name} is {repr(card[name])[:80]}, not {wanted}; train again"
            )
    return card


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 2**53) or (isinstance(value, float) and isfinite(value))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) == len({n for n in value if isinstance(n, str)})


def _is_transform(value: Any) -> bool:
    from torchvision.transforms import InterpolationMode

    if not isinstance(value, dict) or set(value) != {one.name for one in fields(Preprocessing)}:
        return False
    sides = all(type(value[name]) is int and value[name] > 0 for name in ("resize", "crop"))
    channels = all(
        isinstance(value[name], list) and len(value[name]) == 3 and all(map(_is_number, value[name]))
        for name in ("mean", "std")
    )
    known = value["interpolation"] in [one.value for one in InterpolationMode]
    return sides and channels and all(value["std"]) and known


def _is_read(value: Any) -> bool:
    try:
        ReadOptions(**value)
    except (TypeError, ValueError):
        return False
    return True


def _is_shape(value: Any) -> bool:
    counts = ("rows", "width", "classes", "k")
    return (
        isinstance(value, dict)
        and set(value) == {*counts, "several", "dtype"}
        and all(type(value[name]) is int and value[name] > 0 for name in counts)
        and isinstance(value["several"], bool)
        and value["dtype"] in ("float16", "float32")
    )


# What `json` makes of a card that nobody has touched.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "backbone": (lambda value: isinstance(value, str), "the name of a network"),
    "head": (lambda value: value in HEADS, f"one of {', '.join(HEADS)}"),
    "dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "classes": (_are_names, "a list of different names"),
    "transform": (_is_transform, "the numbers of a preprocessing"),
    "options": (lambda value: isinstance(value, dict), "the options of a network"),
    "read": (_is_read, "how files are read, as arguments of a DataLoader"),
    "multilabel": (lambda value: isinstance(value, bool), "true or false"),
    "novelty": (lambda value: value == NOVELTY, f"the name of a file, {NOVELTY}"),
    "neighbours": (_is_shape, "the shape of rows that vote"),
}
