"""`fit` of the tutorial's networks: its own loop, fused and compiled ones, and ours; batches lie on the device."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fit_cases import CATDOG, MNIST, Batches, Case, tutorials_fit, vgg_head
from measure import Contender
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cnnrs
from gpu import part, titles
from gpu.by_hand import compiler_is_missing
from gpu.scale import Scale
from gpu.titles import CALLED, COMPILED, EAGER, FIT, FUSED, GATHERED, GRAPHS, HALF, LOADED, ROWS
from gpu.trial import Trial

Epoch = Callable[[nn.Module, torch.optim.Optimizer], object]


def trials(scale: Scale) -> Iterator[Trial]:
    """The tutorial's three trainings; the head once more with its loading."""
    warnings.filterwarnings("ignore", message="dropout2d: Received a 2-D input")
    missing = compiler_is_missing(scale)
    notes = [f"torch.compile: not run ({missing})."] if missing else []
    for case in cases(scale):
        title = f"{case.name}, batches of {case.batch}"
        yield Trial(title, "ms/step", contenders(case, scale), scale.rounds, notes=notes)
    head = cases(scale)[-1]
    yield Trial(f"{LOADED}, batches of {head.batch}", "ms/step", loaded(head, scale), scale.rounds)


def cases(scale: Scale) -> list[Case]:
    """MnistNet, CatDogNet, and the head on features of the scale's width."""
    width = scale.width

    def head() -> nn.Module:
        layers: Any = vgg_head() if width == 25088 else nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 2))
        return layers

    digits, photos, rows = scale.steps
    return [
        replace(MNIST, name=titles.MNIST, steps=digits),
        replace(CATDOG, name=titles.CATDOG, batch=scale.samples, steps=photos),
        Case(titles.HEAD, head, (width,), 64, 2, rows, F.cross_entropy, lr=0.0001, momentum=0.5),
    ]


def contender(case: Case, scale: Scale, name: str, epoch: Epoch, **options: Any) -> Contender:
    """With a model and an optimizer of its own, which gets ``options``; every round ends with all work done."""
    model = case.make().to(scale.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr, momentum=case.momentum, **options)

    def run() -> int:
        epoch(model, optimizer)
        scale.wait()
        return case.steps

    return Contender(name, run)


def contenders(case: Case, scale: Scale) -> list[Contender]:
    """On the same batches, which lie on the device."""
    make = partial(contender, case, scale)
    batches = [(x.to(scale.device), y.to(scale.device)) for x, y in case.batches()]

    def ours(name: str, **options: Any) -> Contender:
        return make(name, partial(fit, batches, case, **options))

    def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        tuned_loop(model, batches, optimizer, case.loss_fn)

    made = [
        make(EAGER, lambda model, optimizer: tutorials_fit(model, batches, optimizer, case.loss_fn)),
        make(FUSED, by_hand, fused=True),
    ]
    if not compiler_is_missing(scale):
        made.append(make(COMPILED, Compiled(batches, case, backend=scale.backend), fused=True))
        # The compiler's own CUDA graphs: worth their half minute where launches are all there is.
        if case.name == titles.MNIST and scale.backend == "inductor":
            made.append(make(GRAPHS, Compiled(batches, case, mode="reduce-overhead"), fused=True))
    return [*made, ours(CALLED, engine="python"), ours(FIT), ours(HALF, amp="bf16", memory_format=torch.channels_last)]


def fit(batches: Any, case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
    """One epoch of ours."""
    cnnrs.fit(0, model, batches, optimizer=optimizer, loss_fn=case.loss_fn, verbose=False, **options)


class Compiled:
    """:func:`tuned_loop` over a compiled model, which is compiled when it is first called."""

    def __init__(self, batches: Batches, case: Case, **options: Any) -> None:
        self.batches = batches
        self.case = case
        self.options = options
        self.model: Any = None

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.model is None:
            self.model = torch.compile(model, **self.options)
        tuned_loop(self.model, self.batches, optimizer, self.case.loss_fn)


def tuned_loop(
    model: nn.Module, batches: Any, optimizer: torch.optim.Optimizer, loss_fn: Callable[..., torch.Tensor]
) -> tuple[float, int]:
    """The tutorial's loop by someone who knows CUDA: loss and hits add up on the device, the host waits once."""
    model.train()
    sums: Any = [0.0, 0]
    for data, target in batches:
        optimizer.zero_grad()
        output = model(data)
        loss = loss_fn(output, target)
        loss.backward()
        optimizer.step()
        sums[0] += loss.detach() * len(data)
        sums[1] += (output.detach().argmax(1) == target).sum()
    return float(sums[0]), int(sums[1])


def loaded(case: Case, scale: Scale) -> list[Contender]:
    """Shuffled rows, from the host's memory and from the device's."""
    make = partial(contender, case, scale)
    count = case.steps * case.batch
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, *case.shape, generator=generator).relu_()
    labels = torch.randint(case.classes, (count,), generator=generator)
    theirs = DataLoader(TensorDataset(rows, labels), case.batch, shuffle=True, pin_memory=scale.device == "cuda")
    ours = cnnrs.DataLoader(cnnrs.FeatureDataset(rows, labels), case.batch, shuffle=True, device=scale.device)
    there = rows.to(scale.device), labels.to(scale.device)

    def moved() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for data, target in theirs:
            yield data.to(scale.device, non_blocking=True), target.to(scale.device, non_blocking=True)

    def gathered() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(count, device=scale.device)
        for chosen in order.split(case.batch):
            yield there[0][chosen], there[1][chosen]

    def by_hand(batches: Callable[[], Any]) -> Epoch:
        return lambda model, optimizer: tuned_loop(model, batches(), optimizer, case.loss_fn)

    return [
        make("torch's DataLoader, pinned; no waiting, fused=True", by_hand(moved), fused=True),
        make(GATHERED, by_hand(gathered), fused=True),
        make("cnnrs.fit, cnnrs.DataLoader(device=)", partial(fit, ours, case)),
        make(ROWS, partial(fit, cnnrs.DataLoader(cnnrs.FeatureDataset(*there), case.batch, shuffle=True), case)),
    ]


if __name__ == "__main__":
    part.main("fit", trials)
