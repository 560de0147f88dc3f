"""One epoch of training: the tutorial's loop against `cnnrs.fit` on each engine, on batches that lie in memory."""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import Comparison, Contender
from torch import nn

import cnnrs

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def comparisons() -> list[Comparison]:
    """The tutorial's two networks and the head of VGG16."""
    warnings.filterwarnings("ignore", message="dropout2d: Received a 2-D input")
    return [
        Comparison(
            "Training: MnistNet, batches of 32, SGD",
            "ms/step",
            contenders(cnnrs.models.MnistNet, (1, 28, 28), 10, 150, F.nll_loss, lambda p: torch.optim.SGD(p, lr=0.01)),
        ),
        Comparison(
            "Training: CatDogNet, batches of 32, SGD",
            "ms/step",
            contenders(cnnrs.models.CatDogNet, (3, 224, 224), 2, 4, F.nll_loss, lambda p: torch.optim.SGD(p, lr=0.01)),
            rounds=3,
        ),
        Comparison(
            "Training: head of VGG16 (25088-4096-4096-2), batches of 32, SGD with momentum",
            "ms/step",
            contenders(
                vgg_head, (25088,), 2, 4, F.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.0001, momentum=0.5)
            ),
            rounds=3,
        ),
    ]


def contenders(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    classes: int,
    steps: int,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: Callable[..., torch.optim.Optimizer],
) -> list[Contender]:
    """The loop and the engines, each with a model and an optimizer of its own."""
    torch.manual_seed(0)
    batches = [(torch.randn(32, *shape), torch.randint(classes, (32,))) for _ in range(steps)]

    def contender(name: str, epoch: Callable[[nn.Module, torch.optim.Optimizer], object]) -> Contender:
        model = make()
        step = optimizer(model.parameters())

        def run() -> int:
            epoch(model, step)
            return steps

        return Contender(name, run)

    def ours(engine: str) -> Contender:
        return contender(
            f"cnnrs.fit, engine={engine!r}",
            lambda model, step: cnnrs.fit(
                0, model, batches, optimizer=step, loss_fn=loss_fn, engine=engine, verbose=False
            ),
        )

    return [
        contender("the tutorial's loop", lambda model, step: tutorials_fit(model, batches, step, loss_fn)),
        *(ours(engine) for engine in ("auto", "torch", "python")),
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


def vgg_head() -> nn.Module:
    """`vgg16().classifier` of the tutorial, for two classes."""
    return nn.Sequential(
        nn.Linear(25088, 4096), nn.ReLU(True), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout(),
        nn.Linear(4096, 2),
    )  # fmt: skip
