"""A network, its batches and a stand-in for CUDA graphs, for tests of steps that are recorded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import tutorial
from cnnrs.engine import cuda_capture

Data = list[tuple[torch.Tensor, torch.Tensor]]
FULL = 8
#: Two epochs' batches: several windows of losses, a shorter batch at the end.
SIZES = (FULL,) * 19 + (3,)


class Net(nn.Module):
    """The tutorial's kind of network with batch norm: random numbers, running statistics, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3)
        self.drop = nn.Dropout2d(0.3)
        self.fc1 = nn.Linear(36, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        x = F.relu(self.drop(self.conv2(x)))
        x = F.dropout(F.relu(self.fc1(x.reshape(-1, 36))), training=self.training)
        return F.log_softmax(self.fc2(x), 1)


class Recorder:
    """Stands in for CUDA: remembers the step, and that gradients are written where they were recorded."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        #: What the recorded model trains; one that validates has no gradients.
        self.parameters: Callable[[], list[torch.Tensor]] = list

    def watch(self, model: nn.Module, trained: nn.Module | None = None) -> None:
        parameters = [p for p in (trained or model).parameters() if p.requires_grad]
        self.parameters = lambda: parameters if model.training else []

    def __call__(self, work: Callable[[], None], stream: Any) -> Callable[[], None]:
        self.recorded += 1
        parameters = self.parameters()
        memory = [torch.full_like(p, math.nan) for p in parameters]
        for p, gradient in zip(parameters, memory, strict=True):
            p.grad = gradient

        def replay() -> None:
            self.replayed += 1
            python_sees = [p.grad for p in parameters]
            work()
            for p, gradient, seen in zip(parameters, memory, python_sees, strict=True):
                assert p.grad is not None
                gradient.copy_(p.grad)
                p.grad = seen

        return replay


class Counting(Recorder):
    """CUDA itself, or a device that is none, counted."""

    def __call__(self, work: Callable[[], None], stream: Any) -> Callable[[], None]:
        self.recorded += 1
        # The device that is none draws from the CPU's generator, also while it records.
        drawn = torch.get_rng_state()
        try:
            replay = cuda_capture._record(work, stream)
        finally:
            torch.set_rng_state(drawn)

        def counted() -> None:
            self.replayed += 1
            replay()

        return counted


def batches(device: str, sizes: tuple[int, ...] = SIZES, seed: int = 5) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 1, 10, 10, generator=generator).to(device),
         torch.randint(5, (n,), generator=generator).to(device))
        for n in sizes
    ]  # fmt: skip


def twins(
    device: str, recorder: Recorder, theirs: Callable[..., Any], ours: Callable[..., Any] | None = None
) -> tuple[nn.Module, Any, nn.Module, Any]:
    """The model of the plain loop with its optimizer, and ours."""
    torch.manual_seed(2)
    a = Net().to(device)
    b = copy.deepcopy(a)
    recorder.watch(b)
    return a, rounded(theirs(a.parameters())), b, (ours or theirs)(b.parameters())


def rounded(optimizer: Any) -> Any:
    """The same with the learning rates that a recorded step has: float32, as tensors, which fused kernels read."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            group["lr"] = torch.tensor(group["lr"])
    return optimizer


def fit(model: nn.Module, optimizer: Any, data: Any, phase: Any = "training", **options: Any) -> tuple[float, float]:
    options = {"loss_fn": F.nll_loss, "engine": "auto", "verbose": False} | options
    return cnnrs.fit(options.pop("epoch", 0), model, data, phase, optimizer=optimizer, **options)


def random_state(device: str) -> torch.Tensor:
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()


def assert_same(a: nn.Module, a_optimizer: Any, b: nn.Module, b_optimizer: Any) -> None:
    """Weights, running statistics, gradients and the optimizer's state, bit by bit."""
    assert tutorial.same(a.state_dict(), b.state_dict())
    assert tutorial.same(a_optimizer.state_dict()["state"], b_optimizer.state_dict()["state"])
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad), name


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, fused=True)
