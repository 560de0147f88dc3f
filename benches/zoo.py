"""torchvision's networks, one of each family at least, and a dozen of timm's.

By torch in both orders, ONNX Runtime, OpenVINO, and `preconv`.

`python benches/run.py zoo --only regnet_y_400mf shufflenet_v2_x1_0` measures some of them, and keeps nothing.
"""

import copy
import importlib.util
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from frozen_peers import network
from loader import PEERS_PYTHON, THREADS, Process
from measure import Comparison, Contender, show
from preconv import RUNTIMES, eager, several
from torch import nn

import cnnrs

CONVOLUTIONAL = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "mnasnet0_5", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_400mf",
    "regnet_x_1_6gf", "regnet_y_400mf", "regnet_y_1_6gf", "resnet18", "resnet34", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1", "vgg11", "vgg16", "vgg16_bn",
    "wide_resnet50_2",
)  # fmt: skip
TRANSFORMERS = ("maxvit_t", "swin_t", "swin_v2_t", "vit_b_16", "vit_b_32")
TIMM = (
    "convnextv2_nano", "eva02_tiny_patch14_224", "hgnetv2_b0", "mobilenetv4_conv_medium", "mobilenetv4_conv_small",
    "repvgg_a0", "swin_tiny_patch4_window7_224", "tf_efficientnetv2_s", "vit_base_patch16_siglip_224",
    "vit_small_patch14_dinov2", "vit_small_patch16_224", "vit_small_patch16_dinov3",
)  # fmt: skip
BATCH, SIZE = 8, 224
#: Images of a job for `preconv`, whose preparations are part of it; others run so many in a row.
JOB, IN_A_ROW = 512, 64
#: The same for networks that take torch long: their preparations are a small part in any case.
LONG_JOB, LONG = 128, 0.03
ROUNDS = 3
PLAIN, LAST, OURS = "torch", "torch, channels_last", "cnnrs"


def comparisons() -> Iterator["Zoo"]:
    """One table."""
    yield Zoo("torchvision's convolutional networks", CONVOLUTIONAL)


def others() -> Iterator["Zoo"]:
    """Another one; without timm's networks, where it is neither here nor beside the peers."""
    of_timm = [f"timm:{name}" for name in TIMM] if _has_timm() else []
    yield Zoo("torchvision's transformers, and networks of timm", [*TRANSFORMERS, *of_timm])


def some(names: Sequence[str]) -> "Zoo":
    """Any networks."""
    _has_timm()
    return Zoo("networks", names)


def _has_timm() -> bool:
    # Behind all else: torch and the like are those of this environment.
    sys.path += map(str, PEERS_PYTHON.parents[1].glob("lib/python3*/site-packages"))
    return importlib.util.find_spec("timm") is not None


@dataclass
class Row:
    """One network.

    Attributes:
        name: as for `frozen_peers.network`.
        rates: images per second of each contender, round by round.
        engine: who computes it for `preconv`.
        notes: who did not run, and why.
    """

    name: str
    rates: dict[str, list[float]]
    engine: str
    notes: list[str]

    def ratio(self, others: Sequence[str]) -> float:
        """How many times as fast as the best of ``others`` ours is, the median of the single rounds."""
        there = [self.rates[name] for name in others if name in self.rates]
        rounds = zip(self.rates[OURS], zip(*there, strict=True), strict=True)
        return statistics.median(ours / max(theirs) for ours, theirs in rounds)


@dataclass
class Zoo:
    """Networks, one after the other: together they would fill the memory.

    Attributes:
        title: what they are.
        names: as for `frozen_peers.network`.
        rows: what was measured.
    """

    title: str
    names: Sequence[str]
    rows: list[Row] = field(default_factory=list)

    def measure(self) -> "Zoo":
        """Each network by all contenders in turn."""
        for name in self.names:
            self.rows.append(_measured(name))
            # What there is so far: the whole takes long.
            print(self._line(self.rows[-1]), file=sys.stderr, flush=True)
        return self

    def table(self) -> str:
        """A row per network."""
        everyone = [PLAIN, LAST, *RUNTIMES]
        slower = [f"{row.name} ({row.ratio(everyone):.2f})" for row in self.rows if row.ratio(everyone) < 1]
        lines = [
            f"### {self.title[0].upper()}{self.title[1:]}: features of {JOB} images, {SIZE} x {SIZE}, float32, "
            f"batches of {BATCH}",
            "",
            f"Medians of {ROUNDS} rounds in img/s, {THREADS} threads. For cnnrs a round is one `preconv` of a network "
            "that it has not seen before: looking at it, preparing and checking it are part of the time. For the "
            f"others it is {IN_A_ROW} images, without preparations. All get one batch again and again. Networks that "
            f"take torch more than {1000 * LONG:.0f} ms an image: {LONG_JOB} images.",
            "",
            f"| network | {' | '.join([*everyone, OURS])} | ours / best of torch | ours / best of all | who computes |",
            f"|---|{'---:|' * (len(everyone) + 3)}---|",
            *map(self._line, self.rows),
            "",
            f"As fast as the best of all, or faster: {len(self.rows) - len(slower)} of {len(self.rows)}. "
            + (f"Slower: {', '.join(slower)}." if slower else ""),
            *[f"{row.name}: {note}" for row in self.rows for note in row.notes],
        ]
        return "\n".join([*lines, ""])

    def _line(self, row: Row) -> str:
        figures = [
            show(statistics.median(row.rates[name])) if name in row.rates else "-"
            for name in (PLAIN, LAST, *RUNTIMES, OURS)
        ]
        ratios = [f"{row.ratio(others):.2f}" for others in ([PLAIN, LAST], [PLAIN, LAST, *RUNTIMES])]
        return f"| {' | '.join([row.name, *figures, *ratios, row.engine])} |"


def _measured(name: str) -> Row:
    torch.manual_seed(0)
    model, images = network(name, settled=True), torch.rand(BATCH, 3, SIZE, SIZE)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    made = [
        Contender(PLAIN, eager(model, images)),
        Contender(LAST, eager(last, images.to(memory_format=torch.channels_last))),
    ]
    notes, script = [], str(Path(__file__).parent / "frozen_peers.py")
    commands = {
        runtime: [str(PEERS_PYTHON), script, runtime, name, str(BATCH), str(THREADS), "settled"] for runtime in RUNTIMES
    }
    # They export the network at the same time.
    processes = [Process(*of) for of in commands.items()] if PEERS_PYTHON.exists() else []
    for process in processes:
        try:
            process.run()
            made.append(process.contender())
        except OSError as error:
            notes.append(f"{process.name} not run ({error}).")
    if not processes:
        notes.append(f"{' and '.join(RUNTIMES)} not run (`make bench-peers` installs them).")
    for contender in made:
        contender.run = several(contender.run, IN_A_ROW // BATCH)
    start = time.perf_counter()
    made[1].run()
    job = LONG_JOB if time.perf_counter() - start > LONG * IN_A_ROW else JOB
    ours = _Ours(model, job)
    comparison = Comparison(name, "img/s", [*made, Contender(OURS, ours)], rounds=ROUNDS)
    comparison.measure()
    for process in processes:
        process.close()
    rates = {one.name: [one.amount / seconds for seconds in one.seconds] for one in comparison.contenders[:-1]}
    # Without the copies that its rounds begin with, and without the first one, which warms up.
    rates[OURS] = [job / seconds for seconds in ours.seconds[1:]]
    return Row(name, rates, ours.engine, notes)


class _Ours:
    """`preconv` of a copy of the network, of which nothing is known.

    Args:
        model: the network.
        job: images of a call.

    Attributes:
        seconds: of the calls so far, without those that the copies took.
        engine: who has computed.
    """

    def __init__(self, model: nn.Module, job: int) -> None:
        self._model = model
        # As for the others one batch again and again, which nobody loads.
        self._data = [(torch.rand(BATCH, 3, SIZE, SIZE), torch.zeros(BATCH))] * (job // BATCH)
        self.seconds: list[float] = []
        self.engine = ""

    def __call__(self) -> int:
        """One job."""
        model = copy.deepcopy(self._model)
        start = time.perf_counter()
        found = len(cnnrs.preconv(self._data, model, verbose=False))
        self.seconds.append(time.perf_counter() - start)
        why = cnnrs.explain(model, (BATCH, 3, SIZE, SIZE))
        order = " channels_last" if "channels_last;" in (why.preconv_order or "") else ""
        self.engine = {"python": f"the module{order}"}.get(why.preconv, why.preconv)
        return found
