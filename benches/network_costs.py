"""What training whole networks costs beside the step: memory, what comes before the first step, small batches.

`python network_costs.py NETWORK BATCH SIZE WHO` trains a few steps in a process of its own and prints MiB.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from fit_cases import Case, contenders, tutorials_fit, whole
from measure import show

import cnnrs
from cnnrs.engine import choice, memory_order, verify
from cnnrs.training import epochs

#: In which batches are timed in both orders of memory, and one that has the faster one.
TRIAL = 9


class ByBatch:
    """resnet18 on small images: how the cost of a step grows with the batch."""

    sizes = (1, 2, 4, 8, 16, 32, 64)
    rounds = 3

    def measure(self) -> "ByBatch":
        """The loop in both orders and `fit` in turn, the smallest of a few rounds."""
        self.rows = []
        for size in self.sizes:
            case = whole("resnet18", size, max(4, 64 // size), size=64)
            loop, ours = contenders(case, engines=["auto"])
            runs = [loop.run, _in_channels_last(case), ours.run]
            for _ in range(TRIAL // case.steps):
                ours.run()
            best = [float("inf")] * len(runs)
            for _ in range(1 + self.rounds):
                for i, run in enumerate(runs):
                    start = time.perf_counter()
                    run()
                    best[i] = min(best[i], (time.perf_counter() - start) / case.steps)
            self.rows.append((size, *best))
            print(f"resnet18 at 64 x 64, batches of {size}: done", file=sys.stderr, flush=True)
        return self

    def table(self) -> str:
        """Milliseconds per step and images per second."""
        lines = [
            "### Training: resnet18 at 64 x 64, cost of a step by batch size",
            "",
            f"Smallest of {self.rounds} rounds after one to warm up, data in memory. The loop has the better order of "
            "memory of the two.",
            "",
            "| batch | tutorial's loop, ms | in | cnnrs.fit, ms | times as fast | cnnrs.fit, img/s |",
            "|---:|---:|---|---:|---:|---:|",
        ]
        for size, plain, last, ours in self.rows:
            best, order = min((plain, "contiguous"), (last, "channels_last"))
            figures = (show(1e3 * best), order, show(1e3 * ours), f"{best / ours:.2f}", show(size / ours))
            lines.append(f"| {size} | {' | '.join(figures)} |")
        return "\n".join([*lines, ""])


class Preparation:
    """What `fit` does before its first step: where there is a compiler this is its time."""

    rounds = 3
    #: Title of a column, and where that is done.
    pieces: tuple[tuple[str, Any, str], ...] = (
        ("taking it apart", epochs, "lowered_for"),
        ("dividing it", choice, "front_of"),
        ("checking it", verify, "differs"),
        ("trying kernels", memory_order, "_runs"),
    )

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases

    def measure(self) -> "Preparation":
        """Fresh models, each for two epochs of one batch."""
        self.rows = []
        for case in self.cases:
            first, later = zip(*(self._epochs(case) for _ in range(self.rounds)), strict=True)
            columns = [statistics.median(one) for one in zip(*first, strict=True)]
            self.rows.append((case.name, *columns, statistics.median(times[0] for times in later)))
            print(f"Before the first step: {case.name}", file=sys.stderr, flush=True)
        return self

    def _epochs(self, case: Case) -> tuple[list[float], list[float]]:
        """Seconds before the step of a first and a second epoch: in all, and of each piece."""
        model, batches = case.make(), case.batches(1)
        optimizer, found = case.optimizer(model), []
        for number in range(2):
            with self._clocks() as (seconds, ends):
                start = time.perf_counter()
                cnnrs.fit(number, model, batches, optimizer=optimizer, loss_fn=case.loss_fn, verbose=False)
            found.append([max(ends, default=start) - start, *seconds])
        return found[0], found[1]

    @contextmanager
    def _clocks(self) -> Iterator[tuple[list[float], list[float]]]:
        """Inside, seconds of each piece add up, and when each ended is kept."""
        seconds, ends = [0.0] * len(self.pieces), list[float]()

        def timed(number: int, run: Callable[..., Any]) -> Callable[..., Any]:
            def inner(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                try:
                    return run(*args, **kwargs)
                finally:
                    ends.append(time.perf_counter())
                    seconds[number] += ends[-1] - start

            return inner

        with ExitStack() as stack:
            for number, (_, place, name) in enumerate(self.pieces):
                stack.enter_context(patch.object(place, name, timed(number, getattr(place, name))))
            yield seconds, ends

    def table(self) -> str:
        """Milliseconds."""
        titles = " | ".join(title for title, *_ in self.pieces)
        lines = [
            "### Training: before the first step",
            "",
            f"Milliseconds from the call of `fit` to the first step of a new model, median of {self.rounds} models: "
            "its operations are found, it is divided into a frozen front and the rest with their kernels, two samples "
            "go through the module, its operations and native kernels. The last column: "
            "before the first step of a later epoch. Where eight steps are timed, four in each order of memory, these "
            "are steps like any other and not counted.",
            "",
            f"| network | in all | {titles} | later epochs |",
            f"|---|---:|{'---:|' * len(self.pieces)}---:|",
        ]
        for name, *columns in self.rows:
            lines.append(f"| {name} | {' | '.join(show(1e3 * seconds) for seconds in columns)} |")
        return "\n".join([*lines, ""])


class Memory:
    """Peak memory of training, each in a process of its own."""

    who = ("contiguous", "channels_last", "cnnrs")

    def __init__(self, networks: list[tuple[str, int, int]]) -> None:
        self.networks = networks

    def measure(self) -> "Memory":
        """One process each: a peak does not go away."""
        self.rows: list[tuple[str, float, float, float]] = []
        for network, batch, size in self.networks:
            row = []
            for who in self.who:
                command = [sys.executable, __file__, network, str(batch), str(size), who]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row.append(float(done.stdout))
            plain, last, ours = row
            self.rows.append((whole(network, batch, 1, size).name, plain, last, ours))
            print(f"Memory: {self.rows[-1][0]}", file=sys.stderr, flush=True)
        return self

    def table(self) -> str:
        """MiB."""
        lines = [
            "### Training: peak memory",
            "",
            "MiB at most above what the process holds before its first step: torch, cnnrs, the model and eight "
            f"batches. Gradients and momentum are in it. Two steps of the loop; of `fit` {TRIAL}, since the first "
            "eight are timed in both orders of memory where native kernels are not most of a network.",
            "",
            "| network | tutorial's loop | tutorial's loop, channels_last | cnnrs.fit | more than the better loop |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, plain, last, ours in self.rows:
            more = f"{100 * (ours / min(plain, last) - 1):+.0f} %"
            lines.append(f"| {name} | {show(plain)} | {show(last)} | {show(ours)} | {more} |")
        return "\n".join([*lines, ""])


def _in_channels_last(case: Case) -> Callable[[], None]:
    """The tutorial's loop, its model and batches in that order."""
    model = case.make().to(memory_format=torch.channels_last)
    optimizer = case.optimizer(model)
    batches = [(x.to(memory_format=torch.channels_last), y) for x, y in case.batches()]
    return lambda: tutorials_fit(model, batches, optimizer, case.loss_fn)


def _peak(network: str, batch: int, size: int, who: str) -> float:
    """MiB of a training above what was there before."""
    case = whole(network, batch, TRIAL if who == "cnnrs" else 2, size)
    if who == "channels_last":
        run = _in_channels_last(case)
    else:
        loop, ours = contenders(case, engines=["auto"])
        run = loop.run if who == "contiguous" else ours.run  # type: ignore[assignment]
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    """MiB by the system's name: VmRSS now, VmHWM at most."""
    # Not ru_maxrss: a process that was started by a larger one begins with that one's peak.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


if __name__ == "__main__":
    print(_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
