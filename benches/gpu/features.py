"""`preconv` of VGG16: each stage alone, PyTorch tuned by hand, and the whole job in every form."""

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import loader_inputs
import torch
from frozen_peers import network
from measure import Contender
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

import cnnrs
from gpu import part
from gpu.by_hand import AUTOCAST, collected, compiler_is_missing, tuned
from gpu.closeness import Closeness
from gpu.inputs import fewer, many, on_device, resident, transform
from gpu.scale import Scale
from gpu.titles import CORES, DECODING, JOB, LARGE, PRECONV, RESIDENT, STAGES, WHOLE
from gpu.trial import Trial

PRECISIONS = ("exact", "tf32", "bf16", "fp16")
#: A round in float32 takes ten times as long as one in half precision.
FEWER = 4


def trials(scale: Scale) -> Iterator[Any]:
    """The most telling first: what comes last may find no time."""
    torch.manual_seed(0)
    model = network(f"{scale.backbone}.features").requires_grad_(False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = many(Path(scratch), scale.photos)
        few = fewer(folder, scale.photos // FEWER, Path(scratch) / "few")
        yield Trial(STAGES, "img/s", list(stages(scale, model, folder, Path(scratch))), scale.rounds)
        yield against_hand(scale, model, RESIDENT, resident(scale))
        yield against_hand(scale, model, WHOLE, None, folder)
        yield Closeness(scale, model, folder)
        yield Trial(LARGE, "img/s", list(large(scale, few, Path(scratch))), scale.rounds)
        for batch in reversed(scale.batches):
            title = f"{JOB}, batches of {batch}"
            yield Trial(
                title, "img/s", list(jobs(scale, model, folder, few, batch, Path(scratch))), min(2, scale.rounds)
            )


def stages(scale: Scale, model: nn.Module, folder: Path, scratch: Path) -> Iterator[Contender]:
    """The whole job, then all that it is made of, each with nothing beside it."""
    size = scale.batches[-1]
    data = cnnrs.ImageFolder(folder, transform(scale))
    main = on_device(scale, model)
    yield Contender(
        f"{PRECONV}, bf16, batches of {size}", partial(stored, data, main, scratch, batch_size=size, precision="bf16")
    )

    def epoch(loader: Any) -> Callable[[], int]:
        def run() -> int:
            count = sum(len(images) for images, _ in loader)
            scale.wait()
            return count

        return run

    bytes_only = cnnrs.ImageFolder(folder, transform(scale, PILToTensor()))
    yield Contender(f"photos to batches of bytes, {CORES} threads", epoch(cnnrs.DataLoader(bytes_only, size)))
    yield Contender(DECODING, epoch(cnnrs.DataLoader(data, size)))
    loader = cnnrs.DataLoader(data, size, device=scale.device)
    yield Contender(f"photos to normalised batches on the device, {CORES} threads", epoch(loader))

    pin = scale.device == "cuda"
    images = torch.zeros(size, 3, scale.pixels, scale.pixels, dtype=torch.uint8, pin_memory=pin)
    rows = model(torch.zeros(1, 3, scale.pixels, scale.pixels)).flatten(1).shape[1]
    features = torch.randn(size, rows, device=scale.device)
    host = torch.zeros(size, rows, pin_memory=pin)

    def times(work: Callable[[], object]) -> Callable[[], int]:
        def run() -> int:
            for _ in range(scale.resident):
                work()
            scale.wait()
            return scale.resident * size

        return run

    yield Contender("copy of bytes to the device", times(lambda: images.to(scale.device, non_blocking=True)))
    yield Contender("copy of float32 features to the host", times(lambda: host.copy_(features, non_blocking=True)))
    (batch, _), *_ = resident(scale)
    for precision in PRECISIONS:
        run = tuned(on_device(scale, model), scale, precision)
        yield Contender(f"forward, {precision}", times(lambda run=run: run(batch)))

    def write() -> int:
        with open(scratch / "rows", "wb", buffering=0) as file:
            for _ in range(scale.resident):
                file.write(host.numpy())
            os.fsync(file.fileno())
        return scale.resident * size

    yield Contender("float32 features to the disk", write)


def large(scale: Scale, source: Path, scratch: Path) -> Iterator[Contender]:
    """Large photos, decoded in every way that the device has."""
    folder, _ = loader_inputs.large(source, scratch / "large")
    data = cnnrs.ImageFolder(folder, transform(scale))
    # 32 photos are an epoch: several, so that reading ahead and its beginning do not decide.
    data.samples = data.samples * 8

    def epoch(decode: str) -> int:
        count = sum(len(images) for images, _ in cnnrs.DataLoader(data, 32, decode=decode, device=scale.device))
        scale.wait()
        return count

    for decode in ("exact", "scaled", "gpu"):
        # The rehearsal has nothing to decode with.
        yield Contender(f'decode="{decode}"', partial(epoch, decode if scale.device == "cuda" else "exact"))


def stored(data: Any, model: nn.Module, scratch: Path, **options: Any) -> int:
    """The whole job into a new folder."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        return len(cnnrs.preconv(data, model, Path(out) / "features", verbose=False, **options))


def against_hand(scale: Scale, model: nn.Module, work: str, batches: Any = None, folder: Path = Path()) -> Trial:
    """PyTorch tuned by hand in several ways, and ``preconv``, in bf16 and the main batch size; rows end on the CPU.

    Args:
        scale: of the run.
        model: the network on the CPU.
        work: title.
        batches: what both get; None: both load ``folder``, PyTorch by its own loader and by that of cnnrs.
        folder: of photos.
    """
    size = scale.batches[-1]
    ways: dict[str, dict[str, bool]] = {
        "autocast": {},
        "autocast, compiled": {"compiled": True},
        "weights cast, compiled": {"compiled": True, "cast": True},
    }
    notes = []
    if missing := compiler_is_missing(scale):
        notes.append(f"torch.compile: not run ({missing}).")
        ways = {"autocast": {}, "weights cast": {"cast": True}}
    networks = {name: tuned(on_device(scale, model), scale, "bf16", **way) for name, way in ways.items()}
    made: list[Contender] = []

    def by_hand(name: str, run: Any, loader: Any) -> None:
        made.append(Contender(f"PyTorch, {name}", lambda: len(collected(run, loader, scale.device))))

    data: Any = batches
    options: dict[str, Any] = {}
    if batches is not None:
        for name, run in networks.items():
            by_hand(name, run, batches)
    else:
        data, options = cnnrs.ImageFolder(folder, transform(scale)), {"batch_size": size}
        name, run = list(networks.items())[-1]
        theirs = ImageFolder(str(folder), transform(scale))
        pin = scale.device == "cuda"
        workers = DataLoader(theirs, size, num_workers=min(CORES, 16), pin_memory=pin, persistent_workers=True)
        by_hand(f"{name}, torch's DataLoader", run, workers)
        by_hand(f"{name}, cnnrs.DataLoader", run, cnnrs.DataLoader(data, size, device=scale.device))
    ours = on_device(scale, model)
    made.append(Contender(PRECONV, lambda: len(cnnrs.preconv(data, ours, precision="bf16", verbose=False, **options))))
    return Trial(work, "img/s", made, scale.rounds, notes=notes)


def jobs(scale: Scale, model: nn.Module, folder: Path, few: Path, batch: int, scratch: Path) -> Iterator[Contender]:
    """Every precision, kept as float32 and as what halves the bytes."""
    main = on_device(scale, model)
    all_of_them, some = (cnnrs.ImageFolder(place, transform(scale)) for place in (folder, few))
    for precision in reversed(PRECISIONS):
        data = all_of_them if precision in AUTOCAST else some
        for dtype in ("float32", "bfloat16" if precision == "bf16" else "float16"):
            options = {"batch_size": batch, "precision": precision, "dtype": dtype}
            yield Contender(f"{precision}, kept as {dtype}", partial(stored, data, main, scratch, **options))


if __name__ == "__main__":
    part.main("preconv", trials)
