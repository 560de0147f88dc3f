"""JSON that every parser reads, of numbers and names of any kind."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any


def dumps(value: Any, encoding: str = "utf-8") -> str:
    """An indented document; NaN and infinities, which JSON does not have, are null.

    Names are in plain characters where ``encoding`` has them, escaped otherwise, as control characters always are.

    >>> print(dumps([float("nan"), "猫", chr(0x9B)]).replace(chr(92), "/"))
    [
     null,
     "猫",
     "/u009b"
    ]
    """
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        # A name may be no UTF-8 either; escaped, it comes back as it was.
        return json.dumps(_finite(value), indent=1, allow_nan=False)
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Zl", "Zp") and c != "\n" else c for c in text)


def _escaped(character: str) -> str:
    # Below space there are only line breaks of the layout, the others json has escaped itself.
    return f"\\u{ord(character):04x}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value
