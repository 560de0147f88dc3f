"""Whole networks, their last blocks and heads, and validation: the plain loop in both orders of memory, and `fit`."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fit_cases import Batches, Case, contenders, partly, tutorials_fit, whole
from measure import Comparison, Contender
from torch import nn

import cnnrs

#: "auto" calls these. As many steps as tell what an epoch costs: each one looks at the model once, a tenth of a second.
CALLED = [
    whole("resnet18", 32, 8, size=64),
    whole("resnet18", 16, 4),
    whole("resnet50", 8, 2),
    whole("mobilenet_v3_large", 16, 8),
    whole("efficientnet_b0", 8, 8),
    whole("vgg11_bn", 4, 2),
]
#: The last block and the head, or the head alone, of a network whose other layers are frozen.
PARTLY = [
    partly("resnet18", 16, 8, ["layer4", "fc"]),
    partly("resnet18", 16, 8, ["fc"]),
    partly("mobilenet_v3_large", 16, 8, ["features.15", "features.16", "classifier"]),
    partly("mobilenet_v3_large", 16, 8, ["classifier"]),
]
#: Validation of whole networks; their weights are other ones at every epoch.
VALIDATED = [
    whole("resnet18", 32, 20, size=64),
    whole("resnet18", 16, 8),
    whole("resnet50", 8, 8),
    whole("mobilenet_v3_large", 16, 8),
    whole("efficientnet_b0", 8, 8),
    whole("vgg16", 4, 16),
]


def comparisons() -> Iterator[Any]:
    """Networks people fine-tune. One after the other: together their models would fill the memory."""
    for case in CALLED:
        yield AgainstBetter(f"Training: {case.name}, whole", "ms/step", both_orders(case))
    for case in PARTLY:
        yield AgainstBetter(f"Training: {case.name}", "ms/step", both_orders(case))
    for case in VALIDATED:
        yield AgainstBetter(f"Validation: {case.name}", "ms/batch", validations(case))


class AgainstBetter(Comparison):
    """The baseline is the faster one of the first two."""

    def measure(self) -> "AgainstBetter":
        """As ever; who is the baseline shows afterwards."""
        super().measure()
        self.contenders[:2] = sorted(self.contenders[:2], key=lambda one: statistics.median(one.seconds))
        return self


def both_orders(case: Case) -> list[Contender]:
    """The loop in both orders of memory, and "auto", which has chosen one before it is measured."""
    loop, ours = contenders(case)[:2]
    batches, model = case.batches(), case.make().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = case.optimizer(model)
    converted = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]

    def last() -> int:
        tutorials_fit(model, converted, optimizer, case.loss_fn)
        return len(converted)

    for _ in range(8 // len(batches)):
        ours.run()
    return [loop, Contender("the tutorial's loop, channels_last", last), ours]


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
