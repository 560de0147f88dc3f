"""Image folders and MNIST files to normalised batches: torchvision and torch's DataLoader and peers against cnnrs."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loader_inputs
import torch
import torchvision
from measure import Comparison, Contender, show
from mnist_files import mnist
from torchvision import transforms

import cnnrs

REPOSITORY = Path(__file__).resolve().parents[1]
PEERS_PYTHON = REPOSITORY / ".bench-venv" / "bin" / "python"
PEERS = [
    "DALI, antialias",
    "DALI, no antialias (other pixels)",
    "SPDL",
    "datago (crops)",
    "torchcodec + torchvision v2",
]
BATCH = 32
THREADS = min(2, len(os.sched_getaffinity(0)))
TORCHVISION = [f"torchvision + DataLoader, {workers} workers" for workers in (0, 2)]
DECODING = f"decoding alone, {THREADS} threads"
OURS = f"cnnrs, {THREADS} threads"
TUTORIAL = transforms.Compose(
    [
        transforms.Resize((224, 224)),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)
DIGITS = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])


@dataclass
class LoaderComparison(Comparison):
    """A comparison that ends in what matters: against the better torchvision, and against decoding alone."""

    stages: Callable[[], str] = lambda: ""
    notes: list[str] = field(default_factory=list)

    def table(self) -> str:
        """The table of all contenders and what follows from it, from ratios within single rounds."""
        by_name = {contender.name: contender for contender in self.contenders}
        ours = by_name[OURS].seconds
        better = [min(seconds) for seconds in zip(*(by_name[name].seconds for name in TORCHVISION), strict=True)]
        ratios = [a / b for a, b in zip(better, ours, strict=True)]
        lines = [
            f"cnnrs is {statistics.median(ratios):.2f} times as fast as the better of torchvision's two "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        ]
        if DECODING in by_name:
            shares = [a / b for a, b in zip(by_name[DECODING].seconds, ours, strict=True)]
            lines[0] += f" and reaches {100 * statistics.median(shares):.0f} % of decoding alone with libjpeg-turbo"
        lines[0] += "."
        return "\n".join([super().table(), *lines, *self.notes, self.stages(), ""])


def comparisons() -> Iterator[Comparison]:
    """Photos as they are, of ImageNet's size, and large; digits."""
    scratch = Path(tempfile.mkdtemp(prefix="cnnrs-bench-"))
    folder, kind = loader_inputs.photos(scratch)
    yield images(folder, kind)
    yield images(*loader_inputs.imagenet_like(folder, scratch / "imagenet"))
    yield images(*loader_inputs.large(folder, scratch / "large"), peers=False, scaled=True)
    digits = mnist(scratch / "mnist")
    theirs, ours = torchvision.datasets.MNIST(digits, transform=DIGITS), cnnrs.MNIST(digits, transform=DIGITS)
    work = f"Loading: 60,000 MNIST digits (IDX files) to normalised batches of {BATCH}"
    yield LoaderComparison(work, "img/s", contenders(theirs, ours), rounds=3)


def images(folder: Path, kind: str, peers: bool = True, scaled: bool = False) -> LoaderComparison:
    """One folder of photos, all contenders."""
    ours = cnnrs.ImageFolder(folder, TUTORIAL)
    made = contenders(torchvision.datasets.ImageFolder(folder, TUTORIAL), ours)
    if scaled:
        loader = cnnrs.DataLoader(ours, BATCH, num_workers=THREADS, decode="scaled")
        made.append(Contender(f'{OURS}, decode="scaled"', epoch(loader)))
    program = stages_program()
    made.append(Process(DECODING, [program, str(folder), "--decode", str(THREADS)]).contender())
    notes = []
    for name in PEERS if peers else []:
        script = [str(PEERS_PYTHON), str(Path(__file__).parent / "peers.py"), name, str(folder), str(THREADS)]
        try:
            process = Process(name, script)
            process.run()
            made.append(process.contender())
        except OSError as error:
            notes.append(f"{name}: not run ({error}).")
    work = f"Loading: {kind}, to normalised 224 x 224 batches of {BATCH}"
    return LoaderComparison(work, "img/s", made, stages=lambda: stages(program, folder), notes=notes)


def contenders(theirs: torch.utils.data.Dataset[Any], ours: torch.utils.data.Dataset[Any]) -> list[Contender]:
    """Torchvision without and with workers, and cnnrs; raises if they disagree."""
    for (batch, labels), (same, same_labels) in zip(
        cnnrs.DataLoader(ours, BATCH), torch.utils.data.DataLoader(theirs, BATCH), strict=True
    ):
        if not torch.equal(batch, same) or not torch.equal(labels, same_labels):
            raise AssertionError("the loaders disagree; a speed-up would mean nothing")
    loaders = [torch.utils.data.DataLoader(theirs, BATCH, num_workers=workers) for workers in (0, 2)]
    made = [Contender(name, epoch(loader)) for name, loader in zip(TORCHVISION, loaders, strict=True)]
    made.append(Contender("cnnrs, inline", epoch(cnnrs.DataLoader(ours, BATCH, num_workers=0))))
    made.append(Contender(OURS, epoch(cnnrs.DataLoader(ours, BATCH, num_workers=THREADS))))
    return made


def epoch(loader: Any) -> Callable[[], int]:
    """One pass over the loader that touches nothing but the sizes."""
    return lambda: sum(len(images) for images, _ in loader)


class Process:
    """A contender in a process of its own: one line in, one pass, the number of images out."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, bufsize=1
        )

    def run(self) -> int:
        """One pass. Raises OSError with the process's last words when it is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer.strip():
            self.process.wait()
            self.errors.seek(0)
            words = self.errors.read().strip().splitlines() or ["no message"]
            raise OSError(words[-1][:160])
        return int(answer)

    def close(self) -> None:
        """End it: its memory is needed by others."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()

    def contender(self) -> Contender:
        """As the comparison wants it."""
        return Contender(self.name, self.run)


def stages_program() -> str:
    """Builds `stages.rs` and returns the path of the program."""
    command = ["cargo", "bench", "--locked", "--bench", "stages", "--no-run", "--message-format=json"]
    built = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in built.splitlines()]
    return next(
        str(m["executable"]) for m in messages if m.get("target", {}).get("name") == "stages" and m["executable"]
    )


def stages(program: str, folder: Path) -> str:
    """Milliseconds per image of every stage, one thread."""
    out = subprocess.run([program, str(folder)], check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(out)
    names = {
        "read": "read",
        "decode_libjpeg": "decode, libjpeg-turbo alone",
        "decode": "decode, own entropy decoder",
        "scaled": "decode, scaled",
        "resize": "resize",
        "normalise": "normalise",
        "fused": "resize and normalise in one go",
    }
    head = f"Milliseconds per image on one thread, median of {figures['rounds']} rounds per file, mean over the files:"
    rows = [f"| {label} | {show(figures[name])} |" for name, label in names.items()]
    return "\n".join(["", head, "", "| stage | ms |", "|---|---:|", *rows])


if __name__ == "__main__":
    for comparison in comparisons():
        print(comparison.measure().table())
        sys.stdout.flush()
