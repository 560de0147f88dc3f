"""Training: the tutorial's loop against `cnnrs.fit` on each engine."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from fit_cases import CATDOG, MNIST, Case, contenders, head, resnet18, tutorials_fit
from fit_costs import Head, Limits, Sweep
from measure import Comparison, Contender

import cnnrs

CASES = [
    MNIST,
    CATDOG,
    Case("SimpleCNN, batches of 32", cnnrs.models.SimpleCNN, (3, 32, 32), 32, 10, 30),
    Case("resnet18 at 64 x 64, batches of 32", resnet18, (3, 64, 64), 32, 10, 3, momentum=0.9),
]
#: By batch: as many steps as a hundred photos make.
HEADS = {5: 20, 32: 3, 64: 2}
#: Of no other optimizer than SGD are steps taken together: a few tell what one costs.
FEW = 4


def comparisons() -> Iterator[Any]:
    """The tutorial's networks and heads; what a step costs and why.

    One after the other: together their models would fill the memory.
    """
    warnings.filterwarnings("ignore", message="dropout2d: Received a 2-D input")
    for case in CASES:
        yield Comparison(f"Training: {case.name}", "ms/step", contenders(case), rounds=5)
    for kind in ("SGD", "Adam", "AdamW"):
        for batch, steps in HEADS.items():
            case = head(batch, steps if kind == "SGD" else min(steps, FEW), kind)
            yield Head(case, contenders(case))
    yield Comparison("Training: MnistNet, batches of 32, loading included", "ms/step", with_loader(), rounds=3)
    yield Sweep()
    yield Limits([MNIST, CATDOG, *(head(batch, 2) for batch in HEADS)])


def with_loader(digits: int = 16_000) -> list[Contender]:
    """From bytes to weights: torchvision's MNIST and torch's DataLoader, and cnnrs's, both shuffled."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    pixels = torch.randint(256, (digits, 28, 28), dtype=torch.uint8)
    targets = torch.randint(10, (digits,))

    def dataset(kind: Any) -> Any:
        # The same arrays without files: only what `__getitem__` reads.
        made = kind.__new__(kind)
        made.data, made.targets, made.transform, made.target_transform = pixels, targets, transform, None
        return made

    steps = digits // 32
    theirs, ours = cnnrs.models.MnistNet(), cnnrs.models.MnistNet()
    their_sgd, our_sgd = MNIST.optimizer(theirs), MNIST.optimizer(ours)
    their_loader = DataLoader(dataset(datasets.MNIST), batch_size=32, shuffle=True)
    our_loader = cnnrs.DataLoader(dataset(datasets.MNIST), batch_size=32, shuffle=True)

    def run_theirs() -> int:
        tutorials_fit(theirs, their_loader, their_sgd, F.nll_loss)
        return steps

    def run_ours() -> int:
        cnnrs.fit(0, ours, our_loader, optimizer=our_sgd, loss_fn=F.nll_loss, verbose=False)
        return steps

    return [Contender("the tutorial's loop and loader", run_theirs), Contender("cnnrs.fit, cnnrs.DataLoader", run_ours)]
