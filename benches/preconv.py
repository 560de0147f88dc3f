"""Frozen networks on the CPU: torch eager, ONNX Runtime and OpenVINO against engine `cpu`, and the whole job."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import loader_inputs
import torch
from frozen_peers import network
from loader import PEERS_PYTHON, THREADS, TUTORIAL, Process
from measure import Comparison, Contender, show
from torch import nn

import cnnrs
from cnnrs import _cnnrs
from cnnrs.engine import cpu_inference
from cnnrs.errors import UnsupportedModelError
from cnnrs.model.lowering import lower
from cnnrs.model.operations import Unsupported

OURS = "cnnrs, engine='cpu'"
EXACT = "cnnrs, engine='cpu', precision='exact'"
RUNTIMES = ("ONNX Runtime", "OpenVINO")
OTHERS = ("resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny")
#: Where its package is installed.
LITE = "efficientnet_lite0"


@dataclass
class FrozenComparison(Comparison):
    """Ends in the ratio to the best of the others, round by round, and in the layers where they are asked for."""

    notes: list[str] = field(default_factory=list)
    layers: Callable[[], str] = lambda: ""

    def table(self) -> str:
        """The table of all contenders and what follows from it."""
        by_name = {contender.name: contender for contender in self.contenders}
        lines = list(self.notes)
        if OURS in by_name:
            others = [c.seconds for c in self.contenders if not c.name.startswith("cnnrs")]
            best = [min(seconds) for seconds in zip(*others, strict=True)]
            ratios = [a / b for a, b in zip(best, by_name[OURS].seconds, strict=True)]
            lines.append(
                f"cnnrs is {statistics.median(ratios):.2f} times as fast as the best of the others "
                f"({min(ratios):.2f} to {max(ratios):.2f})."
            )
        return "\n".join([super().table(), *lines, self.layers(), ""])


def comparisons() -> Iterator[Comparison]:
    """VGG16's features at two batch sizes, the other networks at one, and a folder of photos to stored features."""
    torch.manual_seed(0)
    yield frozen("vgg16.features", 8, layers=True)
    yield frozen("vgg16.features", 32)
    for name in [*OTHERS, *([LITE] if find_spec("efficientnet_lite_pytorch") else [])]:
        yield frozen(name, 8, batches=8)
    with tempfile.TemporaryDirectory() as scratch:
        yield whole_job(Path(scratch))


def frozen(name: str, batch: int, layers: bool = False, batches: int = 1) -> FrozenComparison:
    """One network, all contenders.

    Args:
        name: of the network.
        batch: images per call.
        layers: whether a table of the layers follows.
        batches: calls per round. A single one of a fast network lasts no longer than the threads of whoever ran before
            spin, which is then what the round measures.
    """
    model, images = network(name), torch.rand(batch, 3, 224, 224)
    last = network(name).to(memory_format=torch.channels_last)
    made = [
        Contender("torch eager", eager(model, images)),
        Contender("torch eager, channels_last", eager(last, images.to(memory_format=torch.channels_last))),
    ]
    notes = []
    for runtime in RUNTIMES:
        script = str(Path(__file__).parent / "frozen_peers.py")
        command = [str(PEERS_PYTHON), script, runtime, name, str(batch), str(THREADS)]
        try:
            process = Process(runtime, command)
            process.run()
            made.append(process.contender())
        except OSError as error:
            notes.append(f"{runtime}: not run ({error}).")
    table = ""
    try:
        ours = compiled(model, images)
        made.append(Contender(OURS, lambda: len(ours(images))))
        if layers:
            exact = compiled(model, images, exact=True)
            made.append(Contender(EXACT, lambda: len(exact(images))))
            table = layer_table(ours, images)
    except (Unsupported, UnsupportedModelError) as reasons:
        notes.append(f"engine 'cpu' does not run it, 'auto' leaves it to torch: {str(reasons).splitlines()[0]}.")
    for contender in made:
        contender.run = several(contender.run, batches)
    return FrozenComparison(
        f"Frozen {name}, batches of {batch}, 224 x 224, float32",
        "img/s",
        made,
        rounds=5 if batch < 32 else 3,
        notes=notes,
        layers=lambda: table,
    )


def several(run: Callable[[], int], times: int) -> Callable[[], int]:
    """The same work a few times in a row."""
    return lambda: sum(run() for _ in range(times))


def eager(model: nn.Module, images: torch.Tensor) -> Callable[[], int]:
    """The module itself, as fast as PyTorch runs it unchanged."""

    def run() -> int:
        with torch.inference_mode():
            return len(model(images))

    return run


def compiled(model: nn.Module, images: torch.Tensor, exact: bool = False) -> _cnnrs.CpuNetwork:
    """What `preconv` runs."""
    return cpu_inference.network(lower(model), exact=exact)


def layer_table(network: _cnnrs.CpuNetwork, images: torch.Tensor, rounds: int = 5) -> str:
    """Milliseconds per image of each layer, its smallest over the rounds; what it would be worth without Winograd."""
    network(images)
    fastest: list[float] = []
    for _ in range(rounds):
        before = [row[4] for row in network.timings()]
        network(images)
        spent = [row[4] - start for row, start in zip(network.timings(), before, strict=True)]
        fastest = [min(pair) for pair in zip(fastest or spent, spent, strict=True)]
    ceiling = matmul_rate()
    lines = [
        f"Per layer, {THREADS} threads; a matrix product of 2048 x 2048 reaches {ceiling / 1e9:.0f} GFLOP/s here.",
        "",
        "| layer | method | ms/image | effective GFLOP/s | share of the matrix product's |",
        "|---|---|---:|---:|---:|",
    ]
    for (name, kind, method, flops, _), seconds in zip(network.timings(), fastest, strict=True):
        per_image = seconds / len(images)
        rate = flops / per_image
        share = f"{rate / 1e9:.0f} | {100 * rate / ceiling:.0f} %" if flops else " | "
        lines.append(f"| {name} ({kind}) | {method} | {show(1000 * per_image)} | {share} |")
    return "\n".join(lines)


def matmul_rate(side: int = 2048, rounds: int = 5) -> float:
    """Floating-point operations per second of torch's matrix product, the best of a few."""
    a, b = torch.rand(side, side), torch.rand(side, side)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


class WholeJob(Comparison):
    """Photos on disk to stored features, against the model's own time for as many images."""

    def table(self) -> str:
        """The table, and what it means for the 25,000 photos of the competition."""
        job, model = self.contenders
        ratios = [j / m for j, m in zip(job.seconds, model.seconds, strict=True)]
        minutes = statistics.median(job.seconds) / job.amount * 25_000 / 60
        return (
            f"{super().table()}\nThe job takes {statistics.median(ratios):.2f} times the model's own time; "
            f"25,000 photos take {minutes:.0f} minutes.\n"
        )


def whole_job(scratch: Path) -> Comparison:
    """Decoding, features and store of VGG16 in one go."""
    folder, kind = loader_inputs.photos(scratch)
    data = cnnrs.ImageFolder(folder, TUTORIAL)
    model = network("vgg16.features")
    ours, images = compiled(model, torch.rand(32, 3, 224, 224)), torch.rand(32, 3, 224, 224)

    def job() -> int:
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            return len(cnnrs.preconv(data, model, Path(out) / "features", batch_size=32, verbose=False))

    def alone() -> int:
        for start in range(0, len(data), 32):
            ours(images[: len(data) - start])
        return len(data)

    return WholeJob(
        f"Whole job: {kind} to stored VGG16 features",
        "img/s",
        [Contender("cnnrs.preconv(folder, vgg.features, out=...)", job), Contender("the model's own time", alone)],
        rounds=3,
    )
