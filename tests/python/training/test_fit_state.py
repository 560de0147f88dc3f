"""State in and around `fit`: what `on_batch_end` sees and changes, modes of torch that are on, frozen parts."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import cnnrs
import tutorial
import which_engine
from cnnrs.identity.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("two_threads")
ENGINES = ["cpu", "torch", "python"]

#: What engine "cpu" promises: float rounding of some steps of 1e-7 each.
ROUNDING = 1e-5


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.0),
        nn.Linear(4 * 9, 16), nn.SiLU(), nn.Linear(16, 3),
    )  # fmt: skip


def batches(n: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(6, 1, 6, 6), torch.randint(3, (6,))) for _ in range(n)]


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": momentum,
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, eps=1e-3),
}


def plain(
    model: nn.Module, data: Any, optimizer: Any, after: Callable[[int], object], accumulate: int = 1, **more: Any
) -> None:
    """The loop with something behind every batch; gradients stay until the next one begins."""
    loss_fn = more.get("loss_fn", F.cross_entropy)
    model.train()
    for i, (x, y) in enumerate(data):
        if i % accumulate == 0:
            optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        (loss / accumulate if accumulate > 1 else loss).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
        after(i)
    if len(data) % accumulate:
        optimizer.step()


def close(ours: Any, theirs: Any, engine: str) -> None:
    """The loop's bits, or what float rounding makes of them."""
    if engine in ("torch", "python"):
        assert tutorial.same(ours, theirs)
        return
    for key in theirs:
        if isinstance(theirs[key], torch.Tensor):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=ROUNDING)
        elif isinstance(theirs[key], dict):
            assert ours[key].keys() == theirs[key].keys()
            close(ours[key], theirs[key], engine)


def optimizer_steps(state: dict[str, Any]) -> int:
    return max((int(entry["step"]) for entry in state["state"].values()), default=0)


def trainable(engine: str, optimizer: str) -> bool:
    return engine != "cpu" or optimizer != "RMSprop"


# -- what on_batch_end sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "name"), [(e, o) for e in ENGINES for o in OPTIMIZERS if trainable(e, o)])
def test_a_scheduler_that_steps_there_does_not_warn(engine: Any, name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cnnrs.fit(0, model, batches(), optimizer=optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False,
                  on_batch_end=lambda *_: scheduler.step())  # fmt: skip
    assert scheduler.last_epoch == 5


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("engine", "name"), [(e, o) for e in ENGINES for o in OPTIMIZERS if trainable(e, o)])
def test_gradients_and_checkpoints_there_are_the_loops(engine: Any, name: str, accumulate: int) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), OPTIMIZERS[name])

    def snapshot(model: nn.Module, optimizer: Any) -> dict[str, Any]:
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if name == "AdamW" and accumulate > 1 and optimizer_steps(state["optimizer"]) == 0:
            # Before the first step its state is there already, all zero.
            state["optimizer"]["state"] = {}
        return state if engine == "cpu" else state | {"gradients": grads}

    expected: list[Any] = []
    plain(theirs, batches(), their_optimizer, lambda _: expected.append(snapshot(theirs, their_optimizer)), accumulate)
    found: list[Any] = []
    cnnrs.fit(0, ours, batches(), optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False,
              accumulate=accumulate, on_batch_end=lambda *_: found.append(snapshot(ours, our_optimizer)))  # fmt: skip
    for ours_then, theirs_then in zip(found, expected, strict=True):
        close(ours_then, theirs_then, engine)
    close(snapshot(ours, our_optimizer), snapshot(theirs, their_optimizer), engine)


@pytest.mark.parametrize("engine", ["torch", "cpu"])
def test_an_epoch_that_ends_before_the_first_step_leaves_no_state(engine: Any) -> None:
    model = network()
    optimizer = momentum(model.parameters())

    def broken() -> Iterator[Any]:
        yield from batches(2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cnnrs.fit(0, model, broken(), optimizer=optimizer, loss_fn=F.cross_entropy, accumulate=3, engine=engine)
    assert not any(optimizer.state.values())


# -- what on_batch_end changes -----------------------------------------------------------------------------------------


def _replace_head(model: Any, optimizer: Any) -> None:
    torch.manual_seed(5)
    model[8] = nn.Linear(16, 3)
    optimizer.add_param_group({"params": model[8].parameters()})


def _rewind(model: Any, optimizer: Any) -> None:
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["momentum_buffer"] = torch.zeros_like(entry["momentum_buffer"])
    optimizer.load_state_dict(state)


def _momentum(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0].update(momentum=0.0, dampening=0.1)


def _unfreeze(model: Any, optimizer: Any) -> None:
    model[0].requires_grad_(True)


def _hook(model: Any, optimizer: Any) -> None:
    model[7].register_forward_hook(lambda module, inputs, output: output * 0.5)


def _data(model: Any, optimizer: Any) -> None:
    model[8].weight.data = model[8].weight.data * 0.5


def _attribute(model: Any, optimizer: Any) -> None:
    model[3].momentum = 0.5


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "dropout": lambda model, _: cnnrs.set_dropout(model, 0.5),
    "freeze": lambda model, _: cnnrs.freeze(model[6]),
    "freeze statistics": lambda model, _: cnnrs.freeze(model[3], statistics=True),
    "unfreeze": _unfreeze,
    "eval of a part": lambda model, _: model[3].eval(),
    "a new head in a new group": _replace_head,
    "optimizer.load_state_dict": _rewind,
    "no momentum": _momentum,
    "nesterov": lambda _, optimizer: optimizer.param_groups[0].update(nesterov=True),
    "maximize": lambda _, optimizer: optimizer.param_groups[0].update(maximize=True),
    "a hook": _hook,
    "p.data": _data,
    "an attribute": _attribute,
    "an activation": lambda model, _: model.__setitem__(7, nn.Tanh()),
    "weights in place": lambda model, _: model.load_state_dict(network().state_dict()),
    "learning rate": lambda _, optimizer: optimizer.param_groups[0].update(lr=0.01),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_on_batch_end_changes_holds_from_the_next_batch_on(change: str, engine: Any, accumulate: int) -> None:
    # In the middle of a window engine "cpu" cannot stop: its gradients are nowhere else. It goes on to the step.
    at = 1 if engine == "cpu" else 2
    model = network()
    model[0].requires_grad_(change != "unfreeze")
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(model, momentum)

    def after(batch: int, model: Any, optimizer: Any) -> None:
        if batch == at:
            CHANGES[change](model, optimizer)

    torch.manual_seed(7)
    plain(theirs, batches(), their_optimizer, lambda i: after(i, theirs, their_optimizer), accumulate)
    torch.manual_seed(7)
    seen: list[int] = []
    cnnrs.fit(0, ours, batches(), optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False,
              accumulate=accumulate,
              on_batch_end=lambda i, _: (seen.append(i), after(i, ours, our_optimizer)))  # fmt: skip
    assert seen == [0, 1, 2, 3, 4]
    close(ours.state_dict(), theirs.state_dict(), engine)
    close(our_optimizer.state_dict(), their_optimizer.state_dict(), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_left_in_eval_mode_goes_on_in_it_with_a_note(engine: Any) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), momentum)
    plain(theirs, batches(), their_optimizer, lambda i: theirs.eval() if i == 2 else None)

    def fit(after: Callable[..., object]) -> None:
        cnnrs.fit(0, ours, batches(), optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False,
                  on_batch_end=after)  # fmt: skip

    with pytest.warns(UserWarning, match="on_batch_end has left the model in eval mode") as notes:
        fit(lambda i, _: ours.eval() if i == 2 else None)
    assert len(notes) == 1 and not ours.training
    close(ours.state_dict(), theirs.state_dict(), engine)

    def validate(batch: int, loss: float) -> None:
        cnnrs.fit(0, ours, batches(1), "validation", loss_fn=F.cross_entropy, engine=engine, verbose=False)
        ours.train()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(validate)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_changes(engine: Any) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), momentum)

    def loss() -> Any:
        return nn.CrossEntropyLoss(weight=torch.ones(3))

    their_loss, our_loss = loss(), loss()
    plain(
        theirs, batches(), their_optimizer, lambda i: their_loss.weight.mul_(torch.arange(1.0, 4.0)), loss_fn=their_loss
    )
    cnnrs.fit(0, ours, batches(), optimizer=our_optimizer, loss_fn=our_loss, engine=engine, verbose=False,
              on_batch_end=lambda *_: our_loss.weight.mul_(torch.arange(1.0, 4.0)))  # fmt: skip
    close(ours.state_dict(), theirs.state_dict(), engine)


# -- what is switched on around the call -------------------------------------------------------------------------------


def engine_of(**options: Any) -> str:
    """The engine that trains the network under "auto"."""
    model = network()
    with which_engine.watched() as calls:
        cnnrs.fit(0, model, batches(1), optimizer=momentum(model.parameters()), loss_fn=F.cross_entropy, verbose=False,
                  **options)  # fmt: skip
    (engine,) = calls
    return engine


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["torch", "python"])
def test_an_outer_autocast_is_respected(engine: Any, dtype: torch.dtype) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), momentum)
    theirs.train()
    for x, y in batches():
        with torch.autocast("cpu", dtype):
            their_optimizer.zero_grad()
            F.cross_entropy(theirs(x), y).backward()
            their_optimizer.step()
    with torch.autocast("cpu", dtype):
        cnnrs.fit(0, ours, batches(), optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False)
        assert engine_of() == "python"
        with pytest.raises(cnnrs.UnsupportedModelError, match="float32 only, and autocast asks for less"):
            engine_of(engine="cpu")
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    with torch.autocast("cuda", torch.bfloat16):
        assert engine_of() == "cpu"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_refused_before_anything_changes(around: Any, engine: Any) -> None:
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    optimizer = momentum(model.parameters())
    with (
        around(),
        pytest.raises(RuntimeError, match=rf"training inside torch\.{around.__name__}\(\), .* not require grad"),
    ):
        cnnrs.fit(0, model, batches(), optimizer=optimizer, loss_fn=F.cross_entropy, engine=engine)
    assert tutorial.same(model.state_dict(), before) and not model.training
    outside = cnnrs.fit(0, model, batches(), "validation", loss_fn=F.cross_entropy, engine=engine, verbose=False)
    with around():
        inside = cnnrs.fit(0, model, batches(), "validation", loss_fn=F.cross_entropy, engine=engine, verbose=False)
    assert inside == outside


@pytest.mark.parametrize("engine", ["torch", "python"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_default_dtype(name: str, engine: Any) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), OPTIMIZERS[name])
    data = batches()
    torch.set_default_dtype(torch.float64)
    try:
        for epoch in range(2):
            plain(theirs, data, their_optimizer, lambda _: None)
            cnnrs.fit(epoch, ours, data, optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False)
            assert tutorial.same(our_optimizer.state_dict(), their_optimizer.state_dict())
        cnnrs.fit(3, ours, data, optimizer=our_optimizer, loss_fn=F.cross_entropy, verbose=False)
    finally:
        torch.set_default_dtype(torch.float32)


def test_modes_that_an_engine_does_not_see_choose_another() -> None:
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    assert engine_of() == "cpu"
    with Counting() as mode:
        assert engine_of() == "python"
        with pytest.raises(cnnrs.UnsupportedModelError, match="the mode Counting is on"):
            engine_of(engine="torch")
    assert mode.calls > 10
    with FlopCounterMode(display=False) as flops:
        assert engine_of() != "cpu"
    assert flops.get_total_flops() > 1000
    with torch.autograd.detect_anomaly(check_nan=True):
        assert engine_of() == "python"
        with pytest.raises(cnnrs.UnsupportedModelError, match="anomaly detection is on"):
            engine_of(engine="cpu")
    with torch.device("cpu"):
        assert engine_of() == "cpu"


@pytest.mark.parametrize("engine", ENGINES)
def test_deterministic_algorithms(engine: Any) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), momentum)
    torch.use_deterministic_algorithms(True)
    try:
        plain(theirs, batches(), their_optimizer, lambda _: None)
        cnnrs.fit(0, ours, batches(), optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False)
    finally:
        torch.use_deterministic_algorithms(False)
    close(ours.state_dict(), theirs.state_dict(), engine)


# -- frozen statistics -------------------------------------------------------------------------------------------------


def frozen() -> nn.Sequential:
    model = network()
    cnnrs.freeze(model[:4], statistics=True)
    return model


def train(model: nn.Module, engine: str) -> None:
    optimizer = momentum([p for p in model.parameters() if p.requires_grad])
    if engine == "plain":
        plain(model, batches(), optimizer, lambda _: None)
    else:
        cnnrs.fit(0, model, batches(), optimizer=optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", [*ENGINES, "plain"])
def test_frozen_statistics_stay_whoever_calls_train(engine: str) -> None:
    model = frozen()
    kept = copy.deepcopy(model[:4].state_dict())
    assert model.train() is model and model[3].train() is model[3]
    train(model, engine)
    assert tutorial.same(model[:4].state_dict(), kept)
    assert model.training and not model[3].training and model[5].training
    # What the docstring says of eval() alone.
    model = network()
    cnnrs.freeze(model[:4]).eval()
    kept = copy.deepcopy(model[3].state_dict())
    train(model, engine)
    assert not tutorial.same(model[3].state_dict(), kept)


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_frozen_too_and_on_their_own(how: str) -> None:
    model = frozen()
    copied: Any = COPIES[how](model)
    kept = copy.deepcopy(copied[3].state_dict())
    assert copied[3].train() is copied[3]
    train(copied, "plain")
    assert tutorial.same(copied[3].state_dict(), kept)
    cnnrs.unfreeze(copied)
    assert copied[3].training and not model.train()[3].training
    assert model.state_dict().keys() == network().state_dict().keys()


@pytest.mark.parametrize("engine", [*ENGINES, "plain"])
def test_unfreezing_lets_them_move_again(engine: str) -> None:
    model = frozen().train()
    cnnrs.freeze(model[:4], statistics=True)
    cnnrs.unfreeze(model[:4])
    theirs = network()
    train(model, engine)
    train(theirs, "plain")
    close(model.state_dict(), theirs.state_dict(), "python" if engine == "plain" else engine)


def test_frozen_statistics_keep_the_fast_engines_and_exports() -> None:
    model = frozen().train()
    assert cnnrs.explain(model, (6, 1, 6, 6)).engine == "cpu"
    scripted = torch.jit.script(frozen().eval())
    program = torch.export.export(frozen().eval(), (batches(1)[0][0],))
    x = batches(1)[0][0]
    torch.testing.assert_close(scripted(x), program.module()(x))
    # It computes the same features: a store of them need not be computed again.
    assert fingerprint(frozen()) == fingerprint(network())
