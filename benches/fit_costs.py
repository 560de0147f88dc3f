"""What a step of `cnnrs.fit` costs by itself: over the size of the batch, and against the machine's limits."""

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fit_cases import MNIST, Case, contenders
from measure import Comparison, Contender, show
from torch import nn

import cnnrs

#: With batches up to this size `fit` takes several of SGD's steps at once, which read a piece of the weights together.
TOGETHER = 8


class Sweep:
    """MnistNet: how the cost of a step grows with the batch."""

    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

    def measure(self) -> "Sweep":
        """Both in turn, the smallest of five rounds."""
        self.rows = []
        for size in self.sizes:
            case = Case("", MNIST.make, MNIST.shape, size, 10, max(64, min(512, 8192 // size)), F.nll_loss)
            loop, ours = contenders(case)[:2]
            best = [float("inf")] * 2
            for _ in range(6):
                for i, contender in enumerate((loop, ours)):
                    start = time.perf_counter()
                    steps = contender.run()
                    best[i] = min(best[i], (time.perf_counter() - start) / steps)
            self.rows.append((size, best))
        return self

    def table(self) -> str:
        """Milliseconds per step and digits per second."""
        lines = [
            "### Training: MnistNet, cost of a step by batch size",
            "",
            "Smallest of 5 rounds after one to warm up, data in memory.",
            "",
            "| batch | tutorial's loop, ms | cnnrs.fit, ms | times as fast | cnnrs.fit, digits/s |",
            "|---:|---:|---:|---:|---:|",
        ]
        for size, (loop, ours) in self.rows:
            figures = (show(1e3 * loop), show(1e3 * ours), f"{loop / ours:.1f}", show(size / ours))
            lines.append(f"| {size} | {' | '.join(figures)} |")
        return "\n".join([*lines, ""])


class Limits:
    """What a step costs against what the machine could do at best."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases

    def measure(self) -> "Limits":
        """Compile time, memory, steps per second and the share of the arithmetic's or the memory's limit."""
        self.flops, self.bandwidth = products(), bandwidth()
        self.rows = []
        for case in self.cases:
            model = case.make()
            optimizer = case.optimizer(model)

            def epoch(steps: int, case: Case = case, model: nn.Module = model, optimizer: Any = optimizer) -> float:
                batches = case.batches(steps)
                start = time.perf_counter()
                cnnrs.fit(0, model, batches, optimizer=optimizer, loss_fn=case.loss_fn, engine="cpu", verbose=False)
                return time.perf_counter() - start

            case.batches(1)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            first = epoch(1)
            memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            second = statistics.median(epoch(1) for _ in range(3))
            step = min(epoch(case.steps) for _ in range(3)) / case.steps
            # Backward is twice forward; less for the first layer, hence an upper bound.
            work = 3 * case.batch * sum(layer.flops or 0 for layer in cnnrs.summary(model, (1, *case.shape)).layers)
            # Weights: read forward, read for the input's gradient, read and written by the update; momentum likewise.
            traffic = 4 * sum(p.numel() for p in model.parameters()) * (4 + 2 * (case.momentum > 0))
            limit = max(work / self.flops, traffic / self.bandwidth)
            bound = "arithmetic" if work / self.flops > traffic / self.bandwidth else "memory"
            self.rows.append((case.name, max(0.0, first - second), memory, 1 / step, limit / step, bound))
        return self

    def table(self) -> str:
        """One row per network."""
        lines = [
            "### Training: engine `cpu` against the machine's limits",
            "",
            f"Limits measured here with libtorch: {show(self.flops / 1e9)} GFLOP/s (product of two 2048 x 2048 "
            f"matrices) and {show(self.bandwidth / 1e9)} GB/s (one pass over 256 MiB, read and written). A step needs "
            "three times the forward pass's arithmetic, and weights (and momentum) cross the bus four (six) times; "
            "skipping zeros of ReLU and dropout can beat that. Compiling: the first step of a model minus a later "
            "one, pages of the optimizer's new state included.",
            "",
            "| network | compiling, ms | peak memory above the model's, MiB | steps/s | share of limit | bound by |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for name, compiling, memory, rate, share, bound in self.rows:
            figures = (show(1e3 * compiling), show(memory), show(rate), f"{100 * share:.0f} %", bound)
            lines.append(f"| {name} | {' | '.join(figures)} |")
        return "\n".join([*lines, ""])


class Head(Comparison):
    """A head by several contenders, and what a step would take if memory were all that counts.

    Args:
        case: the head.
        who: who trains it.
    """

    def __init__(self, case: Case, who: list[Contender]) -> None:
        super().__init__(f"Training: {case.name}", "ms/step", who, rounds=5)
        self._states = case.states
        self._together = case.kind == "SGD" and case.batch <= TOGETHER
        self._numbers = sum(p.numel() for p in case.make().parameters())

    def measure(self) -> "Head":
        """As ever; then how fast memory is."""
        super().measure()
        self._bandwidth = bandwidth()
        return self

    def table(self) -> str:
        """The limit is one more row: the baseline's median over it is how many times as fast it would be."""
        traffic = 2 * 4 * self._numbers * (1 + self._states)
        limit = traffic / self._bandwidth
        first = self.contenders[0]
        ratio = statistics.median(first.seconds) / first.amount / limit
        kept = ("weights", "weights and momentum", "weights and two moments")[self._states]
        row = (
            f"| limit: {kept} read and written once, {show(traffic / 1e9)} GB at {show(self._bandwidth / 1e9)} GB/s "
            f"| {show(1e3 * limit)} | | {ratio:.2f} |"
        )
        together = "\nTaken together, the steps of small batches may stay below the limit.\n" if self._together else ""
        return f"{super().table()}{row}\n{together}"


def products() -> float:
    """Operations on numbers per second in PyTorch's product of two 2048 x 2048 matrices, best of five."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / _best(lambda: a @ a)


def bandwidth() -> float:
    """Bytes per second in one pass over 256 MiB, read and written, best of five."""
    x = torch.zeros(1 << 26)
    return 2 * 4 * x.numel() / _best(lambda: x.add_(1.0))


def _best(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
