"""``cnnrs predict``: class and probability of each photo."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from cnnrs._util.text import Plain, left, shown, width
from cnnrs.app.cli.output import complain, print_json
from cnnrs.app.cli.sort_photos import SortedCopies
from cnnrs.classifier.predictions import Prediction
from cnnrs.classifier.run_folder import load_run
from cnnrs.data.photos import left_out, photo_extensions, scan_photos


def run(options: argparse.Namespace) -> int:
    """Predict; returns the exit code."""
    run = load_run(options.model)
    copies = None
    if options.sort_into is not None:
        SortedCopies.check(options.sort_into, options.paths)
        copies = SortedCopies(options.sort_into, run.classes, run.multilabel)
    found = run.predict(
        _files(options.paths), top_k=options.top_k, unknown=options.unknown, batch_size=options.batch_size,
        num_workers=options.threads,
    )  # fmt: skip
    for path, reason in found.unreadable:
        complain("predict", shown(reason if path in reason else f"{path}: {reason}"))
    places = [] if copies is None else [copies.add(one) for one in found.predictions]
    if options.json:
        plain = [_plain(one) for one in found.predictions]
        print_json([{**one, "copies": names} for one, names in zip(plain, places, strict=True)] if places else plain)
    elif options.csv:
        # Names as they are, whatever they hold.
        found.to_csv(sys.stdout.stream if isinstance(sys.stdout, Plain) else sys.stdout)
    else:
        _print(found.predictions)
    if copies is not None:
        for photo, place in copies.renamed:
            complain("predict", shown(f"note: another photo had the name of {photo}, it is {place}"))
        complain("predict", shown(f"note: {len(places):,} photos are copied into {options.sort_into}"))
    return 1 if found.unreadable else 0


def _print(predictions: list[Prediction]) -> None:
    names = [shown(one.path) for one in predictions]
    columns = max(map(width, names), default=0)
    for name, one in zip(names, predictions, strict=True):
        likely = "  ".join(
            f"{shown(kind)} {100 * p:.1f} %" for kind, p in zip(one.classes, one.probabilities, strict=True)
        )
        print(f"{left(name, columns)}  {f'unknown (if anything, {likely})' if one.unknown else likely}")


def _files(paths: list[str]) -> list[str]:
    """The files themselves, and the photos inside folders, in a stable order."""
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            found += _inside(path)
        elif os.path.lexists(path):
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: there is no such file or folder")
    return list(dict.fromkeys(found))


def _inside(folder: str) -> list[str]:
    # Whether it may be opened at all: the scan takes other folders for empty.
    os.scandir(folder).close()
    photos, _ = scan_photos([folder])
    for one in left_out(folder):
        complain("predict", f"note: left out, as in training: {one}")
    if not photos:
        raise FileNotFoundError(f"{folder}: no photos in this folder ({', '.join(photo_extensions())})")
    return photos


def _plain(one: Prediction) -> dict[str, Any]:
    plain: dict[str, Any] = {"path": one.path, "class": one.label, "probability": round(one.probability, 6)}
    if one.novelty is not None:
        plain |= {"novelty": round(one.novelty, 6), "unknown": one.unknown}
    if len(one.classes) > 1:
        plain["top"] = [
            {"class": name, "probability": round(p, 6)} for name, p in zip(one.classes, one.probabilities, strict=True)
        ]
    return plain
