"""Look at stored features, check them, or throw them away.

DIR is a folder that preconv or cnnrs train wrote, or one that holds several of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import cnnrs
from cnnrs.cli.options import add_json, need_folder, print_json, size
from cnnrs.store import is_ours

EPILOG = """\
examples:
  cnnrs features info runs/features
  cnnrs features verify runs/features
  cnnrs features clear runs/features/pets-vgg16

exit codes: 0 all is well, 1 damaged or incomplete features, 2 it could not be done
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cnnrs features``."""
    parser.add_argument(
        "action", choices=["info", "verify", "clear"], metavar="ACTION",
        help="info: what is stored; verify: read all of it; clear: delete it, and nothing else",
    )  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="DIR", help="features, or a folder above them")
    add_json(parser)


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
            print(entry["text"])
    return 0 if all(entry["ok"] for entry in found) else 1


def _info(folder: Path) -> dict[str, Any]:
    count = sum(path.stat().st_size for path in folder.iterdir() if is_ours(path.name))
    entry: dict[str, Any] = {"folder": str(folder), "bytes": count}
    try:
        features = cnnrs.load_features(folder, verify=False)
    except (ValueError, OSError, KeyError) as error:
        return {**entry, "ok": False, "text": f"{folder}: {size(count)}, not usable: {error}", "error": str(error)}
    shape, dtype = tuple(features.features.shape), str(features.features.dtype).removeprefix("torch.")
    per_class = ""
    if features.classes and features.labels.dtype == torch.int64 and features.labels.dim() == 1:
        counts = torch.bincount(features.labels, minlength=len(features.classes)).tolist()
        entry["per_class"] = dict(zip(features.classes, counts, strict=True))
        listed = [f"{name} {number:,}" for name, number in entry["per_class"].items()]
        per_class = f"\n  classes: {', '.join(listed[:8])}{f' and {len(listed) - 8} more' if len(listed) > 8 else ''}"
    text = f"{folder}: {shape[0]:,} rows of {' x '.join(map(str, shape[1:]))} {dtype}, {size(count)}{per_class}"
    return {**entry, "ok": True, "rows": shape[0], "shape": shape, "dtype": dtype, "text": text}


def _verify(folder: Path) -> dict[str, Any]:
    entry = _info(folder)
    if not entry["ok"]:
        return entry
    try:
        features = cnnrs.load_features(folder)
    except (ValueError, OSError) as error:
        return {**entry, "ok": False, "error": str(error), "text": str(error)}
    return {**entry, "text": f"{folder}: all {len(features):,} rows have their checksums"}


def _clear(folder: Path) -> dict[str, Any]:
    count = 0
    for path in list(folder.iterdir()):
        if is_ours(path.name):
            count += path.stat().st_size
            path.unlink()
    try:
        folder.rmdir()
    except OSError:
        left = sorted(path.name for path in folder.iterdir())
        print(f"{folder} stays: it holds {', '.join(left[:3])}", file=sys.stderr)
    return {"folder": str(folder), "ok": True, "bytes": count, "text": f"{folder}: {size(count)} freed"}
