"""What `fit` takes: any batch, output and optimizer that the plain loop takes, to the loop's bits."""

from __future__ import annotations

import math
from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

import cnnrs
import tutorial
from plain_loop import batches, follows, plain, sgd

ENGINES = ["cpu", "torch", "python"]


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
