"""Random small models and training runs, compared with the plain loop and with the module itself.

Everything is decided by a number: `python tests/python/random_models.py --seed 17 --count 1` does one again, and says
which of its steps are needed to fail. Each step is built for the shape it gets, so any may be left out.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs.engine import companion

Batches = list[tuple[torch.Tensor, torch.Tensor]]
CLASSES = 3
#: How often an engine that was asked for has refused a model.
REFUSED: Counter[str] = Counter()


class Step(nn.Module):
    """One thing that forwards do, to values of (N, channels, 8, 8)."""

    def __init__(self, kind: str, seed: str, channels: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.kind = kind
        self.inplace = rng.random() < 0.4
        self.slope = rng.choice([0.01, 0.2, 1.5])
        self.name = rng.choice(["relu", "sigmoid", "tanh", "silu", "gelu", "leaky_relu", "hardswish", "relu6"])
        self.form = rng.randrange(4)
        self.out = rng.choice([channels, 4, 6])
        self.calls = 0
        self.log: dict[str, int] = {}
        kernel, group = rng.choice([1, 3, 5]), rng.choice([1, 1, 2])
        layers: dict[str, Callable[[], nn.Module]] = {
            "conv": lambda: nn.Conv2d(channels, self.out, kernel, padding=kernel // 2, bias=rng.random() < 0.7),
            "grouped": lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=group if channels % 2 == 0 else 1),
            "norm": lambda: nn.BatchNorm2d(channels, momentum=rng.choice([0.1, 0.3, None]), affine=rng.random() < 0.8),
            "relu": lambda: nn.ReLU(self.inplace),
            "leaky": lambda: nn.LeakyReLU(self.slope, self.inplace),
            "smooth": lambda: rng.choice([nn.SiLU(self.inplace), nn.GELU(), nn.Sigmoid(), nn.Tanh(), nn.Hardswish()]),
            "dropout": lambda: rng.choice([nn.Dropout(0.0), nn.Dropout2d(0.0), nn.Dropout(0.0, self.inplace)]),
            "pool": lambda: rng.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)]),
        }
        needs = {"context": "conv", "shared": "grouped", "counter": "grouped", "residual": "grouped", "asks": "grouped"}
        made = layers.get(needs.get(kind, kind))
        self.layer = made() if made is not None else None
        if kind == "scale":
            self.gamma = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        if kind == "unused":
            self.gamma = nn.Parameter(torch.rand(3))
        if kind in ("context", "conv"):
            self.channels = self.out
        else:
            self.channels = channels * 2 if kind == "cat" else channels
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        does: Any = getattr(self, f"_{self.kind}", None)
        return does(x) if does is not None else self.layer(x)  # type: ignore[misc]

    def _function(self, x: torch.Tensor) -> torch.Tensor:
        if self.name == "leaky_relu":
            return F.leaky_relu(x, self.slope, self.inplace)
        if self.name in ("relu", "silu", "hardswish", "relu6"):
            return getattr(F, self.name)(x, inplace=self.inplace)
        return getattr(F, self.name)(x)

    def _method(self, x: torch.Tensor) -> torch.Tensor:
        # Not a table of functions over x: what encloses a function is looked at, so it would be refused.
        if self.form == 0:
            return x.relu()
        if self.form == 1:
            return x.relu_()
        return torch.sigmoid(x) if self.form == 2 else x.tanh()

    def _residual(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)  # type: ignore[misc]
        if self.form == 0:
            return x + y
        if self.form == 1:
            return y.add_(x)
        return torch.add(y, x) if self.form == 2 else y.mul(x)

    def _alias(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(x)
        out = y
        if self.form == 0:
            out += x
        elif self.form == 1:
            F.relu(out, inplace=True)
        elif self.form == 2:
            out = out.view(out.shape)
            out.add_(x)
        else:
            out = out * x
        return y + x

    def _context(self, x: torch.Tensor) -> torch.Tensor:
        contexts: list[Any] = [
            torch.no_grad, torch.enable_grad, lambda: torch.set_grad_enabled(False),
            lambda: torch.autocast("cpu", torch.bfloat16),
        ]  # fmt: skip
        with contexts[self.form]():
            y = self.layer(x)  # type: ignore[misc]
        return y.float() if self.form == 3 else y

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x)))  # type: ignore[misc]

    def _counter(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == 0:
            self.steps += 1
        elif self.form == 1:
            self.calls += 1
        elif self.form == 2:
            self.log["calls"] = self.log.get("calls", 0) + 1
        else:
            self.steps = self.steps + self.training
        return self.layer(x)  # type: ignore[misc]

    def _asks(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == 0:
            answer = isinstance(x, torch.Tensor)
        elif self.form == 1:
            answer = hasattr(x, "numpy")
        else:
            answer = x.dtype == torch.float32 if self.form == 2 else x.dim() == 4
        return self.layer(x) if answer else x  # type: ignore[misc]

    def _detach(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.detach() if self.form < 2 else x * torch.sigmoid(x)

    def _scale(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma if self.form < 2 else self.gamma * x

    def _cat(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.relu(x)] if self.form < 2 else [x, x], 1)

    def _moved(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        if c % 2:
            return x
        if self.form == 0:
            return torch.cat(x.chunk(2, dim=1)[::-1], 1)
        if self.form == 1:
            a, b = torch.split(x, c // 2, dim=1)
            x = torch.cat([a, torch.tanh(b)], 1)
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2)
        return x.contiguous().view(n, c, h, w) if self.form < 3 else x.reshape(n, -1, h, w)

    def _unused(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _draws(self, x: torch.Tensor) -> torch.Tensor:
        return x if random.random() < 2 else torch.sigmoid(x)


KINDS = (
    ["conv", "grouped", "norm", "relu", "leaky", "smooth", "pool", "function", "method", "residual"] * 3
    + ["dropout", "alias", "alias", "context", "shared", "counter", "asks", "detach", "scale", "cat", "unused", "draws"]
    + ["moved"] * 2
)  # fmt: skip


class Net(nn.Module):
    """Steps, then a head of one of the usual forms."""

    def __init__(self, seed: int, without: Sequence[int] = ()) -> None:
        super().__init__()
        rng = random.Random(f"net {seed}")
        torch.manual_seed(seed)
        self.inputs = rng.choice([1, 3])
        kinds = ["conv", *rng.choices(KINDS, k=rng.randint(1, 7))]
        channels, steps = self.inputs, []
        for i, kind in enumerate(kinds):
            if i in without or (kind == "cat" and channels > 8):
                continue
            steps.append(Step(kind, f"{seed} {i}", channels))
            channels = steps[-1].channels
        self.steps = nn.ModuleList(steps)
        self.ends = rng.randrange(4)
        self.head = nn.Linear(channels * 64 if self.ends < 2 else channels, CLASSES)
        self.log = rng.random() < 0.5
        self.count = len(kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        if self.ends == 0:
            x = x.flatten(1)
        elif self.ends == 1:
            x = x.reshape(x.size(0), -1)
        else:
            x = x.mean((2, 3)) if self.ends == 2 else torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        x = self.head(x)
        return F.log_softmax(x, dim=1) if self.log else x

    def said(self) -> str:
        parts = [f"{s.kind}{s.form}" for s in self.steps]
        return " ".join([f"{self.inputs} channels:", *parts, f"end{self.ends}", "log_softmax" * self.log])


class Training:
    """Options of one run, the same for every model of a seed."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"training {seed}")
        torch.manual_seed(seed + 1)
        self.accumulate = rng.choice([1, 1, 1, 2])
        self.clip = rng.choice([{}, {}, {"clip_grad_norm": 0.5}, {"clip_grad_value": 0.1}])
        self.frozen = rng.random() < 0.25
        self.split = rng.random() < 0.3
        self.kind = rng.choice(["SGD", "SGD", "Adam", "AdamW"])
        sgd: dict[str, Any] = {"lr": 0.05, "momentum": rng.choice([0, 0.9]), "weight_decay": rng.choice([0, 0.01])}
        sgd |= rng.choice([{}, {"maximize": True}, {"dampening": 0.2}, {"nesterov": True} if sgd["momentum"] else {}])
        # A large eps: with the usual one the sign of a gradient that is rounding only decides.
        adam: dict[str, Any] = {"lr": 0.01, "eps": 1e-2, "weight_decay": rng.choice([0, 0.1])}
        adam |= rng.choice([{}, {"amsgrad": True}, {"maximize": True}, {"betas": (0.5, 0.9)}, {"foreach": True}])
        self.options = sgd if self.kind == "SGD" else adam
        weights = torch.tensor([0.5, 1.0, 2.0])
        losses = [
            F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(weight=weights),
            lambda outputs, targets: F.cross_entropy(outputs, targets) + 0.01 * outputs.square().mean(),
        ]  # fmt: skip
        self.loss: Any = rng.choice(losses)
        self.sizes = rng.choice([(6, 6, 6), (6, 6, 2), (4, 4), (5,)])

    def optimizer(self, model: Net) -> torch.optim.Optimizer:
        if self.frozen and len(model.steps):
            model.steps[0].requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups: Any = parameters
        if self.split and len(parameters) > 2:
            groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.02}]
        return getattr(torch.optim, self.kind)(groups, **self.options)

    def batches(self, model: Net) -> Batches:
        generator = torch.Generator().manual_seed(4)
        return [
            (torch.randn(n, model.inputs, 8, 8, generator=generator), torch.randint(CLASSES, (n,), generator=generator))
            for n in self.sizes
        ]

    def plain_loop(self, model: Net, optimizer: torch.optim.Optimizer) -> None:
        model.train()
        batches = self.batches(model)
        optimizer.zero_grad()
        for i, (x, y) in enumerate(batches):
            (self.loss(model(x), y) / self.accumulate if self.accumulate > 1 else self.loss(model(x), y)).backward()
            if (i + 1) % self.accumulate == 0 or i + 1 == len(batches):
                held = [p for group in optimizer.param_groups for p in group["params"]]
                if "clip_grad_norm" in self.clip:
                    nn.utils.clip_grad_norm_(held, self.clip["clip_grad_norm"])
                if "clip_grad_value" in self.clip:
                    nn.utils.clip_grad_value_(held, self.clip["clip_grad_value"])
                optimizer.step()
                optimizer.zero_grad()

    def fit(self, model: Net, optimizer: torch.optim.Optimizer, engine: Any) -> None:
        cnnrs.fit(
            0, model, self.batches(model), optimizer=optimizer, loss_fn=self.loss, accumulate=self.accumulate,
            engine=engine, verbose=False, **self.clip,
        )  # fmt: skip


def attempt(work: Callable[[], object]) -> str:
    """What kind of exception ended it, "" for none."""
    try:
        work()
    except cnnrs.UnsupportedModelError:
        return "refused"
    except Exception as error:
        return type(error).__name__
    return ""


def apart(ours: Any, theirs: Any, exact: bool) -> str:
    """Where two values differ, "" if nowhere."""
    if type(ours) is not type(theirs):
        return f"a {type(ours).__name__}, not a {type(theirs).__name__}"
    if isinstance(theirs, torch.Tensor):
        if ours.shape != theirs.shape:
            return f"of shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        if exact:
            return "" if torch.equal(ours, theirs) else f"by {(ours - theirs).abs().max():.2g}"
        # A few steps of another order of sums, through ReLUs that may let another value pass.
        gap = (ours.double() - theirs.double()).abs().max() if theirs.numel() else 0.0
        size = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
        return "" if gap <= 2e-3 * size else f"by {gap:.2g} of {size:.2g}"
    if isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return f"keys {sorted(map(str, ours))} against {sorted(map(str, theirs))}"
        found = ((key, apart(ours[key], value, exact)) for key, value in theirs.items())
        return next((f"{key}: {text}" for key, text in found if text), "")
    if isinstance(theirs, (list, tuple)):
        return next((text for a, b in zip(ours, theirs, strict=True) if (text := apart(a, b, exact))), "")
    return "" if ours == theirs else f"{ours} against {theirs}"


def attributes(model: Net) -> list[Any]:
    return [(step.calls, dict(step.log), step.training) for step in model.steps]


def fit_failure(seed: int, engine: str, without: Sequence[int] = ()) -> str:
    """How `fit` on an engine differs from the plain loop, "" if in nothing."""
    training = Training(seed)
    theirs = Net(seed, without)
    ours = copy.deepcopy(theirs)
    their_optimizer, our_optimizer = training.optimizer(theirs), training.optimizer(ours)
    if not any(p.requires_grad for p in theirs.parameters()):
        return ""
    random.seed(1)
    expected = attempt(lambda: training.plain_loop(theirs, their_optimizer))
    drawn = random.random()
    random.seed(1)
    got = attempt(lambda: training.fit(ours, our_optimizer, engine))
    if got == "refused" and engine != "auto":
        REFUSED[f"fit on {engine}"] += 1
        return ""
    if expected or got:
        return "" if bool(expected) == bool(got) else f"raises {got or 'nothing'}, the loop {expected or 'nothing'}"
    # What "auto" picks may round otherwise.
    exact = engine in ("torch", "python")
    if text := apart(ours.state_dict(), theirs.state_dict(), exact):
        return f"weights: {text}"
    if text := apart(our_optimizer.state_dict(), their_optimizer.state_dict(), exact):
        return f"optimizer: {text}"
    if attributes(ours) != attributes(theirs):
        return f"attributes: {attributes(ours)} against {attributes(theirs)}"
    return "" if random.random() == drawn else "other random numbers were drawn"


def features_failure(seed: int, engine: str, without: Sequence[int] = ()) -> str:
    """How `preconv` on an engine differs from the module, "" if in nothing."""
    model = Net(seed, without).eval()
    theirs = copy.deepcopy(model)
    data = Training(seed).batches(model)
    with torch.no_grad():
        expected = torch.cat([theirs(x.clone()) for x, _ in data])
    made: list[torch.Tensor] = []
    got = attempt(lambda: made.append(cnnrs.preconv(data, model, engine=engine, verbose=False).features))  # type: ignore[arg-type]
    if got == "refused" and engine != "auto":
        REFUSED[f"preconv on {engine}"] += 1
        return ""
    if got:
        return f"raises {got}"
    exact = engine in ("torch", "python")
    gap = apart(made[0], expected, exact) or apart(model.state_dict(), theirs.state_dict(), exact)
    return gap or ("" if attributes(model) == attributes(theirs) else "attributes")


CHECKS = {"fit": fit_failure, "preconv": features_failure}


def failures(seed: int, engines: Sequence[str], without: Sequence[int] = ()) -> list[tuple[str, str, str]]:
    """(what, engine, how it differs) of one seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [(what, engine, check(seed, engine, without)) for what, check in CHECKS.items() for engine in engines]
    return [one for one in found if one[2]]


def shrunk(seed: int, what: str, engine: str) -> tuple[str, str]:
    """The fewest steps that fail, found by leaving out one after the other, and how they fail."""
    without: list[int] = []
    for i in range(Net(seed).count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if CHECKS[what](seed, engine, [*without, i]):
                without.append(i)
        return Net(seed, without).said(), CHECKS[what](seed, engine, without)


def main() -> int:
    """Compares `--count` models from `--seed` on; returns 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--engines", nargs="+", default=["auto", "cpu", "python", *["torch"] * (companion.problem() is None)]
    )
    given = parser.parse_args()
    failed = 0
    REFUSED.clear()
    for seed in range(given.seed, given.seed + given.count):
        for what, engine, text in failures(seed, given.engines):
            failed += 1
            steps, shorter = shrunk(seed, what, engine)
            print(f"seed {seed}, {what} on {engine}: {text}\n    {steps}: {shorter}", flush=True)
    print("refused:", ", ".join(f"{what} {count}" for what, count in sorted(REFUSED.items())) or "none")
    print(f"{failed} failures in {given.count} models from seed {given.seed} on")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
