"""Whether a folder holds features of another model, which nobody has said may go."""

from __future__ import annotations

import os
import re
from itertools import count
from typing import Any

from torch import nn

from cnnrs.features.store import FORMAT, Store
from cnnrs.model.backbone import Backbone


def name_of(model: nn.Module) -> str:
    """What a model is called where its features are kept."""
    return (model.name if isinstance(model, Backbone) else "") or type(model).__name__


def check_model(store: Store, meta: dict[str, Any] | None, network: str, key: str) -> None:
    """That computing anew throws away no features of another model, complete or not.

    Args:
        store: the folder.
        meta: what its ``meta.json`` says, None where there is none.
        network: what the model is called.
        key: the hash of what it computes, "" when that cannot be told.

    Raises:
        FileExistsError: it would; says what is there, and proposes another folder.
    """
    if meta is not None:
        if meta.get("format") != FORMAT:
            return
        held, rows = meta, meta["shape"][0]
    else:
        journal = store.journal()
        if journal is None or store.partial_layout() is None:
            return
        held, rows = journal.header, sum(number for _, number, _, _ in journal.runs)
    its_key, its_name = (held.get("key") or {}).get("model", ""), held.get("network")
    is_another = its_key != key if its_key and key else its_name not in (None, network)
    if not is_another or not rows:
        return
    other = "other weights or code" if its_name in (None, network) else network
    raise FileExistsError(
        f"{store.folder} holds {rows:,} rows of {its_name or 'another model'}, which {other} would replace: give "
        f"out={_free(store, network)!r}, or overwrite=True to throw them away"
    )


def _free(store: Store, network: str) -> str:
    """A folder beside it that is not there yet."""
    short = re.sub(r"[^\w.]+", "-", network.partition(" (")[0]).strip("-").lower()
    names = (f"{store.folder}-{short}{'' if number == 1 else f'-{number}'}" for number in count(1))
    return next(name for name in names if not os.path.lexists(name))
