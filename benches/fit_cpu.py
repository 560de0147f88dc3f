"""One training step: eager PyTorch against engine ``cpu``, both warm, alternating in one run.

Usage: python benches/fit_cpu.py [--cpu-time] [name ...] (default: all cases); prints milliseconds per step and their
ratio. ``--cpu-time``: processor time on one thread, which other processes on the machine disturb less.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cnnrs import cpu_engine, models
from cnnrs.graph import lower


def head() -> nn.Module:
    """The classifier of VGG16 with two classes, as in the tutorial."""
    return nn.Sequential(
        nn.Linear(25088, 4096), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout(0.5),
        nn.Linear(4096, 2),
    )  # fmt: skip


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    net: nn.Module = resnet18(num_classes=10)
    return net


#: name -> (network, input shape without the batch, batch, loss, momentum)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, Any, float]] = {
    "mnist_1": (models.MnistNet, (1, 28, 28), 1, F.nll_loss, 0.5),
    "mnist_32": (models.MnistNet, (1, 28, 28), 32, F.nll_loss, 0.5),
    "mnist_512": (models.MnistNet, (1, 28, 28), 512, F.nll_loss, 0.5),
    "simple_32": (models.SimpleCNN, (3, 32, 32), 32, F.cross_entropy, 0.5),
    "catdog_32": (models.CatDogNet, (3, 224, 224), 32, F.nll_loss, 0.5),
    "head_5": (head, (25088,), 5, F.cross_entropy, 0.5),
    "head_32": (head, (25088,), 32, F.cross_entropy, 0.5),
    "head_64": (head, (25088,), 64, F.cross_entropy, 0.5),
    "resnet18_32": (resnet18, (3, 64, 64), 32, F.cross_entropy, 0.9),
}


def eager_epoch(model: nn.Module, loss_fn: Any, optimizer: torch.optim.Optimizer, batches: list[Any]) -> None:
    """The tutorial's loop without its prints."""
    running = 0.0
    correct = 0
    for x, y in batches:
        optimizer.zero_grad()
        output = model(x)
        loss = loss_fn(output, y)
        running += loss_fn(output.detach(), y, reduction="sum").item()
        correct += int((output.detach().max(dim=1)[1] == y).sum())
        loss.backward()
        optimizer.step()


def measure(name: str, budget: float, clock: Callable[[], float]) -> None:
    make, shape, batch, loss_fn, momentum = CASES[name]
    torch.manual_seed(0)
    nets = [make().train() for _ in range(1)]
    nets.append(copy.deepcopy(nets[0]))
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3, momentum=momentum) for net in nets]
    classes = nets[0].eval()(torch.zeros(1, *shape)).shape[1]
    nets[0].train()
    data = [(torch.randn(batch, *shape), torch.randint(0, classes, (batch,))) for _ in range(4)]
    lowered = lower(nets[1])
    loss = ("nll", None, -100) if loss_fn is F.nll_loss else ("cross_entropy", None, -100, 0.0)

    def eager(batches: list[Any]) -> None:
        eager_epoch(nets[0], loss_fn, optimizers[0], batches)

    def ours(batches: list[Any]) -> None:
        cpu_engine.run(0, "training", nets[1], lowered, loss, optimizers[1], iter(batches))

    times: list[list[float]] = [[], []]
    steps = [1, 1]
    for side, work in enumerate((eager, ours)):
        work(data[:2])
        start = clock()
        work(data[:1])
        # An epoch of a tenth of a second at least, so that the cost per epoch does not count as a step's.
        steps[side] = max(1, min(2000, int(0.1 / (clock() - start))))
    end = clock() + budget
    while clock() < end or len(times[0]) < 3:
        for side, work in enumerate((eager, ours)):
            batches = [data[i % len(data)] for i in range(steps[side])]
            start = clock()
            work(batches)
            times[side].append((clock() - start) / steps[side] * 1e3)
    (slow, fast), (low, high) = map(statistics.median, times), (min(times[1]), max(times[1]))
    print(
        f"{name:12s} eager {slow:8.2f} ms   cpu {fast:8.3f} ms ({low:.3f}..{high:.3f})   ratio {slow / fast:5.2f}"
        f"   of the best {min(times[0]) / low:5.2f}   n={len(times[0])}",
        flush=True,
    )


def main() -> None:
    warnings.filterwarnings("ignore", message="dropout2d")
    arguments = sys.argv[1:]
    clock = time.perf_counter
    if "--cpu-time" in arguments:
        arguments.remove("--cpu-time")
        torch.set_num_threads(1)
        clock = time.process_time
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for name in arguments or CASES:
        measure(name, 4.0, clock)


if __name__ == "__main__":
    main()
