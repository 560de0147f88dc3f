"""What the loss counts: weights of classes, ignored samples, pixels; what it raises or returns besides numbers."""

from __future__ import annotations

import functools
import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import tutorial
from cnnrs.engine.losses import LossName
from plain_loop import batches, follows, plain, sgd

ENGINES = ["cpu", "torch", "python"]
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


@pytest.mark.parametrize("name", get_args(LossName))
def test_losses_by_name(name: LossName) -> None:
    """As the functions themselves, on the same engine."""
    function = getattr(F, name)
    torch.manual_seed(0)
    targets = torch.randint(4, (6,)) if name in ("cross_entropy", "nll_loss") else torch.rand(6, 4).round()
    data = [(torch.randn(6, 3), targets)] * 3

    def trained(loss_fn: Any, by: Any) -> tuple[Any, ...]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LogSoftmax(dim=1))
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        if by is cnnrs.fit:
            result = cnnrs.fit(0, model, data, optimizer=sgd, loss_fn=loss_fn, verbose=False)
        else:
            result = cnnrs.compile(optimizer=sgd, loss_fn=loss_fn, verbose=False)(0, model, data)
        return result[0], *(p.tolist() for p in model.parameters())

    expected = trained(function, cnnrs.fit)
    assert trained(name, cnnrs.fit) == trained(name, cnnrs.compile) == expected
    assert f"loss_fn={name}" in repr(cnnrs.compile(loss_fn=name))
