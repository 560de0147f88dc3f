"""``cnnrs bench``: reading, features and training on the user's photos, beside torchvision and PyTorch, in turn."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets

import cnnrs
from cnnrs._util.progress import progress
from cnnrs._util.text import shown
from cnnrs.app.cli.output import chatter, print_json
from cnnrs.app.layout import ONE_PER_CLASS, need_folder
from cnnrs.classifier.heads import Preprocessing

_READING_SECONDS = 3.0
_FEATURE_PHOTOS = 64
_TRAINING_PHOTOS = 96
# What `cnnrs train` does to a photo for most networks.
_TRANSFORM = Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def run(options: argparse.Namespace) -> int:
    """Measure; returns the exit code."""
    with ExitStack() as stack, chatter(options.json):
        if options.folder:
            need_folder(Path(options.folder), ONE_PER_CLASS)
        folder = options.folder or _generated(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        name = shown(Path(folder).resolve().name) if options.folder else "generated ones"
        ours: Any = cnnrs.ImageFolder(folder, _TRANSFORM.transform())
        rows = [
            _reading(folder, ours, name, options.threads, options.rounds),
            _features(ours, options.backbone, options.rounds),
            _training(ours, options.rounds),
        ]
    if options.json:
        print_json(rows)
        return 0
    for row in rows:
        print(row["what"])
        for one in row["contenders"]:
            spread = f"({one['smallest']:,.0f} to {one['largest']:,.0f})"
            print(f"  {one['name']:<38} {one['rate']:>8,.0f} images/s {spread:>19}")
        low, high = row["ratio_smallest"], row["ratio_largest"]
        print(f"  cnnrs is {row['ratio']:.2f} times as fast as the best of the others ({low:.2f} to {high:.2f})\n")
    print(f"median of {options.rounds} rounds (smallest to largest); the ratio is that of single rounds, on the CPU")
    return 0


# -- what is measured ----------------------------------------------------------------------------------------


def _reading(folder: str | Path, ours: Any, name: str, threads: int | None, rounds: int) -> dict[str, Any]:
    theirs: Any = datasets.ImageFolder(str(folder), ours.transform)
    chosen = _spread(len(ours), _photos_for(theirs))
    workers = threads or torch.get_num_threads()
    contenders = {
        f"torchvision + DataLoader, {number} workers": _read(
            # Workers start anew with every pass, as they do by default.
            DataLoader(Subset(theirs, chosen), batch_size=32, num_workers=number)
        )
        for number in ((0,) if threads == 0 else (0, workers))
    }
    mine = "inline" if threads == 0 else f"{workers} threads"
    loader = cnnrs.DataLoader(Subset(ours, chosen), batch_size=32, num_workers=threads)
    contenders[f"cnnrs, {mine}"] = _read(loader)
    what = f"reading {len(chosen):,} of {len(ours):,} photos ({name}) to normalised 224 x 224 batches of 32"
    return _compare(what, len(chosen), contenders, rounds)


def _photos_for(theirs: Any, first: int = 32) -> int:
    """So many photos that torchvision reads them in a few seconds."""
    first = min(first, len(theirs))
    start = time.perf_counter()
    for i in _spread(len(theirs), first):
        theirs[i]
    seconds = (time.perf_counter() - start) / first
    return max(first, round(_READING_SECONDS / max(seconds, 1e-6)))


def _features(ours: Any, backbone: str, rounds: int) -> dict[str, Any]:
    """Speed does not depend on weights: random ones need no download."""
    batches = _batches(ours, _FEATURE_PHOTOS, 8)
    plain = cnnrs.backbone(backbone, weights=None).eval()
    last = cnnrs.backbone(backbone, weights=None).eval().to(memory_format=torch.channels_last)
    mine = cnnrs.freeze(cnnrs.backbone(backbone, weights=None))

    def eager(model: nn.Module, memory_format: torch.memory_format) -> Callable[[], None]:
        given = [images.to(memory_format=memory_format) for images, _ in batches]

        def run() -> None:
            with torch.inference_mode():
                for images in given:
                    model(images)

        return run

    number = sum(len(labels) for _, labels in batches)
    contenders = {
        "torch eager": eager(plain, torch.contiguous_format),
        "torch eager, channels_last": eager(last, torch.channels_last),
        "cnnrs.preconv": lambda: cnnrs.preconv(batches, mine, verbose=False),
    }
    return _compare(f"features of {number} of these photos from {backbone}, batches of 8", number, contenders, rounds)


def _training(ours: Any, rounds: int) -> dict[str, Any]:
    batches = _batches(ours, _TRAINING_PHOTOS, 32)
    classes = max(len(ours.classes), 2)
    theirs, mine = (cnnrs.replace_head(cnnrs.models.CatDogNet(), classes) for _ in range(2))
    their_optimizer, my_optimizer = (torch.optim.SGD(model.parameters(), lr=0.01) for model in (theirs, mine))

    def plain() -> None:
        theirs.train()
        for images, labels in batches:
            their_optimizer.zero_grad()
            loss = F.nll_loss(theirs(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            their_optimizer.step()

    def compiled() -> None:
        cnnrs.fit(0, mine, batches, optimizer=my_optimizer, loss_fn=F.nll_loss, verbose=False)

    number = sum(len(labels) for _, labels in batches)
    contenders = {"the loop in PyTorch": plain, f"cnnrs.fit, engine {cnnrs.explain(mine).engine}": compiled}
    return _compare(f"training CatDogNet on {number} of these photos, batches of 32", number, contenders, rounds)


# -- how it is measured --------------------------------------------------------------------------------------


def _compare(what: str, number: int, contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """All once for warmth, then in turn, so that a busy minute hits all alike; the last one is ours."""
    for work in contenders.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in progress(range(rounds), what.split(" ", 1)[0], unit="round"):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    *others, ours = seconds.values()
    ratios = [min(theirs) / mine for *theirs, mine in zip(*others, ours, strict=True)]
    return {
        "what": what, "unit": "images/s", "rounds": rounds,
        "contenders": [{"name": name, **_rates(number, taken)} for name, taken in seconds.items()],
        "ratio": statistics.median(ratios), "ratio_smallest": min(ratios), "ratio_largest": max(ratios),
    }  # fmt: skip


def _rates(number: int, seconds: Iterable[float]) -> dict[str, float]:
    rates = [number / one for one in seconds]
    return {"rate": statistics.median(rates), "smallest": min(rates), "largest": max(rates)}


def _read(loader: Any) -> Callable[[], None]:
    def read() -> None:
        for _ in loader:
            pass

    return read


def _spread(length: int, number: int) -> list[int]:
    """So many of 0 to ``length`` - 1, evenly."""
    return torch.linspace(0, length - 1, min(number, length)).long().tolist()


def _batches(dataset: Any, number: int, size: int) -> Batches:
    chosen = Subset(dataset, _spread(len(dataset), number))
    return [(images.clone(), labels.clone()) for images, labels in cnnrs.DataLoader(chosen, batch_size=size)]


def _generated(folder: Path, number: int = 200) -> Path:
    """Photos of noise on gradients, 0.15 megapixels each."""
    rng = np.random.default_rng(0)
    for i in range(number):
        place = folder / f"class{i % 2}"
        place.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((480, 320))
        coarse.save(place / f"{i}.jpg", quality=90)
    return folder
