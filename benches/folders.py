"""Around the loader: scanning large folders, later epochs from a cache, time to the first batch, memory over epochs."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import loader_inputs
from loader import BATCH, THREADS, TUTORIAL, epoch
from measure import Comparison, Contender, show
from torchvision.datasets import ImageFolder

import cnnrs

CLASSES = 100
# What a data set of all files of a folder adds to a process, and what 100 epochs add.
SCAN = """
import sys
from {module} import ImageFolder
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
dataset = ImageFolder(sys.argv[1])
print((resident() - before) / len(dataset))
"""
EPOCHS = """
import json, sys
import cnnrs
from torchvision import transforms
resize = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
loader = cnnrs.DataLoader(cnnrs.ImageFolder(sys.argv[1], resize), 32, shuffle=True, num_workers=2)
seen = {}
for epoch in range(1, 101):
    for images, labels in loader:
        pass
    if epoch in (1, 2, 10, 50, 100):
        pages = int(open("/proc/self/statm").read().split()[1])
        seen[epoch] = pages * 4096 / 2**20
print(json.dumps(seen))
"""


@dataclass
class Told(Comparison):
    """A comparison with a sentence behind the table."""

    last: Callable[[], str] = lambda: ""

    def table(self) -> str:
        """The table and the sentence."""
        return f"{super().table()}\n{self.last()}\n"


def comparisons() -> Iterator[Comparison]:
    """Scans of 100,000 and 1,000,000 files; caches; memory."""
    scratch = Path(tempfile.mkdtemp(prefix="cnnrs-bench-"))
    for count, rounds in ((100_000, 7), (1_000_000, 3)):
        root = scratch / str(count)
        make_tree(root, count)
        made = [
            Contender("torchvision.datasets.ImageFolder", lambda root=root: len(ImageFolder(root))),
            Contender("cnnrs.ImageFolder", lambda root=root: len(cnnrs.ImageFolder(root))),
            Contender(f"os.scandir alone, {THREADS} threads", lambda root=root: list_all(root)),
        ]
        work = f"Scanning {count:,} files in {CLASSES} folders"
        yield Told(work, "files/s", made, rounds, last=lambda root=root: scan_memory(root))
        shutil.rmtree(root)
    folder, kind = loader_inputs.photos(scratch)
    dataset = cnnrs.ImageFolder(folder, TUTORIAL)
    caches: list[tuple[str, str | Path]] = [('"ram"', "ram"), ("<folder>", scratch / "cache")]
    made = [Contender("without a cache", epoch(cnnrs.DataLoader(dataset, BATCH, num_workers=THREADS)))]
    for name, place in caches:
        loader = cnnrs.DataLoader(dataset, BATCH, num_workers=THREADS, cache=place)
        made.append(Contender(f"cache={name}, from the second epoch on", epoch(loader)))
    yield Told(f"Later epochs: {kind}", "img/s", made, last=lambda: first_batches(dataset) + epochs_memory(folder))


def make_tree(root: Path, count: int) -> None:
    """Empty files with the names of photos."""
    for number in range(CLASSES):
        folder = root / f"class_{number:03}"
        folder.mkdir(parents=True)
        for i in range(count // CLASSES):
            os.close(os.open(folder / f"photo_{i:07}.jpg", os.O_CREAT | os.O_WRONLY))


def list_all(root: Path) -> int:
    """What the operating system needs at least, from Python."""
    with ThreadPoolExecutor(THREADS) as threads:
        names = threads.map(lambda folder: [entry.name for entry in os.scandir(folder)], os.scandir(root))
        return sum(len(folder) for folder in names)


def scan_memory(root: Path) -> str:
    """Bytes per file, in fresh processes."""
    figures = {module: float(python(SCAN.format(module=module), root)) for module in ("torchvision.datasets", "cnnrs")}
    theirs, ours = figures.values()
    return f"Memory per file: {ours:.0f} bytes, torchvision {theirs:.0f}."


def first_batches(dataset: cnnrs.ImageFolder) -> str:
    """How long after `iter` the first batch is there, in later epochs."""
    loader = cnnrs.DataLoader(dataset, BATCH, shuffle=True, num_workers=THREADS)
    waits = []
    for _ in range(21):
        start = time.perf_counter()
        next(iter(loader))
        waits.append(1000 * (time.perf_counter() - start))
    return (
        f"First batch of a later epoch, without a cache: {show(statistics.median(waits[1:]))} ms "
        f"({show(min(waits[1:]))} to {show(max(waits[1:]))}, n = 20), of which {BATCH} images take most. "
    )


def epochs_memory(folder: Path) -> str:
    """The resident set over 100 epochs, in a fresh process."""
    seen = json.loads(python(EPOCHS, folder))
    return "Resident memory behind epoch " + ", ".join(f"{n}: {mib:.0f} MiB" for n, mib in seen.items()) + "."


def python(code: str, folder: Path) -> str:
    """What a new interpreter prints."""
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
