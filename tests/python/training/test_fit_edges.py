"""Where one engine hands over to another, or to the user: the plain loop's numbers all the same."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import which_engine

X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 4)
ENGINES = ["auto", "cpu", "torch", "python"]


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_whose_classes_all_weigh_nothing(engine: Any) -> None:
    """Its mean is 0 / 0, and so are its gradients."""
    model = linear()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0]))
    data = [(X, Y), (X, torch.ones_like(Y)), (X, Y)]
    with pytest.raises(cnnrs.NonFiniteLossError, match="batch 1; the last finite loss was 0"):
        cnnrs.fit(0, model, data, optimizer=sgd(model), loss_fn=loss, engine=engine, verbose=False)
    assert all(p.isfinite().all() for p in model.parameters())
    ignored = [(X, Y), (X, torch.full_like(Y, -100)), (X, Y)]
    cnnrs.fit(0, model, ignored, optimizer=sgd(model), loss_fn=F.cross_entropy, engine=engine, verbose=False)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_one_value_per_channel_within_a_step_of_several_batches(engine: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    before = copy.deepcopy(model.state_dict())
    data = [(torch.randn(n, 1, 3, 3), torch.zeros(n, dtype=torch.int64)) for n in (4, 1)]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        cnnrs.fit(
            0, model, data, optimizer=sgd(model), loss_fn=F.cross_entropy, engine=engine, accumulate=2, verbose=False
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_only_a_called_loss_reads_is_trained() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = linear(), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.spare(x)
            return self.body(x)

    model = Spare()
    before = model.spare.weight.detach().clone()

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets) + 0.5 * sum(p.pow(2).sum() for p in model.parameters())

    cnnrs.fit(0, model, [(X, Y)] * 3, optimizer=sgd(model), loss_fn=loss, verbose=False)
    assert not torch.equal(model.spare.weight, before)


def test_gradients_for_another_optimizer() -> None:
    """The optimizer holds the head, ``on_batch_end`` steps the body with another."""
    found = []
    for engine in ("auto", "python"):
        model = linear()
        head, body = torch.optim.SGD(model[2].parameters(), lr=0.1), torch.optim.SGD(model[0].parameters(), lr=0.1)

        def step(batch: int, loss: float, body: Any = body) -> None:
            body.step()
            body.zero_grad()

        fit = cnnrs.compile(optimizer=head, loss_fn=F.cross_entropy, engine=engine, on_batch_end=step, verbose=False)
        if engine == "auto":
            with pytest.warns(UserWarning, match="on_batch_end may use the gradients"):
                fit(0, model, [(X, Y)] * 3)
        else:
            fit(0, model, [(X, Y)] * 3)
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


class Set(nn.Module):
    """Layers that read numbers out of an object and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body = linear()
        self.settings, self.rates = types.SimpleNamespace(p=0.0), [0.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(F.dropout(F.dropout(x, self.settings.p, self.training), self.rates[0], self.training))


@pytest.mark.parametrize("change", [lambda m: setattr(m.settings, "p", 1.0), lambda m: m.rates.__setitem__(0, 1.0)])
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_settings_one_level_down_hold_from_the_next_batch_on(engine: Any, change: Callable[[Any], None]) -> None:
    found = []
    for each in (engine, "python"):
        model = Set()
        cnnrs.fit(
            0, model, [(X, Y)] * 3, optimizer=sgd(model), loss_fn=F.cross_entropy, engine=each, verbose=False,
            on_batch_end=lambda batch, loss, model=model: change(model),
        )  # fmt: skip
        found.append([p.detach() for p in model.parameters()])
    # Engine `cpu` did the first batch: up to float rounding.
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["auto", "cpu", "torch"])
@pytest.mark.parametrize("change", ["memory", "frozen"])
def test_a_loader_that_changes_weights(engine: Any, change: str) -> None:
    found = []
    for each in (engine, "python"):
        model = linear()

        def data(model: Any = model) -> Iterator[Any]:
            for i in range(3):
                if i == 1 and change == "memory":
                    model[2].weight.data = torch.ones_like(model[2].weight)
                if i == 1 and change == "frozen":
                    model[0].weight.requires_grad_(False)
                yield X, Y

        cnnrs.fit(0, model, data(), optimizer=sgd(model), loss_fn=F.cross_entropy, engine=each, verbose=False)
        found.append([p.detach() for p in model.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_lbfgs_does_not_scale_gradients() -> None:
    model = linear()
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        cnnrs.fit(0, model, [(X, Y)], optimizer=lbfgs, loss_fn=F.cross_entropy, amp="fp16", verbose=False)


@pytest.mark.parametrize("engine", ["torch", "python"])
def test_the_users_code_runs_outside_of_amp(engine: Any) -> None:
    class Precise(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().step(closure)

    def data() -> Iterator[Any]:
        for _ in range(2):
            seen.append(torch.is_autocast_enabled("cpu"))
            yield X, Y

    seen: list[bool] = []
    model = linear()
    cnnrs.fit(
        0, model, data(), optimizer=Precise(model.parameters(), lr=0.1), loss_fn=F.cross_entropy, engine=engine,
        amp="bf16", verbose=False, on_batch_end=lambda *_: seen.append(torch.is_autocast_enabled("cpu")),
    )  # fmt: skip
    assert len(seen) == 6 and not any(seen)


def test_backward_hooks_of_a_loss_are_called() -> None:
    model, loss, calls = linear(), nn.CrossEntropyLoss(), []
    loss.register_full_backward_hook(lambda *_: calls.append(1))
    cnnrs.fit(0, model, [(X, Y)] * 2, optimizer=sgd(model), loss_fn=loss, verbose=False)
    assert len(calls) == 2


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_an_engine_that_was_asked_for_trains_or_refuses(engine: Any) -> None:
    model, scale = cnnrs.freeze(linear()), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([scale, *model.parameters()], lr=0.1)
    with pytest.raises(cnnrs.UnsupportedModelError, match="nothing of that requires gradients"):
        cnnrs.fit(
            0, model, [(X, Y)], optimizer=optimizer, loss_fn=lambda o, y: F.cross_entropy(o * scale, y), engine=engine
        )


def test_a_buffer_that_cannot_be_written_hides_no_error() -> None:
    model = nn.Sequential(linear(), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.ones(1).expand(4))
    with pytest.raises(cnnrs.NonFiniteLossError):
        cnnrs.fit(0, model, [(X * float("nan"), Y)], optimizer=sgd(model), loss_fn=F.cross_entropy, engine="python")
    assert model[1].num_batches_tracked == 0


def test_sparse_attributes_and_a_callback() -> None:
    model = linear()
    model.extra = torch.eye(2).to_sparse()
    cnnrs.fit(0, model, [(X, Y)] * 2, optimizer=sgd(model), loss_fn=F.cross_entropy, on_batch_end=print, verbose=False)


def test_numbers_beside_tensors_reach_the_model_as_numbers() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = linear()

        def forward(self, inputs: Any) -> torch.Tensor:
            x, (height, width), flag = inputs
            assert type(height) is int and type(width) is int and flag is True
            return self.body(x)

    model = Sized()
    cnnrs.fit(0, model, [((X, (28, 28), True), Y)], optimizer=sgd(model), loss_fn=F.cross_entropy, verbose=False)


def test_a_model_that_was_looked_at_is_freed_at_once() -> None:
    model = linear()
    cnnrs.explain(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None


class Counter:
    count = 0


def counted() -> None:
    pass


counted.count = 0  # type: ignore[attr-defined]


def test_counters_of_modules_classes_and_functions_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward asks them which way to go: once per epoch would not be once per batch."""
    counters = types.ModuleType("my_counters")
    counters.count = 0  # type: ignore[attr-defined]
    monkeypatch.setitem(globals(), "counters", counters)

    class Through(nn.Module):
        def __init__(self, holder: Callable[[], Any]) -> None:
            super().__init__()
            self.body, self.holder = linear(), holder

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            holder = self.holder()
            holder.count += 1
            return self.body(x) if holder.count % 2 else self.body(-x)

    for holder in (lambda: counters, lambda: Counter, lambda: counted):  # type: ignore[name-defined]
        why = cnnrs.explain(Through(holder))
        assert why.engine == "python" and "changes" in why.reasons[0]
        assert holder().count == 0


def test_what_the_loader_switches_on_counts() -> None:
    def batches() -> Iterator[Any]:
        torch.autograd.set_detect_anomaly(True)
        for _ in range(3):
            yield torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)

    model = nn.Linear(3, 2)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        with which_engine.watched() as engines:
            cnnrs.fit(0, model, batches(), optimizer=step, loss_fn=F.cross_entropy, verbose=False)
    finally:
        torch.autograd.set_detect_anomaly(False)
    assert engines == ["python"]


def test_inputs_without_dimensions() -> None:
    batches = [(torch.tensor(1.0), torch.tensor(2.0))]
    loss, _ = cnnrs.fit(0, nn.Sequential(nn.ReLU()), batches, "validation", loss_fn=F.mse_loss, verbose=False)
    assert loss == 1.0


def test_rows_of_features_are_for_models_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of another device's model come one by one, moved there: what records steps asks for their device."""
    asked = []
    monkeypatch.setattr("cnnrs.training.epochs.decide", lambda question: asked.append(question.inputs.device))
    monkeypatch.setattr("cnnrs.training.fit.device_of", lambda model: torch.device("meta"))
    monkeypatch.setattr("cnnrs.training.fit.autocast_dtype", lambda device: None)
    features = cnnrs.FeatureDataset(torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(AttributeError):
        cnnrs.fit(
            0, nn.Linear(3, 2, device="meta"), cnnrs.DataLoader(features, 4), "validation", loss_fn=F.cross_entropy,
            verbose=False,
        )  # fmt: skip
    assert asked == [torch.device("meta")]


def test_an_engine_that_there_is_not_is_said_to_be_none_under_a_mode_too() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    batches = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))]
    with Mode(), pytest.raises(ValueError, match="engine must be one of"):
        cnnrs.fit(
            0, nn.Linear(3, 2), batches, "validation", loss_fn=F.cross_entropy, engine="fast",  # type: ignore[arg-type]
            verbose=False,
        )  # fmt: skip
