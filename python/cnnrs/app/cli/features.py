"""``cnnrs features``: stored features, looked at, checked or thrown away."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import cnnrs
from cnnrs._util.text import message, shown
from cnnrs._util.units import size
from cnnrs.app.cli.output import complain, print_json
from cnnrs.app.layout import need_folder
from cnnrs.features.store import is_ours


def run(options: argparse.Namespace) -> int:
    """Do the action; returns the exit code."""
    root: Path = options.folder
    need_folder(root, "a folder with features")
    stores = sorted({path.parent for name in ("features.npy", "features.npy.partial") for path in root.rglob(name)})
    if not stores:
        raise FileNotFoundError(f"{root} holds no features; preconv(..., out=folder) and cnnrs train write them")
    found = [{"info": _info, "verify": _verify, "clear": _clear}[options.action](folder) for folder in stores]
    if options.json:
        print_json(found)
    else:
        for entry in found:
            print(message(entry["text"]))
    return 0 if all(entry["ok"] for entry in found) else 1


def _info(folder: Path) -> dict[str, Any]:
    count = sum(path.stat().st_size for path in folder.iterdir() if is_ours(path.name))
    entry: dict[str, Any] = {"folder": str(folder), "bytes": count}
    try:
        features = cnnrs.load_features(folder, verify=False)
        per_class = _per_class(features)
    except Exception as error:
        # Files that somebody else has changed raise whatever their bytes happen to mean.
        reason = str(error) or type(error).__name__
        return {**entry, "ok": False, "text": f"{folder}: {size(count)}, not usable: {reason}", "error": reason}
    shape, dtype = tuple(features.features.shape), str(features.features.dtype).removeprefix("torch.")
    lines = ""
    if per_class is not None:
        entry["per_class"] = per_class
        listed = [f"{shown(name)} {number:,}" for name, number in per_class.items()]
        lines = f"\n  classes: {', '.join(listed[:8])}{f' and {len(listed) - 8} more' if len(listed) > 8 else ''}"
    text = f"{folder}: {shape[0]:,} rows of {' x '.join(map(str, shape[1:]))} {dtype}, {size(count)}{lines}"
    return {**entry, "ok": True, "rows": shape[0], "shape": shape, "dtype": dtype, "text": text}


def _per_class(features: cnnrs.Features) -> dict[str, int] | None:
    if not features.classes or features.labels.dtype != torch.int64 or features.labels.dim() != 1:
        return None
    counts = torch.bincount(features.labels, minlength=len(features.classes)).tolist()
    return dict(zip(features.classes, counts, strict=True))


def _verify(folder: Path) -> dict[str, Any]:
    entry = _info(folder)
    if not entry["ok"]:
        return entry
    try:
        features = cnnrs.load_features(folder)
    except Exception as error:
        reason = str(error) or type(error).__name__
        return {**entry, "ok": False, "error": reason, "text": f"{folder}: {reason}"}
    return {**entry, "text": f"{folder}: all {len(features):,} rows have their checksums"}


def _clear(folder: Path) -> dict[str, Any]:
    if not _is_a_store(folder):
        text = f"{folder} stays: nothing in it says that cnnrs has written its features.npy; delete it yourself"
        return {"folder": str(folder), "ok": False, "bytes": 0, "text": text, "error": text}
    count = 0
    for path in list(folder.iterdir()):
        if is_ours(path.name):
            count += path.stat().st_size
            path.unlink()
    try:
        folder.rmdir()
    except OSError:
        left = sorted(path.name for path in folder.iterdir())
        complain("features", f"{folder} stays: it holds {', '.join(left[:3])}")
    return {"folder": str(folder), "ok": True, "bytes": count, "text": f"{folder}: {size(count)} freed"}


def _is_a_store(folder: Path) -> bool:
    """Whether `features.npy` is ours to delete: others call their arrays so too."""
    if any((folder / name).exists() for name in ("features.npy.partial", "features.journal", "meta.json.pending")):
        return True
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError):
        # Damaged, and nobody else has all three.
        return (folder / "labels.npy").exists()
    return isinstance(meta, dict) and "format" in meta and "checksums" in meta
