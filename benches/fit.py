"""Training: the tutorial's loop against `cnnrs.fit` on each engine."""

import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from measure import Comparison, Contender, show
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

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD, as in the tutorial."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=self.lr, momentum=self.momentum)

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


def head(batch: int, steps: int) -> Case:
    """The tutorial trains it with momentum."""
    name = f"head of VGG16 (25088-4096-4096-2), batches of {batch}"
    return Case(name, vgg_head, (25088,), batch, 2, steps, lr=0.0001, momentum=0.5)


MNIST = Case("MnistNet, batches of 32", cnnrs.models.MnistNet, (1, 28, 28), 32, 10, 500, F.nll_loss)
CATDOG = Case("CatDogNet, batches of 32", cnnrs.models.CatDogNet, (3, 224, 224), 32, 2, 3, F.nll_loss)
CASES = [
    MNIST,
    CATDOG,
    # As many steps as a hundred photos make.
    head(5, 20),
    head(32, 3),
    head(64, 2),
    Case("SimpleCNN, batches of 32", cnnrs.models.SimpleCNN, (3, 32, 32), 32, 10, 30),
    Case("resnet18 at 64 x 64, batches of 32", resnet18, (3, 64, 64), 32, 10, 3, momentum=0.9),
]


def whole(name: str, batch: int, steps: int, size: int = 224) -> Case:
    """A network of torchvision as people fine-tune it, for ten classes."""
    from torchvision.models import get_model

    title = f"{name} at {size} x {size}, batches of {batch}"
    return Case(title, lambda: get_model(name, num_classes=10), (3, size, size), batch, 10, steps, momentum=0.9)


def partly(name: str, batch: int, steps: int, trained: list[str]) -> Case:
    """The same with all but some layers frozen, batch norm's statistics included."""
    case = whole(name, batch, steps)

    def make() -> nn.Module:
        model = cnnrs.freeze(case.make(), statistics=True)
        for layer in trained:
            cnnrs.unfreeze(model.get_submodule(layer))
        return model

    return replace(case, name=f"{case.name}, only {' and '.join(trained)}", make=make)


#: "auto" calls these. As many steps as tell what an epoch costs: each one looks at the model once, a tenth of a second.
CALLED = [
    whole("resnet18", 32, 8, size=64),
    whole("resnet18", 16, 4),
    whole("resnet50", 8, 1),
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
    """The tutorial's networks and heads, networks people fine-tune, validation; what a step costs and why.

    One after the other: together their models would fill the memory.
    """
    warnings.filterwarnings("ignore", message="dropout2d: Received a 2-D input")
    for case in CASES:
        yield Comparison(f"Training: {case.name}", "ms/step", contenders(case), rounds=5)
    for case in CALLED:
        yield AgainstBetter(f"Training: {case.name}, whole", "ms/step", both_orders(case))
    for case in PARTLY:
        yield AgainstBetter(f"Training: {case.name}", "ms/step", both_orders(case))
    for case in VALIDATED:
        yield AgainstBetter(f"Validation: {case.name}", "ms/batch", validations(case))
    yield Comparison("Training: MnistNet, batches of 32, loading included", "ms/step", with_loader(), rounds=3)
    yield Sweep()
    yield Limits([MNIST, CATDOG, *(head(batch, 2) for batch in (5, 32, 64))])


def contenders(case: Case) -> list[Contender]:
    """The loop and the engines, each with a model and an optimizer of its own."""
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

    engines = ["auto"] if case.shape == (25088,) else ["auto", "cpu"]
    if companion.problem() is None:
        engines.append("torch")
    return [
        contender(
            "the tutorial's loop", lambda model, optimizer: tutorials_fit(model, batches, optimizer, case.loss_fn)
        ),
        *map(ours, engines),
    ]


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


class Sweep:
    """MnistNet: how the cost of a step grows with the batch."""

    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

    def measure(self) -> "Sweep":
        """Both in turn, the smallest of five rounds."""
        self.rows = []
        for size in self.sizes:
            case = Case("", MNIST.make, MNIST.shape, size, 10, max(64, min(512, 8192 // size)), F.nll_loss)
            loop, ours = contenders(case)[:2]
            best = [float("inf")] * 2
            for _ in range(6):
                for i, contender in enumerate((loop, ours)):
                    start = time.perf_counter()
                    steps = contender.run()
                    best[i] = min(best[i], (time.perf_counter() - start) / steps)
            self.rows.append((size, best))
        return self

    def table(self) -> str:
        """Milliseconds per step and digits per second."""
        lines = [
            "### Training: MnistNet, cost of a step by batch size",
            "",
            "Smallest of 5 rounds after one to warm up, data in memory.",
            "",
            "| batch | tutorial's loop, ms | cnnrs.fit, ms | times as fast | cnnrs.fit, digits/s |",
            "|---:|---:|---:|---:|---:|",
        ]
        for size, (loop, ours) in self.rows:
            figures = (show(1e3 * loop), show(1e3 * ours), f"{loop / ours:.1f}", show(size / ours))
            lines.append(f"| {size} | {' | '.join(figures)} |")
        return "\n".join([*lines, ""])


class Limits:
    """What a step costs against what the machine could do at best."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases

    def measure(self) -> "Limits":
        """Compile time, memory, steps per second and the share of the arithmetic's or the memory's limit."""
        self.flops, self.bandwidth = _peaks()
        self.rows = []
        for case in self.cases:
            model = case.make()
            optimizer = case.optimizer(model)

            def epoch(steps: int, case: Case = case, model: nn.Module = model, optimizer: Any = optimizer) -> float:
                batches = case.batches(steps)
                start = time.perf_counter()
                cnnrs.fit(0, model, batches, optimizer=optimizer, loss_fn=case.loss_fn, engine="cpu", verbose=False)
                return time.perf_counter() - start

            case.batches(1)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            first = epoch(1)
            memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            second = statistics.median(epoch(1) for _ in range(3))
            step = min(epoch(case.steps) for _ in range(3)) / case.steps
            # Backward is twice forward; less for the first layer, hence an upper bound.
            work = 3 * case.batch * sum(layer.flops or 0 for layer in cnnrs.summary(model, (1, *case.shape)).layers)
            # Weights: read forward, read for the input's gradient, read and written by the update; momentum likewise.
            traffic = 4 * sum(p.numel() for p in model.parameters()) * (4 + 2 * (case.momentum > 0))
            limit = max(work / self.flops, traffic / self.bandwidth)
            bound = "arithmetic" if work / self.flops > traffic / self.bandwidth else "memory"
            self.rows.append((case.name, max(0.0, first - second), memory, 1 / step, limit / step, bound))
        return self

    def table(self) -> str:
        """One row per network."""
        lines = [
            "### Training: engine `cpu` against the machine's limits",
            "",
            f"Limits measured here with libtorch: {show(self.flops / 1e9)} GFLOP/s (product of two 2048 x 2048 "
            f"matrices) and {show(self.bandwidth / 1e9)} GB/s (one pass over 256 MiB, read and written). A step needs "
            "three times the forward pass's arithmetic, and weights (and momentum) cross the bus four (six) times; "
            "skipping zeros of ReLU and dropout can beat that. Compiling: the first step of a model minus a later "
            "one, pages of the optimizer's new state included.",
            "",
            "| network | compiling, ms | peak memory above the model's, MiB | steps/s | share of limit | bound by |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for name, compiling, memory, rate, share, bound in self.rows:
            figures = (show(1e3 * compiling), show(memory), show(rate), f"{100 * share:.0f} %", bound)
            lines.append(f"| {name} | {' | '.join(figures)} |")
        return "\n".join([*lines, ""])


def _peaks() -> tuple[float, float]:
    a, x = torch.randn(2048, 2048), torch.zeros(1 << 26)
    products, passes = [], []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        products.append(time.perf_counter() - start)
        start = time.perf_counter()
        x.add_(1.0)
        passes.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(products), 2 * 4 * x.numel() / min(passes)


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
