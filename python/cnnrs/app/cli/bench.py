"""``cnnrs bench``: cnnrs beside torchvision's loader, and beside the plain training loop, in turn."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

import cnnrs
from cnnrs._util.progress import progress
from cnnrs.app.cli.options import ONE_PER_CLASS, need_folder
from cnnrs.app.cli.output import chatter, print_json

_MOST_PHOTOS = 300


def run(options: argparse.Namespace) -> int:
    """Measure; returns the exit code."""
    with ExitStack() as stack, chatter(options.json):
        if options.folder:
            need_folder(Path(options.folder), ONE_PER_CLASS)
        folder = options.folder or _generated(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        rows = [_loading(folder, options.threads, options.rounds), _training(options.rounds)]
    if options.json:
        print_json(rows)
        return 0
    for row in rows:
        print(f"{row['what']}\n  {row['baseline']:<42} {row['baseline_rate']:>9,.0f} {row['unit']}")
        print(f"  {'cnnrs':<42} {row['rate']:>9,.0f} {row['unit']}, {row['ratio']:.2f} times as fast")
    return 0


def _loading(folder: str | Path, threads: int | None, rounds: int) -> dict[str, Any]:
    transform = transforms.Compose(
        [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
    )
    ours: Any = cnnrs.ImageFolder(folder, transform)
    number = min(len(ours), _MOST_PHOTOS)
    chosen = torch.linspace(0, len(ours) - 1, number).long().tolist()
    workers = 0 if threads == 0 else threads or torch.get_num_threads()
    theirs = DataLoader(
        Subset(datasets.ImageFolder(str(folder), transform), chosen), batch_size=32, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    mine = cnnrs.DataLoader(Subset(ours, chosen), batch_size=32, num_workers=threads)
    text = f"loading {number} photos to normalised 224 x 224 batches of 32"
    return _compare(
        text, f"torchvision + DataLoader, {workers} workers", "images/s", number, rounds, _read(theirs), _read(mine)
    )


def _training(rounds: int, steps: int = 60) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(32, 1, 28, 28, generator=generator), torch.randint(10, (32,), generator=generator))
        for _ in range(steps)
    ]
    theirs, mine = cnnrs.models.MnistNet(), cnnrs.models.MnistNet()
    plain_optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.01)

    def plain() -> None:
        theirs.train()
        for images, labels in batches:
            plain_optimizer.zero_grad()
            loss = F.nll_loss(theirs(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            plain_optimizer.step()

    def compiled() -> None:
        cnnrs.fit(0, mine, batches, optimizer=optimizer, loss_fn=F.nll_loss, verbose=False)

    return _compare(
        f"training MnistNet, batches of 32, engine {cnnrs.explain(mine).engine!r}", "the loop in PyTorch", "images/s",
        32 * steps, rounds, plain, compiled,
    )  # fmt: skip


def _read(loader: Any) -> Callable[[], None]:
    def read() -> None:
        for _ in loader:
            pass

    return read


def _compare(
    what: str, baseline: str, unit: str, number: int, rounds: int, theirs: Callable[[], None], ours: Callable[[], None]
) -> dict[str, Any]:
    theirs()
    ours()
    seconds: list[tuple[float, float]] = []
    for _ in progress(range(rounds), what, unit="round"):
        seconds.append((_time(theirs), _time(ours)))
    return {
        "what": what, "baseline": baseline, "unit": unit, "rounds": rounds,
        "baseline_rate": number / statistics.median(t for t, _ in seconds),
        "rate": number / statistics.median(o for _, o in seconds),
        "ratio": statistics.median(t / o for t, o in seconds),
    }  # fmt: skip


def _time(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _generated(folder: Path, number: int = 200) -> Path:
    """Photos of noise on gradients, 0.15 megapixels each."""
    rng = np.random.default_rng(0)
    for i in range(number):
        place = folder / f"class{i % 2}"
        place.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((480, 320))
        coarse.save(place / f"{i}.jpg", quality=90)
    return folder
