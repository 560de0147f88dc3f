"""What `fit` takes: any batch, output, loss and optimizer that the plain loop takes, to the loop's bits."""

from __future__ import annotations

import functools
import math
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tutorial
from torch import nn
from torch.nn.utils import clip_grad_norm_

import cnnrs

ENGINES = ["cpu", "torch", "python"]


def plain(model: nn.Module, loader: Iterable[Any], optimizer: Any, loss_fn: Callable[..., torch.Tensor]) -> list[float]:
    """The loop, as anybody writes it."""
    model.train()
    losses = []
    for inputs, targets in loader:
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = loss_fn(outputs, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def follows(
    model: nn.Module,
    data: list[Any],
    loss_fn: Callable[..., torch.Tensor],
    make: Callable[..., Any] = sgd,
    engine: Any = "auto",
    **options: Any,
) -> tuple[float, float]:
    """What `fit` returns; weights and state must have the loop's bits."""  # fmt: skip
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(model, make)
    torch.manual_seed(1)
    losses = plain(theirs, options.pop("pairs", data), their_optimizer, loss_fn)
    torch.manual_seed(1)
    got = cnnrs.fit(0, ours, data, optimizer=our_optimizer, loss_fn=loss_fn, engine=engine, verbose=False, **options)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert tutorial.same(our_optimizer.state_dict(), their_optimizer.state_dict())
    # Equal batches: a mean of means, in double from float32 losses.
    assert got[0] == pytest.approx(sum(losses) / len(losses), rel=8 * 2**-24)
    return got


def batches(n: int = 3, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(size, 6), torch.randint(3, (size,))) for _ in range(n)]


class Heads(nn.Module):
    """Two heads, whose outputs come as ``form`` makes them; ``read`` gets the tensor out of any input."""

    def __init__(self, form: Callable[..., Any], read: Callable[[Any], torch.Tensor] = lambda inputs: inputs) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.drop = nn.Linear(6, 8), nn.Dropout(0.5)
        self.main, self.aux = nn.Linear(8, 3), nn.Linear(8, 3)
        self.form, self.read = form, read

    def forward(self, inputs: Any) -> Any:
        features = self.drop(torch.relu(self.body(self.read(inputs))))
        return self.form(self.main(features), self.aux(features))


# -- outputs -----------------------------------------------------------------------------------------------------------


class ModelOutput(dict[str, torch.Tensor]):
    """As the outputs of transformers: a dictionary with attributes."""

    def __getattr__(self, name: str) -> torch.Tensor:
        return self[name]


Both = namedtuple("Both", ["logits", "aux"])
OUTPUTS: dict[str, tuple[Callable[..., Any], Callable[[Any], tuple[Any, Any]]]] = {
    "tuple": (lambda a, b: (a, b), lambda o: (o[0], o[1])),
    "list": (lambda a, b: [a, b], lambda o: (o[0], o[1])),
    "namedtuple": (Both, lambda o: (o.logits, o.aux)),
    "dict": (lambda a, b: {"main": a, "aux": b}, lambda o: (o["main"], o["aux"])),
    "ModelOutput": (lambda a, b: ModelOutput(logits=a, aux=b), lambda o: (o.logits, o.aux)),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs_of_any_form_with_a_loss_that_takes_them(form: str) -> None:
    make, parts = OUTPUTS[form]

    def loss_fn(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        main, aux = parts(outputs)
        return F.cross_entropy(main, targets) + 0.4 * F.cross_entropy(aux, targets)

    _, accuracy = follows(Heads(make), batches(), loss_fn)
    assert math.isnan(accuracy) == (form not in ("namedtuple", "ModelOutput"))


def test_googlenet_in_training_mode() -> None:
    from torchvision.models import googlenet

    torch.manual_seed(0)
    model = googlenet(num_classes=3, aux_logits=True, init_weights=False)
    data = [(torch.randn(2, 3, 48, 48), torch.tensor([0, 2]))]

    def loss_fn(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        if isinstance(outputs, torch.Tensor):
            return F.cross_entropy(outputs, targets)
        return F.cross_entropy(outputs.logits, targets) + 0.3 * F.cross_entropy(outputs.aux_logits1, targets)

    _, accuracy = follows(model, data, loss_fn)
    assert accuracy in (0.0, 50.0, 100.0)
    assert math.isfinite(cnnrs.fit(0, model, data, "validation", loss_fn=loss_fn, verbose=False)[1])


# -- batches -----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


INPUTS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "tuple": (lambda x: (x, 2 * x), lambda i: i[0] + i[1]),
    "list": (lambda x: [x, 2 * x], lambda i: i[0] + i[1]),
    "namedtuple": (lambda x: Pair(x, 2 * x), lambda i: i.left + i.right),
    "dict": (lambda x: {"a": x, "name": "photo"}, lambda i: i["a"]),
    "mapping": (lambda x: UserDict(a=x), lambda i: i["a"]),
    "nested": (lambda x: {"a": [(x, None)], "n": 3}, lambda i: i["a"][0][0]),
}


@pytest.mark.parametrize("form", INPUTS)
def test_inputs_of_any_form_are_given_to_the_model_as_they_are(form: str) -> None:
    make, read = INPUTS[form]
    _, accuracy = follows(Heads(lambda a, _: a, read), [(make(x), y) for x, y in batches()], F.cross_entropy)
    assert math.isfinite(accuracy)


TARGETS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[..., torch.Tensor]]] = {
    "tuple": (lambda y: (y, y.flip(0)), lambda o, t: F.cross_entropy(o, t[0]) + F.cross_entropy(o, t[1])),
    "dict": (lambda y: {"class": y, "path": ["a"] * 4}, lambda o, t: F.cross_entropy(o, t["class"])),
    "None": (lambda y: None, lambda o, t: o.square().mean()),
}


@pytest.mark.parametrize("form", TARGETS)
def test_targets_of_any_form_are_given_to_the_loss_as_they_are(form: str) -> None:
    make, loss_fn = TARGETS[form]
    _, accuracy = follows(Heads(lambda a, _: a), [(x, make(y)) for x, y in batches()], loss_fn)
    assert math.isnan(accuracy)


@pytest.mark.parametrize("engine", ["torch", "python"])
def test_dictionaries_of_inputs_and_labels(engine: Any) -> None:
    pairs = batches()
    for first, second in (("pixel_values", "labels"), ("image", "label"), ("x", "y")):
        data = [{second: y, first: x} for x, y in pairs]
        follows(Heads(lambda a, _: a), data, F.cross_entropy, pairs=pairs, engine=engine)


@pytest.mark.parametrize("engine", ["torch", "python"])
def test_arrays_and_lists_of_numbers_are_tensors(engine: Any) -> None:
    pairs = batches()
    data = [(x.numpy(), y.tolist()) for x, y in pairs]
    follows(Heads(lambda a, _: a), data, F.cross_entropy, pairs=pairs, engine=engine)
    data = [(x, np.asarray(y)) for x, y in pairs]
    follows(Heads(lambda a, _: a), data, F.cross_entropy, pairs=pairs, engine=engine)


class TwoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.layer(left + right)


def test_batches_that_nobody_can_tell_apart_are_named() -> None:
    x, y = batches(1)[0]
    model = Heads(lambda a, _: a)

    def fit(batch: Any, model: nn.Module = model, **options: Any) -> None:
        cnnrs.fit(0, model, [batch], optimizer=sgd(model.parameters()), loss_fn=F.cross_entropy, **options)

    with pytest.raises(TypeError, match=r"pairs .*, got a tuple of length 3: put what the loss needs into the second"):
        fit((x, y, y))
    with pytest.raises(TypeError, match=r"got dictionaries with 'x', 'mask', 'label', of which cnnrs cannot tell"):
        fit({"x": x, "mask": x, "label": y})
    with pytest.raises(TypeError, match=r"got dictionaries with 'label', 'labels', "):
        fit({"label": x, "labels": y})
    with pytest.raises(TypeError, match="got a Tensor"):
        fit(x)
    with pytest.raises(TypeError, match=r"TwoArguments\.forward\(\): missing .* 'right'.* here a tuple of length 2"):
        fit(((x, x), y), TwoArguments())
    with pytest.raises(TypeError, match="must be Tensor, not tuple"):
        fit((x, y), Heads(lambda a, b: (a, b)))


@pytest.mark.parametrize("engine", ["torch", "cpu"])
def test_engines_that_were_asked_for_take_tensors(engine: Any) -> None:
    (x, y), model = batches(1)[0], nn.Linear(6, 3)
    with pytest.raises(cnnrs.UnsupportedModelError, match=r"two ordinary tensors, .* got a dict of length 1"):
        cnnrs.fit(0, model, [({"x": x}, y)], optimizer=sgd(model.parameters()), loss_fn=F.cross_entropy, engine=engine)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [sgd, lambda p: torch.optim.RMSprop(p, lr=1e-3)])
def test_a_batch_of_another_form_in_the_middle(make: Callable[..., Any], accumulate: int) -> None:
    """A compiled engine begins, the user's module goes on where it stopped, gradients and all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
    model(torch.randn(2, 3, 4, 4))
    data = [(torch.randn(4, 3, 4, 4), torch.randint(5, (4,))) for _ in range(5)]
    soft = [(x, F.one_hot(y, 5).float()) if i == 3 else (x, y) for i, (x, y) in enumerate(data)]
    odd = [(x, y.requires_grad_()) if y.is_floating_point() else (x, y) for x, y in soft]
    theirs: Any
    ours: Any
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(model, make)
    for i, (x, y) in enumerate(odd):
        (F.cross_entropy(theirs(x), y) / accumulate).backward()
        if (i + 1) % accumulate == 0 or i + 1 == len(odd):
            their_optimizer.step()
            their_optimizer.zero_grad()
    seen: list[int] = []
    loss, accuracy = cnnrs.fit(
        0, ours, odd, optimizer=our_optimizer, loss_fn=F.cross_entropy, accumulate=accumulate, verbose=False,
        on_batch_end=lambda batch, _: seen.append(batch),
    )  # fmt: skip
    assert seen == [0, 1, 2, 3, 4] and math.isfinite(loss) and math.isnan(accuracy)
    # Engine "cpu" did the first: a float32 sum of 64 terms, five steps.
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours[1].num_batches_tracked, theirs[1].num_batches_tracked)


@pytest.mark.parametrize("engine", ["auto", "torch", "python"])
def test_an_empty_batch_is_one_like_any_other(engine: Any) -> None:
    data = batches()
    data.insert(1, (torch.empty(0, 6), torch.empty(0, dtype=torch.int64)))
    theirs, their_sgd, ours, our_sgd = tutorial.twins(nn.Linear(6, 3), sgd)
    plain(theirs, data, their_sgd, F.cross_entropy)
    seen: list[float] = []
    loss, _ = cnnrs.fit(
        0, ours, data, optimizer=our_sgd, loss_fn=F.cross_entropy, engine=engine, verbose=False,
        on_batch_end=lambda _, mean: seen.append(mean),
    )  # fmt: skip
    assert math.isfinite(loss) and [math.isnan(mean) for mean in seen] == [False, True, False, False]
    torch.testing.assert_close(ours.weight, theirs.weight)


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_what_is_no_optimizer_says_what_to_write() -> None:
    model = nn.Linear(6, 3)
    optimizer = sgd(model.parameters())
    wrong: list[tuple[Any, str]] = [
        ("adam", r"got the name 'adam': give it as torch\.optim\.Adam\(model\.parameters\(\), lr="),
        ("lion9", r"got the name 'lion9': give it as torch\.optim\.SGD\("),
        (torch.optim.AdamW, r"got the class AdamW: make one"),
        (torch.optim.lr_scheduler.StepLR(optimizer, 1), "got the scheduler StepLR: give its optimizer"),
        (torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "got the scheduler ReduceLROnPlateau"),
        (torch.optim.swa_utils.SWALR(optimizer, 0.1), "got the scheduler SWALR"),
        ([optimizer, optimizer], "fit steps one optimizer, got a list of 2: give one whose groups"),
        (model.parameters(), "must be an optimizer, got a generator"),
    ]
    for optimizer, match in wrong:
        with pytest.raises(TypeError, match=match):
            cnnrs.fit(0, model, batches(), optimizer=optimizer, loss_fn=F.cross_entropy)
        with pytest.raises(TypeError, match=match):
            cnnrs.compile(optimizer=optimizer, loss_fn=F.cross_entropy)

    class NeedsMore(torch.optim.SGD):
        def step(self, gradients: Any) -> None:  # type: ignore[override]
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"NeedsMore\.step\(\) needs gradients"):
        cnnrs.fit(0, model, batches(), optimizer=NeedsMore(model.parameters()), loss_fn=F.cross_entropy)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_evaluates_the_model_in_a_closure(search: Any, accumulate: int) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.5, max_iter=4, line_search_fn=search)

    data = batches(4)
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(Heads(lambda a, _: a), make)
    firsts = []
    torch.manual_seed(1)
    for start in range(0, len(data), accumulate):
        window = data[start : start + accumulate]
        evaluations: list[list[float]] = []

        def closure(window: Any = window, evaluations: Any = evaluations) -> torch.Tensor:
            their_optimizer.zero_grad()
            losses = []
            for x, y in window:
                loss = F.cross_entropy(theirs(x), y)
                losses.append(loss.detach())
                (loss / accumulate if accumulate > 1 else loss).backward()
            clip_grad_norm_(theirs.parameters(), 1.0)
            evaluations.append([loss.item() for loss in losses])
            return torch.stack([loss / accumulate for loss in losses]).sum() if accumulate > 1 else losses[0]

        their_optimizer.step(closure)
        assert len(evaluations) > 1
        firsts += evaluations[0]
    torch.manual_seed(1)
    loss, _ = cnnrs.fit(
        0, ours, data, optimizer=our_optimizer, loss_fn=F.cross_entropy, clip_grad_norm=1.0, accumulate=accumulate,
        verbose=False,
    )  # fmt: skip
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert tutorial.same(our_optimizer.state_dict(), their_optimizer.state_dict())
    assert loss == pytest.approx(sum(firsts) / len(firsts), rel=8 * 2**-24)
    with pytest.raises(cnnrs.UnsupportedModelError, match="LBFGS evaluates the model again in a closure"):
        cnnrs.fit(0, ours, data, optimizer=our_optimizer, loss_fn=F.cross_entropy, engine="torch")


@pytest.mark.parametrize("engine", ["auto", "torch", "python"])
def test_an_optimizer_that_only_looks_like_one(engine: Any) -> None:
    class Wrapped:
        """As wrappers of optimizers are written that are no subclass."""

        def __init__(self, parameters: Any) -> None:
            self.inner = sgd(parameters)
            self.param_groups = self.inner.param_groups
            self.state_dict = self.inner.state_dict

        def zero_grad(self) -> None:
            self.inner.zero_grad()

        def step(self) -> None:
            self.inner.step()

    follows(Heads(lambda a, _: a), batches(), F.cross_entropy, Wrapped, engine)


# -- losses ------------------------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([0.2, 1.0, 3.0])
#: Name: the loss, and torch's own sum and what its mean divides by.
COUNTED: dict[str, Any] = {
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "ignore_index, outside": nn.CrossEntropyLoss(ignore_index=-100),
    "weight": nn.CrossEntropyLoss(weight=WEIGHT),
    "weight and ignore_index": nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1),
    "weight and smoothing": nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
    "partial": functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=2),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "sum, weight and ignore_index": nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1, reduction="sum"),
    "partial sum": functools.partial(F.cross_entropy, reduction="sum"),
}


def reference(loss_fn: Any, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, float, int, int]:
    """torch's own sum over a batch, what its mean divides by, hits and predictions that count."""
    options = dict(loss_fn.keywords) if isinstance(loss_fn, functools.partial) else {
        name: getattr(loss_fn, name) for name in ("weight", "ignore_index", "label_smoothing")
    }  # fmt: skip
    options.pop("reduction", None)
    total = F.cross_entropy(outputs, targets, reduction="sum", **options).item()
    counts = targets != options.get("ignore_index", -100)
    weight = options["weight"][targets[counts]].sum() if options.get("weight") is not None else counts.sum()
    hits = (outputs.argmax(dim=1) == targets) & counts
    return total, float(weight), int(hits.sum()), int(counts.sum())


@pytest.mark.parametrize(
    ("engine", "name"), [(e, n) for e in [*ENGINES, "auto"] for n in COUNTED if e != "cpu" or "sum" not in n]
)
def test_the_epoch_is_the_mean_over_what_counts(name: str, engine: Any) -> None:
    loss_fn = COUNTED[name]
    torch.manual_seed(4)
    data = [(torch.randn(n, 6), torch.randint(3, (n,))) for n in (9, 4, 6)]
    model = nn.Linear(6, 3)
    parts = [reference(loss_fn, model(x), y) for x, y in data]
    loss, accuracy = cnnrs.fit(0, model, data, "validation", loss_fn=loss_fn, engine=engine, verbose=False)
    assert loss == pytest.approx(sum(p[0] for p in parts) / sum(p[1] for p in parts), rel=1e-6)
    assert accuracy == pytest.approx(100 * sum(p[2] for p in parts) / sum(p[3] for p in parts))


@pytest.mark.parametrize("engine", ENGINES)
def test_training_with_weights_and_ignored_samples_follows_the_loop(engine: Any) -> None:
    loss_fn = nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1)
    data = [*batches(2), (torch.randn(4, 6), torch.ones(4, dtype=torch.int64)), *batches(1)]
    theirs, their_sgd, ours, our_sgd = tutorial.twins(nn.Linear(6, 3), sgd)
    means = plain(theirs, data, their_sgd, loss_fn)
    seen: list[float] = []
    loss, _ = cnnrs.fit(
        0, ours, data, optimizer=our_sgd, loss_fn=loss_fn, engine=engine, verbose=False,
        on_batch_end=lambda _, mean: seen.append(mean),
    )  # fmt: skip
    # Of the third batch nothing counts: torch's mean is 0 / 0.
    assert seen == pytest.approx(means, rel=1e-6, nan_ok=True) and math.isnan(seen[2])
    assert math.isfinite(loss)
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("engine", ENGINES)
def test_where_nothing_counts_there_is_no_loss_and_no_accuracy(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data = [(torch.randn(4, 6), torch.ones(4, dtype=torch.int64))]
    got = cnnrs.fit(0, nn.Linear(6, 3), data, "validation", loss_fn=nn.CrossEntropyLoss(ignore_index=1), engine=engine)
    assert all(map(math.isnan, got))
    assert "0/0" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["auto", "torch", "python"])
def test_classes_as_bytes(engine: Any) -> None:
    model, loss_fn = nn.Linear(6, 3), nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1)

    def fit(data: list[Any]) -> tuple[float, float]:
        return cnnrs.fit(0, model, data, "validation", loss_fn=loss_fn, engine=engine, verbose=False)

    assert fit([(x, y.byte()) for x, y in batches()]) == pytest.approx(fit(batches()), rel=1e-6)


@pytest.mark.parametrize("engine", ["auto", "torch", "python"])
def test_a_class_per_pixel_and_probabilities_of_classes(engine: Any) -> None:
    torch.manual_seed(5)
    model = nn.Conv2d(3, 4, 1)
    pixels = [(torch.randn(n, 3, 5, 5), torch.randint(4, (n, 5, 5))) for n in (2, 3)]
    loss_fn = nn.CrossEntropyLoss(ignore_index=0)
    loss, accuracy = cnnrs.fit(0, model, pixels, "validation", loss_fn=loss_fn, engine=engine, verbose=False)
    everything = loss_fn(torch.cat([model(x) for x, _ in pixels]), torch.cat([y for _, y in pixels])).item()
    assert loss == pytest.approx(everything, rel=1e-6) and math.isnan(accuracy)
    soft = [(torch.randn(n, 6), torch.rand(n, 3)) for n in (2, 5)]
    head = nn.Linear(6, 3)
    loss_fn = nn.CrossEntropyLoss(weight=WEIGHT)
    loss, _ = cnnrs.fit(0, head, soft, "validation", loss_fn=loss_fn, engine=engine, verbose=False)
    everything = loss_fn(torch.cat([head(x) for x, _ in soft]), torch.cat([y for _, y in soft])).item()
    assert loss == pytest.approx(everything, rel=1e-6)


@pytest.mark.parametrize("engine", ["auto", "torch", "python"])
@pytest.mark.parametrize("phase", ["training", "validation"])
def test_a_loss_that_is_no_number(phase: Any, engine: Any) -> None:
    model = nn.Linear(6, 3)

    def fit(loss_fn: Any) -> None:
        cnnrs.fit(0, model, batches(), phase, optimizer=sgd(model.parameters()), loss_fn=loss_fn, engine=engine)

    with pytest.raises(RuntimeError, match=r"only for scalar outputs: loss_fn returned shape \(4,\)"):
        fit(nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(TypeError, match=r"loss_fn must return a tensor .*, got float"):
        fit(lambda outputs, targets: F.cross_entropy(outputs, targets).item())
    with pytest.raises(TypeError, match="got tuple"):
        fit(lambda outputs, targets: (F.cross_entropy(outputs, targets), outputs))


def test_a_loss_with_a_forward_of_its_own_is_called() -> None:
    loss_fn = nn.CrossEntropyLoss()
    loss_fn.forward = lambda outputs, targets: outputs.square().mean()  # type: ignore[method-assign]
    follows(nn.Linear(6, 3), batches(), loss_fn)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_model_raises_in_the_middle_leaves_whole_steps(engine: Any) -> None:
    data = batches()
    wrong = [*data[:2], (torch.randn(4, 7), data[2][1])]
    theirs, their_sgd, ours, our_sgd = tutorial.twins(nn.Linear(6, 3), sgd)
    plain(theirs, data[:2], their_sgd, F.cross_entropy)
    with pytest.raises(RuntimeError, match=r"7|shape"):
        cnnrs.fit(0, ours, wrong, optimizer=our_sgd, loss_fn=F.cross_entropy, engine=engine, verbose=False)
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(
        our_sgd.state[ours.weight]["momentum_buffer"], their_sgd.state[theirs.weight]["momentum_buffer"]
    )
