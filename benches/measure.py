"""How the benchmarks measure: every contender warmed, then all in turn, several rounds; ratios within one round."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from cnnrs._util.kept_memory import give_back

#: What is counted, by unit.
THINGS = {
    "img/s": "images", "files/s": "files", "rows/s": "rows", "ms/batch": "batches", "TFLOP/s": "TFLOP", "GB/s": "GB",
}  # fmt: skip


@dataclass
class Contender:
    """Something that does the work once and returns how much it did, e.g. the number of images."""

    name: str
    run: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    amount: float = 0


@dataclass
class Comparison:
    """The same work by several contenders; the first one is the baseline."""

    work: str
    #: "img/s", "files/s", "rows/s", "TFLOP/s" or "GB/s" (more is better), or "ms/step" or "ms/batch" (less is better).
    unit: str
    contenders: list[Contender]
    rounds: int = 5

    def measure(self) -> "Comparison":
        """Warm everyone up once, then measure in turn, so that a busy minute hits all alike."""
        for contender in self.contenders:
            contender.amount = contender.run()
        for number in range(self.rounds):
            for contender in self.contenders:
                self.settle(contender)
                start = time.perf_counter()
                contender.run()
                contender.seconds.append(time.perf_counter() - start)
            print(f"{self.work}: round {number + 1} of {self.rounds}", file=sys.stderr, flush=True)
        return self

    def settle(self, contender: Contender) -> None:
        """Before each round, not measured: what cnnrs keeps of freed memory must not help the others."""
        give_back()

    def table(self) -> str:
        """A Markdown table: median, smallest, largest, and the median of the single rounds' ratios to the baseline."""
        baseline = self.contenders[0]
        things = THINGS.get(self.unit, "steps")
        lines = [
            f"### {self.work}",
            "",
            f"n = {self.rounds} rounds of {show(baseline.amount)} {things}.",
            "",
            f"| who | median {self.unit} | smallest to largest | times as fast |",
            "|---|---:|---:|---:|",
        ]
        for contender in self.contenders:
            figures = [self.figure(contender, s) for s in contender.seconds]
            ratio = statistics.median(self.ratios(contender, baseline))
            spread = f"{show(min(figures))} to {show(max(figures))}"
            lines.append(
                f"| {contender.name} | {show(statistics.median(figures))} | {spread} "
                f"| {'baseline' if contender is baseline else f'{ratio:.2f}'} |"
            )
        return "\n".join([*lines, ""])

    def ratios(self, contender: Contender, baseline: Contender) -> list[float]:
        """How many times as fast as the baseline the contender was, in each round."""
        amounts = contender.amount / baseline.amount
        return [amounts * b / s for b, s in zip(baseline.seconds, contender.seconds, strict=True)]

    def figure(self, contender: Contender, seconds: float) -> float:
        """Seconds of one round in the unit of the table."""
        return contender.amount / seconds if self.unit.endswith("/s") else 1000 * seconds / contender.amount


def show(figure: float) -> str:
    """Three significant digits."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def _described() -> str:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return git.stdout


def machine(load: float) -> str:
    """A Markdown list of what the figures depend on; ``load`` is the machine's load before the first measurement."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    # Without git where the benchmarks were carried to.
    commit = os.environ.get("CNNRS_COMMIT") or _described()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "pillow", "numpy"))
    cores = len(os.sched_getaffinity(0))
    return "\n".join(
        [
            f"- CPU: {cpu}, {cores} cores usable, {memory:.0f} GiB; GPU: {gpu}; {platform.platform()}",
            f"- Python {platform.python_version()}, {versions}",
            f"- cnnrs {metadata.version('cnnrs')} ({commit.strip()}), {time.strftime('%Y-%m-%d')}",
            f"- torch.get_num_threads() = {torch.get_num_threads()}; load before the run: {load:.1f}"
            + (" (a busy machine: measure again)" if load > cores / 2 else ""),
        ]
    )
