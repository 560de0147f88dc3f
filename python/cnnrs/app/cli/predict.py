"""``cnnrs predict``: class and probability of each photo."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from typing import Any

from cnnrs import _cnnrs
from cnnrs._util.text import Plain, left, shown, width
from cnnrs.app.cli.output import complain, print_json
from cnnrs.app.layout import PHOTOS
from cnnrs.classifier.run_folder import Prediction, load_run


def run(options: argparse.Namespace) -> int:
    """Predict; returns the exit code."""
    run = load_run(options.model)
    files = _files(options.paths)
    predictions, failed = run.predict(
        files, top_k=options.top_k, batch_size=options.batch_size, num_workers=options.threads
    )
    for path, reason in failed:
        complain("predict", shown(reason if path in reason else f"{path}: {reason}"))
    if options.json:
        print_json([_plain(one, options.top_k) for one in predictions])
    elif options.csv:
        _write_csv(predictions, options.top_k)
    else:
        names = [shown(one.path) for one in predictions]
        columns = max(map(width, names), default=0)
        for name, one in zip(names, predictions, strict=True):
            likely = "  ".join(
                f"{shown(kind)} {100 * p:.1f} %" for kind, p in zip(one.classes, one.probabilities, strict=True)
            )
            print(f"{left(name, columns)}  {likely}")
    return 1 if failed else 0


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
    every, seen = (_cnnrs.scan_folders([folder], [0], PHOTOS, hidden)[0] for hidden in (False, True))
    hidden = len(every) - len(seen)
    if hidden:
        visible = {path for path, _ in seen}
        first = next(path for path, _ in every if path not in visible)
        more = f"{hidden:,} hidden files are" if hidden > 1 else "1 hidden file is"
        complain("predict", f"note: {more} left out, as in training: {first}")
    if not seen:
        raise FileNotFoundError(f"{folder}: no photos in this folder ({', '.join(PHOTOS)})")
    return [path for path, _ in seen]


def _plain(one: Prediction, top_k: int) -> dict[str, Any]:
    plain: dict[str, Any] = {"path": one.path, "class": one.label, "probability": round(one.probability, 6)}
    if top_k > 1:
        plain["top"] = [
            {"class": name, "probability": round(p, 6)} for name, p in zip(one.classes, one.probabilities, strict=True)
        ]
    return plain


def _write_csv(predictions: list[Prediction], top_k: int) -> None:
    # Names as they are, whatever they hold.
    stream = sys.stdout.stream if isinstance(sys.stdout, Plain) else sys.stdout
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["path", "class", "probability"] if top_k == 1 else ["path", "rank", "class", "probability"])
    for one in predictions:
        for rank, (name, p) in enumerate(zip(one.classes, one.probabilities, strict=True), 1):
            writer.writerow([one.path, name, f"{p:.6f}"] if top_k == 1 else [one.path, rank, name, f"{p:.6f}"])
