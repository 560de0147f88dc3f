"""What was expected of an H100 or H200 before anything had run on one, from which arithmetic, beside what was found."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from measure import show

from gpu.titles import (
    CALLED,
    CATDOG,
    CLOSENESS,
    COPIES,
    DECODING,
    EAGER,
    FIT,
    GATHERED,
    HEAD,
    JOB,
    LARGE,
    LOADED,
    MNIST,
    PRECONV,
    PRODUCTS,
    RESIDENT,
    ROWS,
    STAGES,
    WHOLE,
)

#: Multiplications and additions of VGG16's convolutions on one image of 224 x 224: `cnnrs.summary` counts them, too.
TERAFLOP = 0.0307


class Found:
    """Medians and ratios of what was measured; None for what was not.

    Args:
        records: as :func:`gpu.trial.record` makes them.
    """

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.figures = {record["work"]: record["figures"] for record in records}

    def rounds(self, work: str) -> dict[str, list[float]]:
        """By contender; ``work`` is the beginning of a title, of several the one measured first, which matters most."""
        return next((figures for title, figures in self.figures.items() if title.startswith(work)), {})

    def median(self, work: str, who: str) -> float | None:
        """In the unit of that comparison."""
        rounds = self.rounds(work).get(who)
        return statistics.median(rounds) if rounds else None

    def ratio(self, work: str, who: str, other: str) -> float | None:
        """How many times ``other`` ``who`` is, round by round."""
        ours, theirs = (self.rounds(work).get(name) for name in (who, other))
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if ours and theirs else None

    def over_best(self, work: str, ours: str) -> float | None:
        """Images per second of ``ours`` over those of the best other one."""
        others = [name for name in self.rounds(work) if name != ours]
        ratios = [self.ratio(work, ours, name) for name in others]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    def share(self, precision: str) -> float | None:
        """Of the ceiling of the same precision's matrix products, that the network alone reaches."""
        images = self.median(STAGES, f"forward, {precision}")
        ceiling = self.median(PRODUCTS, precision)
        return None if images is None or ceiling is None else images * TERAFLOP / ceiling

    def of_the_limit(self) -> float | None:
        """Images per second of the whole job over half the ceiling or over decoding, whichever is lower."""
        whole = self.median(JOB, "bf16, kept as bfloat16")
        ceiling, decoding = self.median(PRODUCTS, "bf16"), self.median(STAGES, DECODING)
        if whole is None or ceiling is None or decoding is None:
            return None
        return whole / min(0.5 * ceiling / TERAFLOP, decoding)


@dataclass(frozen=True)
class Prediction:
    """A figure between two others, and why; a goal has no upper end."""

    what: str
    low: float
    high: float
    why: str
    found: Callable[[Found], float | None]

    def row(self, found: Found) -> str:
        """Of the table."""
        figure = self.found(found)
        expected = f"at least {show(self.low)}" if self.high == GOAL else f"{show(self.low)} to {show(self.high)}"
        if figure is None:
            return f"| {self.what} | {expected} | not measured | | {self.why} |"
        verdict = "yes" if self.low <= figure <= self.high else "**no**"
        return f"| {self.what} | {expected} | {show(figure)} | {verdict} | {self.why} |"


GOAL = float("inf")


def _product(name: str, low: float, high: float, why: str) -> Prediction:
    return Prediction(f"matrix product {name}, TFLOP/s", low, high, why, lambda f: f.median(PRODUCTS, name))


def _copy(name: str, low: float, high: float, why: str) -> Prediction:
    return Prediction(f"copy {name}, GB/s", low, high, why, lambda f: f.median(COPIES, name))


def _stage(name: str, low: float, high: float, why: str) -> Prediction:
    return Prediction(f"{name}, img/s", low, high, why, lambda f: f.median(STAGES, name))


def _share(precision: str, low: float, high: float, why: str) -> Prediction:
    what = f"VGG16 alone, {precision}, share of that precision's ceiling"
    return Prediction(what, low, high, why, lambda f: f.share(precision))


def _distance(precision: str, low: float, high: float, why: str) -> Prediction:
    return Prediction(f"distance to the CPU, {precision}", low, high, why, lambda f: f.median(CLOSENESS, precision))


def _times(case: str, who: str, low: float, high: float, why: str) -> Prediction:
    what = f"{who} of {case.removeprefix('fit: ')}, times as fast as {EAGER}"
    # Milliseconds per step: the loop's over ours.
    return Prediction(what, low, high, why, lambda f: f.ratio(case, EAGER, who))


PREDICTIONS = [
    _product("bf16", 650, 850, "989 by the datasheet; power allows about four fifths of it on random numbers"),
    _product("fp16", 650, 850, "the same units"),
    _product("tf32", 330, 470, "half the rate of bf16: the operands have twice the bytes"),
    _product("exact", 40, 62, "67 by the datasheet without tensor cores"),
    _copy("pinned to device", 40, 58, "PCIe 5 x16: 63 less the protocol"),
    _copy("device to pinned", 40, 58, "the same"),
    _copy("pageable to device", 4, 20, "one core copies into page-locked memory first"),
    _copy("within the device, read and written", 2600, 4500, "of 3,350 (H100) or 4,800 (H200) nine tenths"),
    _share("bf16", 0.40, 0.60, "few channels in front; ReLU and pooling are passes of their own over memory"),
    _share("tf32", 0.35, 0.65, "the same network, passes over memory twice as many bytes against half the rate"),
    _share("exact", 0.5, 1.6, "no tensor cores to feed; where cuDNN takes Winograd's algorithm more than 1"),
    _stage(DECODING, 8_000, 16_000, "900 per core of 0.15 megapixels (RESULTS.md) times 16, less what they share"),
    _stage("copy of bytes to the device", 260_000, 390_000, "150 KB per image at the bus's rate"),
    _stage("copy of float32 features to the host", 400_000, 580_000, "100 KB per image at the bus's rate"),
    _stage("float32 features to the disk", 3_000, 20_000, "100 KB per image at 0.3 to 2 GB/s of a virtual disk"),
    Prediction(
        'large photos, decode="gpu" over decode="exact"', 0.5, 2,
        "2 to 4 gigapixels a second of the decoding engines against 16 cores at 0.2 (RESULTS.md)",
        lambda f: f.ratio(LARGE, 'decode="gpu"', 'decode="exact"'),
    ),
    Prediction(
        "preconv bf16 over the best PyTorch by hand, batches on the device", 0.97, 1.3,
        "the same kernels; less waiting against what the compiler fuses",
        lambda f: f.over_best(RESIDENT, PRECONV),
    ),
    Prediction(
        "preconv bf16 over the best PyTorch by hand, from photos", 1.0, 4,
        "1 with our loader in front of it; torch's decodes 200 to 250 per core and second",
        lambda f: f.over_best(WHOLE, PRECONV),
    ),
    _distance("exact", 1e-7, 1e-5, "24 bits, sums of up to 4,608 products, thirteen layers"),
    _distance("tf32", 1e-4, 3e-3, "11 bits of inputs and weights: 5e-4 each, averaged over thousands, thirteen layers"),
    _distance("fp16", 1e-4, 3e-3, "11 bits, results too"),
    _distance("bf16", 1e-3, 2e-2, "8 bits: eight times as far as fp16"),
    _times(MNIST, FIT, 5, 15, "60 launches and two waits of 10 us each against one launch and kernels of 2 us"),
    _times(MNIST, CALLED, 0.8, 2, "launches as before, without the second loss and its waits"),
    _times(CATDOG, FIT, 1.1, 2, "kernels of 20 us and more: launches hide behind them"),
    _times(HEAD, FIT, 1.2, 2, "120 million weights, 0.48 GB: eight passes over them where the update is fused"),
    Prediction("cnnrs.fit of that head, rows on the device, times as fast as PyTorch by hand", 1, 1.4,
               "the same kernels without 40 launches and a gather of their own",
               lambda f: f.ratio(LOADED, GATHERED, ROWS)),
]  # fmt: skip
GOALS = [
    Prediction(
        "preconv bf16 into a folder over the lower of half the ceiling and decoding", 1, GOAL,
        "", lambda f: f.of_the_limit(),
    ),
    Prediction("preconv bf16 over the best PyTorch by hand, batches on the device", 1, GOAL, "",
               lambda f: f.over_best(RESIDENT, PRECONV)),
    Prediction("preconv bf16 over the best PyTorch by hand, from photos", 1, GOAL, "",
               lambda f: f.over_best(WHOLE, PRECONV)),
    _times(MNIST, FIT, 10, GOAL, ""),
    _times(CATDOG, FIT, 1.5, GOAL, ""),
    _times(HEAD, FIT, 1.5, GOAL, ""),
]  # fmt: skip


@dataclass
class Judgement:
    """Beside each other; measured by the trials before."""

    records: list[dict[str, Any]]
    work: str = "Predicted and found"
    failures: list[str] = field(default_factory=list)

    def measure(self) -> "Judgement":
        """Nothing more to do."""
        return self

    def missing(self) -> list[str]:
        """What was judged but never measured."""
        found = Found(self.records)
        return [one.what for one in (*PREDICTIONS, *GOALS) if one.found(found) is None]

    def table(self) -> str:
        """Predictions of the day before, then goals."""
        found = Found(self.records)
        lines = [
            f"### {self.work}",
            "",
            "Written down before the first run on a GPU, for an H100 or H200 with 16 cores.",
            "",
            "| what | predicted | found | inside | from |",
            "|---|---:|---:|---|---|",
            *(one.row(found) for one in PREDICTIONS),
            "",
            "| goal | wanted | found | reached | |",
            "|---|---:|---:|---|---|",
            *(one.row(found) for one in GOALS),
        ]
        return "\n".join([*lines, ""])
