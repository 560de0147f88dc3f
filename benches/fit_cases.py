"""What is trained to measure `cnnrs.fit`: networks with batches, and who trains them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from measure import Contender
from torch import nn

import cnnrs
from cnnrs.engine import companion

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A network, what it trains on, and how many steps make a round."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    classes: int
    steps: int
    loss_fn: Callable[..., torch.Tensor] = F.cross_entropy
    lr: float = 0.01
    momentum: float = 0.0
    kind: str = "SGD"

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD as in the tutorial, or Adam or AdamW as they are by default."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.kind == "SGD":
            return torch.optim.SGD(trained, lr=self.lr, momentum=self.momentum)
        made: torch.optim.Optimizer = getattr(torch.optim, self.kind)(trained, lr=self.lr)
        return made

    @property
    def states(self) -> int:
        """How many numbers the optimizer keeps for every weight."""
        return int(self.momentum > 0) if self.kind == "SGD" else 2

    def batches(self, steps: int | None = None) -> Batches:
        """Random numbers that lie in memory."""
        torch.manual_seed(0)
        steps = self.steps if steps is None else steps
        few = [
            (torch.randn(self.batch, *self.shape), torch.randint(self.classes, (self.batch,)))
            for _ in range(min(steps, 8))
        ]
        return [few[i % len(few)] for i in range(steps)]


def vgg_head() -> nn.Module:
    """`vgg16().classifier` of the tutorial, for two classes."""
    return nn.Sequential(
        nn.Linear(25088, 4096), nn.ReLU(True), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout(),
        nn.Linear(4096, 2),
    )  # fmt: skip


def resnet18() -> nn.Module:
    """torchvision's, for ten classes."""
    from torchvision.models import resnet18

    net: nn.Module = resnet18(num_classes=10)
    return net


def head(batch: int, steps: int, kind: str = "SGD") -> Case:
    """The tutorial trains it with SGD and momentum."""
    by = "" if kind == "SGD" else f" by {kind}"
    name = f"head of VGG16{by} (25088-4096-4096-2), batches of {batch}"
    return Case(name, vgg_head, (25088,), batch, 2, steps, lr=0.0001, momentum=0.5, kind=kind)


MNIST = Case("MnistNet, batches of 32", cnnrs.models.MnistNet, (1, 28, 28), 32, 10, 500, F.nll_loss)
CATDOG = Case("CatDogNet, batches of 32", cnnrs.models.CatDogNet, (3, 224, 224), 32, 2, 3, F.nll_loss)


def whole(name: str, batch: int, steps: int, size: int = 224) -> Case:
    """A network as people fine-tune it, for ten classes."""
    title = f"{name} at {size} x {size}, batches of {batch}"
    # Few batches of random numbers again and again: with larger steps the loss of some grows without end.
    return Case(title, lambda: network(name), (3, size, size), batch, 10, steps, lr=1e-4, momentum=0.9)


def network(name: str) -> nn.Module:
    """One of torchvision for ten classes, or "efficientnet_lite0", which a package of its own has, or timm.

    Raises:
        ImportError: neither of the two is installed.
    """
    if name != "efficientnet_lite0":
        from torchvision.models import get_model

        found: nn.Module = get_model(name, num_classes=10)
        return found
    try:
        package = import_module("efficientnet_lite_pytorch")
    except ImportError:
        made: nn.Module = import_module("timm").create_model(name, num_classes=10)
        return made
    lite: nn.Module = package.EfficientNet.from_name("efficientnet-lite0", num_classes=10)
    return lite


def is_there(name: str) -> bool:
    """Whether :func:`network` can make it."""
    packages = ["efficientnet_lite_pytorch", "timm"] if name == "efficientnet_lite0" else ["torchvision"]
    return any(find_spec(package) is not None for package in packages)


def partly(name: str, batch: int, steps: int, trained: list[str]) -> Case:
    """The same with all but some layers frozen, batch norm's statistics included."""
    case = whole(name, batch, steps)

    def make() -> nn.Module:
        model = cnnrs.freeze(case.make(), statistics=True)
        for layer in trained:
            cnnrs.unfreeze(model.get_submodule(layer))
        return model

    return replace(case, name=f"{case.name}, only {' and '.join(trained)}", make=make)


def contenders(case: Case, engines: list[str] | None = None) -> list[Contender]:
    """The loop and the engines, each with a model and an optimizer of its own; None: all that can run it."""
    batches = case.batches()

    def contender(name: str, epoch: Callable[[nn.Module, torch.optim.Optimizer], object]) -> Contender:
        model = case.make()
        optimizer = case.optimizer(model)

        def run() -> int:
            epoch(model, optimizer)
            return len(batches)

        return Contender(name, run)

    def ours(engine: Any) -> Contender:
        return contender(
            f"cnnrs.fit, engine={engine!r}",
            lambda model, optimizer: cnnrs.fit(
                0, model, batches, optimizer=optimizer, loss_fn=case.loss_fn, engine=engine, verbose=False
            ),
        )

    if engines is None:
        engines = ["auto"] if case.shape == (25088,) else ["auto", "cpu"]
        if companion.problem() is None:
            engines.append("torch")
    return [
        contender(
            "the tutorial's loop", lambda model, optimizer: tutorials_fit(model, batches, optimizer, case.loss_fn)
        ),
        *map(ours, engines),
    ]


def tutorials_fit(model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer, loss_fn: Callable) -> None:
    """The tutorial's training phase, word for word but for `Variable`, which torch has long merged into tensors."""
    model.train()
    running_loss = 0.0
    running_correct = 0
    for data, target in batches:
        optimizer.zero_grad()
        output = model(data)
        loss = loss_fn(output, target)
        running_loss += loss_fn(output, target, reduction="sum").item()
        preds = output.data.max(dim=1, keepdim=True)[1]
        running_correct += preds.eq(target.data.view_as(preds)).cpu().sum()
        loss.backward()
        optimizer.step()
