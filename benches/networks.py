"""Whole networks, their last blocks and heads, and validation: the plain loop in both orders of memory, and `fit`."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fit_cases import Batches, Case, contenders, is_there, partly, tutorials_fit, whole
from measure import Comparison, Contender
from network_costs import ByBatch, Memory, Preparation
from network_profile import Profile
from torch import nn

import cnnrs

#: Name, batch, steps and size of what "auto" calls. An epoch costs some 20 ms for looking at the model (table "before
#: the first step"): as many steps as take about a second.
CALLED = [
    ("resnet18", 32, 12, 64),
    ("resnet18", 16, 4, 224),
    ("resnet50", 8, 3, 224),
    ("mobilenet_v3_large", 16, 8, 224),
    ("efficientnet_b0", 8, 8, 224),
    ("efficientnet_lite0", 8, 8, 224),
    ("convnext_tiny", 4, 2, 224),
    ("vgg11_bn", 4, 2, 224),
    ("vgg16", 4, 2, 224),
]
#: The last block and the head, or the head alone, of a network whose other layers are frozen.
PARTLY = [
    partly("resnet18", 16, 16, ["layer4", "fc"]),
    partly("resnet18", 16, 16, ["fc"]),
    partly("mobilenet_v3_large", 16, 24, ["features.15", "features.16", "classifier"]),
    partly("mobilenet_v3_large", 16, 24, ["classifier"]),
]
#: Validation of whole networks; their weights are other ones at every epoch.
VALIDATED = [
    whole("resnet18", 32, 20, size=64),
    whole("resnet18", 16, 8),
    whole("resnet50", 8, 4),
    whole("mobilenet_v3_large", 16, 8),
    whole("efficientnet_b0", 8, 8),
    whole("vgg16", 4, 4),
]
ROUNDS = 3
#: Flags in /proc/cpuinfo of instructions for products in bfloat16.
BF16 = {"avx512_bf16", "amx_bf16"}


def comparisons() -> Iterator[Any]:
    """Networks people fine-tune. One after the other: together their models would fill the memory."""
    cases = [whole(name, batch, steps, size) for name, batch, steps, size in CALLED if is_there(name)]
    low = _instructions() & BF16
    if low:
        names = ", ".join(sorted(low))
        yield Said(
            f'This processor has instructions for bf16 ({names}). "eager, amp bf16" is the loop with the network in '
            "`torch.autocast`, in channels_last: other numbers, so it is a row and never the baseline."
        )
    else:
        yield Said(f'No rows "eager, amp bf16": this processor has none of {", ".join(sorted(BF16))}.')
    for case in cases:
        yield AgainstBetter(f"Training: {case.name}, whole", "ms/step", both_orders(case, bool(low)), rounds=ROUNDS)
    for case in PARTLY:
        yield AgainstBetter(f"Training: {case.name}", "ms/step", both_orders(case, False), rounds=ROUNDS)
    for case in VALIDATED:
        yield AgainstBetter(f"Validation: {case.name}", "ms/batch", validations(case), rounds=ROUNDS)
    yield ByBatch()
    yield Preparation(cases)
    # Small images need little.
    yield Memory([(name, batch, size) for name, batch, _, size in CALLED if is_there(name) and size == 224])
    yield Profile([whole("resnet18", 16, 4), whole("mobilenet_v3_large", 16, 4)])


@dataclass
class Said:
    """Words between the tables."""

    text: str

    def measure(self) -> "Said":
        """Nothing to measure."""
        return self

    def table(self) -> str:
        """The text."""
        return f"{self.text}\n"


def _instructions() -> set[str]:
    """What the processor says it has; nothing where there is no /proc."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split()}


class AgainstBetter(Comparison):
    """The baseline is the faster one of the first two."""

    def settle(self, contender: Contender) -> None:
        """An epoch of its own: what `fit` keeps of freed memory is for its next one."""
        super().settle(contender)
        contender.run()

    def measure(self) -> "AgainstBetter":
        """As ever; who is the baseline shows afterwards."""
        super().measure()
        self.contenders[:2] = sorted(self.contenders[:2], key=lambda one: statistics.median(one.seconds))
        return self


class Bf16(nn.Module):
    """A network whose layers compute in bfloat16."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, classes) float32."""
        # Within, so that weights are cast anew for every batch.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs: torch.Tensor = self.network(images)
        return outputs.float()


def both_orders(case: Case, bf16: bool) -> list[Contender]:
    """The loop in both orders of memory, and "auto", which has chosen one before it is measured; ``bf16``: autocast."""
    loop, ours = contenders(case, engines=["auto"])
    batches = case.batches()
    converted = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]

    def last(name: str, model: nn.Module) -> Contender:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = case.optimizer(model)

        def run() -> int:
            tutorials_fit(model, converted, optimizer, case.loss_fn)
            return len(converted)

        return Contender(name, run)

    for _ in range(8 // len(batches)):
        ours.run()
    found = [loop, last("the tutorial's loop, channels_last", case.make()), ours]
    return [*found, last("eager, amp bf16", Bf16(case.make()))] if bf16 else found


def validations(case: Case) -> list[Contender]:
    """The plain loop in both orders of memory, and ``fit(..., "validation")`` of weights that have just changed."""
    batches = case.batches()

    @torch.no_grad()
    def plain(model: nn.Module, batches: Batches) -> None:
        model.eval()
        for inputs, targets in batches:
            outputs = model(inputs)
            case.loss_fn(outputs, targets).item()
            (outputs.argmax(1) == targets).sum().item()

    def contender(name: str, model: nn.Module, epoch: Callable[[nn.Module], object]) -> Contender:
        def run() -> int:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.0)
            epoch(model)
            return len(batches)

        return Contender(name, run)

    last = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]
    return [
        contender("the plain loop", case.make(), lambda model: plain(model, batches)),
        contender(
            "the plain loop, channels_last",
            case.make().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            lambda model: plain(model, last),
        ),
        contender(
            "cnnrs.fit, engine='auto'",
            case.make(),
            lambda model: cnnrs.fit(0, model, batches, "validation", loss_fn=case.loss_fn, verbose=False),
        ),
    ]
