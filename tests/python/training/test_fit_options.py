"""`fit`'s options: clipping, accumulation, a callback per batch, amp, and how `engine="auto"` chooses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import Subset

import cnnrs
import tutorial
import which_engine
from cnnrs.data.iter_rows import RowsIter

pytestmark = pytest.mark.usefixtures("two_threads")
ENGINES = ["cpu", "torch", "python"]

#: What the engines promise: float rounding of some 100 steps of 1e-7 each, or the loop's bits.
ROUNDING = 1e-5


def network() -> nn.Module:
    """Convolutions with and without a pool, batch norm, a matrix large enough to be updated where it arises."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 1024), nn.SiLU(), nn.Linear(1024, 5),
    )  # fmt: skip


def batches(sizes: tuple[int, ...] = (9, 9, 9, 4), classes: int = 5) -> list[Any]:
    torch.manual_seed(3)
    return [(torch.randn(n, 1, 12, 12), torch.randint(classes, (n,))) for n in sizes]


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[Any],
    loss_fn: Callable[..., torch.Tensor] = F.cross_entropy,
    clip: Callable[[Any], object] | None = None,
    accumulate: int = 1,
    after: Callable[[int, float], object] | None = None,
) -> list[float]:
    """The plain loop with every option, as PyTorch's documentation writes each."""
    model.train()
    losses = []
    optimizer.zero_grad()
    for i, (x, y) in enumerate(data):
        loss = loss_fn(model(x), y)
        losses.append(loss.item())
        (loss / accumulate if accumulate > 1 else loss).backward()
        if (i + 1) % accumulate == 0 or i + 1 == len(data):
            if clip is not None:
                clip(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        if after is not None:
            after(i, losses[-1])
    return losses


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-3),
    "RMSprop, which torch steps": lambda p: torch.optim.RMSprop(p, lr=1e-4, eps=1e-3),
}

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip_grad_norm": ({"clip_grad_norm": 0.1}, {"clip": lambda p: clip_grad_norm_(p, 0.1)}),
    "clip_grad_norm, never reached": ({"clip_grad_norm": 1e4}, {"clip": lambda p: clip_grad_norm_(p, 1e4)}),
    "clip_grad_value": ({"clip_grad_value": 1e-3}, {"clip": lambda p: clip_grad_value_(p, 1e-3)}),
    "accumulate": ({"accumulate": 3}, {"accumulate": 3}),
    "accumulate and clip": (
        {"accumulate": 2, "clip_grad_norm": 0.1},
        {"accumulate": 2, "clip": lambda p: clip_grad_norm_(p, 0.1)},
    ),
}


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    # Engine "cpu" refuses what torch must step: test_engine_cpu_says_what_it_cannot_do.
    [(e, o) for e in ENGINES for o in OPTIMIZERS if e != "cpu" or "torch steps" not in o],
)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_follow_the_plain_loop(option: str, optimizer: str, engine: Any) -> None:
    ours_options, their_options = OPTIONS[option]
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), OPTIMIZERS[optimizer])
    data = batches()
    for epoch in range(2):
        expected = loop(theirs, their_optimizer, data, **their_options)
        seen: dict[int, float] = {}
        cnnrs.fit(
            epoch, ours, data, optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False,
            on_batch_end=seen.__setitem__, **ours_options,
        )  # fmt: skip
        assert list(seen) == list(range(len(data))) and list(seen.values()) == pytest.approx(expected, rel=ROUNDING)
        if engine != "cpu":
            assert tutorial.same(ours.state_dict(), theirs.state_dict())
            assert tutorial.same(our_optimizer.state_dict(), their_optimizer.state_dict())
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        # The weights move by about lr times the gradient's size per step; Adam's eps bounds what its noise is worth.
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_scheduler_that_steps_per_batch(optimizer: str, engine: Any) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), OPTIMIZERS[optimizer])
    data = batches((9, 9, 9, 9, 9, 9))
    theirs_lr, ours_lr = (
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05 if optimizer == "SGD" else 2e-3, total_steps=12)
        for o in (their_optimizer, our_optimizer)
    )
    for epoch in range(2):
        expected = loop(theirs, their_optimizer, data, after=lambda *_: theirs_lr.step())
        seen: list[tuple[int, float]] = []

        def after(batch: int, loss: float, seen: list[tuple[int, float]] = seen) -> None:
            seen.append((batch, loss))
            ours_lr.step()

        cnnrs.fit(
            epoch, ours, data, optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False,
            on_batch_end=after,
        )  # fmt: skip
        assert [batch for batch, _ in seen] == list(range(6))
        assert [loss for _, loss in seen] == pytest.approx(expected, rel=ROUNDING)
    if engine != "cpu":
        assert tutorial.same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_callback_raises_ends_the_epoch_after_a_whole_step(engine: Any) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), OPTIMIZERS["SGD"])
    data = batches()

    def stop(batch: int, loss: float) -> None:
        if batch == 1:
            raise KeyboardInterrupt

    fit = cnnrs.compile(
        optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False, on_batch_end=stop
    )
    with pytest.raises(KeyboardInterrupt):
        fit(0, ours, data)
    loop(theirs, their_optimizer, data[:2])
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)
    for p, q in zip(theirs.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
    state = our_optimizer.state_dict()["state"]
    assert state.keys() == their_optimizer.state_dict()["state"].keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_between_batches_leaves_whole_steps(engine: Any) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), OPTIMIZERS["SGD"])
    data = batches()

    def interrupted() -> Iterator[Any]:
        yield from data[:2]
        import signal

        signal.raise_signal(signal.SIGINT)
        yield data[2]

    with pytest.raises(KeyboardInterrupt):
        cnnrs.fit(
            0, ours, interrupted(), optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False
        )
    loop(theirs, their_optimizer, data[:2])
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_stops_with_epoch_batch_and_last_finite_loss(engine: Any) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), OPTIMIZERS["AdamW"])
    data = batches()
    broken = [*data[:2], (torch.full((9, 1, 12, 12), math.nan), data[2][1])]
    with pytest.raises(
        cnnrs.NonFiniteLossError, match=r"NaN in training epoch 6, batch 2; the last finite loss was \d"
    ):
        cnnrs.fit(6, ours, broken, optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False)
    loop(theirs, their_optimizer, data[:2])
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)
    assert all(int(s["step"]) == 2 for s in our_optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("engine", ENGINES)
def test_validation_changes_no_bit(engine: Any) -> None:
    model = network()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    data = batches()
    fit = cnnrs.compile(optimizer=optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False, accumulate=2)
    fit(0, model, data)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    before, state, random = (
        copy.deepcopy(model.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
        torch.get_rng_state(),
    )
    first = fit(0, model, data, "validation")
    assert fit(0, model, data, "validation") == first
    assert tutorial.same(model.state_dict(), before)
    assert tutorial.same(optimizer.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None) and (grad is None or torch.equal(p.grad, grad))


LOSSES: dict[str, tuple[Any, Callable[[int], torch.Tensor]]] = {
    "mse_loss": (F.mse_loss, lambda n: torch.randn(n, 5)),
    "MSELoss": (nn.MSELoss(), lambda n: torch.randn(n, 5)),
    "bce_with_logits": (F.binary_cross_entropy_with_logits, lambda n: torch.rand(n, 5)),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), lambda n: torch.rand(n, 5).round()),
    "weighted cross entropy": (nn.CrossEntropyLoss(torch.linspace(0.5, 2, 5)), lambda n: torch.randint(5, (n,))),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), lambda n: torch.randint(5, (n,))),
    "ignore_index": (nn.CrossEntropyLoss(ignore_index=2), lambda n: torch.arange(n) % 5),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_every_engine(name: str, engine: Any) -> None:
    loss_fn, targets = LOSSES[name]
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), OPTIMIZERS["SGD"])
    data = [(x, targets(len(x))) for x, _ in batches((8, 8, 8))]
    expected = loop(theirs, their_optimizer, data, loss_fn)
    mean, accuracy = cnnrs.fit(0, ours, data, optimizer=our_optimizer, loss_fn=loss_fn, engine=engine, verbose=False)
    assert mean == pytest.approx(tutorial.mean(loss_fn, expected, data), rel=ROUNDING)
    assert math.isnan(accuracy) == (data[0][1].dtype is torch.float32)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)
    value, _ = cnnrs.fit(0, ours, data[:1], "validation", loss_fn=loss_fn, engine=engine, verbose=False)
    if name != "ignore_index":
        with torch.no_grad():
            assert value == pytest.approx(loss_fn(theirs.eval()(data[0][0]), data[0][1]).item(), rel=1e-4)


# -- amp ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", "python"])
def test_bf16_follows_pytorchs_autocast(engine: Any) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), OPTIMIZERS["SGD"])
    data = batches()
    theirs.train()
    expected = []
    for x, y in data:
        their_optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(theirs(x), y)
        expected.append(loss.item())
        loss.backward()
        their_optimizer.step()
    seen: list[float] = []
    cnnrs.fit(
        0, ours, data, optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False, amp="bf16",
        on_batch_end=lambda _, loss: seen.append(loss),
    )  # fmt: skip
    # 8 bits of mantissa: the same operations in the same precision, but another order of adding is allowed.
    assert seen == pytest.approx(expected, rel=2**-8)
    full: list[float] = []
    cnnrs.fit(
        0, copy.deepcopy(theirs), data[:1], "validation", loss_fn=F.cross_entropy, engine=engine, verbose=False,
        on_batch_end=lambda _, loss: full.append(loss),
    )  # fmt: skip
    cnnrs.fit(
        0, theirs, data[:1], "validation", loss_fn=F.cross_entropy, engine=engine, verbose=False, amp="bf16",
        on_batch_end=lambda _, loss: full.append(loss),
    )  # fmt: skip
    assert full[0] != full[1], "amp made no difference"


def test_fp16_scales_gradients_in_pytorchs_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []
    scaled = torch.amp.GradScaler.scale

    def spy(scaler: Any, loss: Any) -> Any:
        scales.append(scaler.get_scale())
        return scaled(scaler, loss)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", spy)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    data = [(torch.randn(6, 4), torch.randint(3, (6,)))] * 3
    loss, _ = cnnrs.fit(
        0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False, amp="fp16", clip_grad_norm=1.0
    )
    assert math.isfinite(loss) and not tutorial.same(model.state_dict(), before)
    assert len(scales) == 3 and min(scales) > 1
    for engine in ("torch", "cpu"):
        with pytest.raises(cnnrs.UnsupportedModelError, match="does not scale fp16 gradients"):
            cnnrs.fit(
                0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False, amp="fp16", engine=engine
            )


# -- features in memory ------------------------------------------------------------------------------------------------


def feature_columns(kind: str, path: Path) -> tuple[Any, Any]:
    torch.manual_seed(4)
    features, labels = torch.randn(53, 20), torch.randint(3, (53,))
    if kind == "tensors":
        return features, labels
    if kind == "values":
        return features, torch.randn(53, 3)
    np.save(path / "features.npy", features.numpy())
    return np.load(path / "features.npy", mmap_mode="r"), labels.tolist()


@pytest.mark.parametrize("phase", ["training", "validation"])
@pytest.mark.parametrize("kind", ["tensors", "values", "mapped file and list"])
def test_features_go_to_the_engine_without_python_and_change_nothing(
    kind: str, phase: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = feature_columns(kind, tmp_path)
    loss_fn = F.mse_loss if kind == "values" else F.cross_entropy
    results = []
    for direct in (True, False):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        loader = cnnrs.DataLoader(Subset(cnnrs.FeatureDataset(*columns), range(50)), batch_size=8, shuffle=True)
        asked: list[int] = []
        following = RowsIter.__next__

        def spy(rows: RowsIter, asked: list[int] = asked, following: Any = following) -> Any:
            asked.append(1)
            return following(rows)

        monkeypatch.setattr(RowsIter, "__next__", spy)
        fit = cnnrs.compile(
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn, engine="cpu", verbose=False,
            on_batch_end=None if direct else lambda *_: None,
        )  # fmt: skip
        figures = [fit(epoch, model, loader, phase)[0] for epoch in range(2)]
        assert bool(asked) != direct
        monkeypatch.undo()
        results.append((figures, model.state_dict(), torch.get_rng_state(), loader.state_dict()["batches"]))
    (figures, weights, random, batches_done), (expected, their_weights, their_random, their_batches) = results
    assert figures == expected and batches_done == their_batches
    assert tutorial.same(weights, their_weights) and torch.equal(random, their_random)


def test_an_interrupted_epoch_of_features_goes_on_where_it_stopped() -> None:
    features, labels = torch.randn(40, 6), torch.randint(3, (40,))
    features[17] = math.nan
    model = nn.Linear(6, 3)
    loader = cnnrs.DataLoader(cnnrs.FeatureDataset(features, labels), batch_size=8)
    fit = cnnrs.compile(optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=F.cross_entropy, verbose=False)
    with pytest.raises(cnnrs.NonFiniteLossError, match="batch 2"):
        fit(0, model, loader)
    assert loader.state_dict()["batches"] == 2
    loader = cnnrs.DataLoader(cnnrs.FeatureDataset(features, labels), batch_sampler=[[0, 1], [-1, 40]])
    with pytest.raises(IndexError, match="index 40 is out of range for 40 features"):
        fit(0, model, loader)


# -- which engine ------------------------------------------------------------------------------------------------------


def ran(*arguments: Any, **options: Any) -> str:
    """The engine that `fit` ends up in."""
    with which_engine.watched() as calls:
        cnnrs.fit(*arguments, verbose=False, **options)
    (engine,) = calls
    return engine


def test_auto_takes_the_fastest_that_can() -> None:
    from torchvision.models import resnet18

    def engine(model: nn.Module, x: torch.Tensor, y: torch.Tensor, **options: Any) -> str:
        model.train()
        options = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.01), "loss_fn": F.cross_entropy} | options
        return ran(0, model, [(x, y)], **options)

    digits, classes = torch.randn(2, 1, 28, 28), torch.tensor([1, 2])
    assert engine(cnnrs.models.MnistNet(), digits, classes) == "cpu"
    assert cnnrs.explain(cnnrs.models.MnistNet()).engine == "cpu"
    assert engine(resnet18(num_classes=3), torch.randn(2, 3, 32, 32), classes) == "python"
    assert cnnrs.explain(resnet18()).engine == "python"
    assert "layer1.0.conv1 (Conv2d)" in str(cnnrs.explain(resnet18()))
    assert engine(cnnrs.models.MnistNet().double(), digits.double(), classes) == "python"
    assert "float64" in str(cnnrs.explain(cnnrs.models.MnistNet().double()))
    assert engine(cnnrs.models.MnistNet(), digits, classes, amp="bf16") == "python"
    assert engine(cnnrs.models.MnistNet(), digits, classes, loss_fn=lambda o, t: F.cross_entropy(o, t)) == "python"
    model = cnnrs.models.MnistNet()
    assert engine(model, digits, classes, optimizer=torch.optim.RMSprop(model.parameters())) == "python"
    values = nn.Linear(3, 1)
    assert engine(values, torch.randn(4, 3), torch.randn(4, 1), loss_fn=F.mse_loss) == "cpu"
    with pytest.warns(UserWarning, match="broadcasting"):
        assert engine(values, torch.randn(4, 3), torch.randn(4), loss_fn=F.mse_loss) == "python"
    hooked = cnnrs.models.MnistNet()
    hooked.fc2.register_forward_hook(lambda *_: None)
    assert engine(hooked, digits, classes) == "python"


def test_engine_cpu_says_what_it_cannot_do() -> None:
    model = cnnrs.models.MnistNet()
    data = [(torch.randn(2, 1, 28, 28), torch.tensor([1, 2]))]
    rmsprop = torch.optim.RMSprop(model.parameters())
    with pytest.raises(cnnrs.UnsupportedModelError, match="RMSprop"):
        cnnrs.fit(0, model, data, optimizer=rmsprop, loss_fn=F.nll_loss, engine="cpu", verbose=False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(cnnrs.UnsupportedModelError, match="amp asks for less"):
        cnnrs.fit(0, model, data, optimizer=sgd, loss_fn=F.nll_loss, engine="cpu", verbose=False, amp="bf16")
    with pytest.raises(cnnrs.UnsupportedModelError, match="the loss is none of"):
        cnnrs.fit(0, model, data, optimizer=sgd, loss_fn=lambda o, t: o.sum(), engine="cpu", verbose=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clip_grad_norm": 1.0, "clip_grad_value": 1.0}, "exclude each other"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be positive, got 0"),
        ({"clip_grad_value": math.nan}, "clip_grad_value must be positive, got nan"),
        ({"accumulate": 0}, "accumulate is a number of batches, at least 1, got 0"),
        ({"amp": "tf32"}, "amp must be None, 'bf16' or 'fp16', got 'tf32'"),
        ({"precision": "bf16"}, "precision must be None or 'exact', got 'bf16': mixed precision is amp"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], match: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=match):
        cnnrs.fit(
            0, model, batches(), optimizer=OPTIMIZERS["SGD"](model.parameters()), loss_fn=F.cross_entropy,
            verbose=False, **options,
        )  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_old_gradients_are_gone_before_the_next_forward_pass(accumulate: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda *_: seen.append(model[1].weight.grad is None))
    data = [(torch.randn(4, 3, 2, 2), torch.arange(4) % 3) for _ in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cnnrs.fit(
        0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, engine="python", accumulate=accumulate,
        verbose=False,
    )  # fmt: skip
    # The check on the first batch may call the model, too.
    assert seen[-4:] == ([True] * 4 if accumulate == 1 else [True, False] * 2)
