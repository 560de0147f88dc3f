"""`cnnrs.fit` against the tutorial's loop: the same bits on either engine; what it says when something is wrong."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cnnrs
import tutorial
from cnnrs.models import CatDogNet, MnistNet, SimpleCNN

ENGINES = ["torch", "python"]
pytestmark = pytest.mark.filterwarnings("ignore:dropout2d:UserWarning")


def batches(shape: tuple[int, ...], classes: int, batch: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(batch, *shape, generator=generator), torch.randint(classes, (batch,), generator=generator))
        for _ in range(count)
    ]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


# The tutorial's three networks. SimpleCNN returns logits, the others log-probabilities.
NETWORKS = {
    "MnistNet": (MnistNet, (1, 28, 28), 10, F.nll_loss, 20),
    "CatDogNet": (CatDogNet, (3, 224, 224), 2, F.nll_loss, 2),
    "SimpleCNN": (SimpleCNN, (3, 32, 32), 10, F.cross_entropy, 10),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_tutorials_networks_train_to_the_same_bits(name: str, engine: Any) -> None:
    make, shape, classes, loss_fn, count = NETWORKS[name]
    torch.manual_seed(1)
    theirs, their_sgd, ours, our_sgd = tutorial.twins(make(), sgd)
    data = batches(shape, classes, 8, count)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = [tutorial.fit(theirs, data, phase, their_sgd, loss_fn) for phase in ("training", "validation")]
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        got = [
            cnnrs.fit(seed, ours, data, phase, optimizer=our_sgd, loss_fn=loss_fn, engine=engine, verbose=False)
            for phase in ("training", "validation")
        ]
        assert got == expected
        assert torch.equal(torch.get_rng_state(), after), "dropout drew other random numbers"
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert tutorial.same(our_sgd.state_dict(), their_sgd.state_dict())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_shuffled_loader_and_dropout_share_the_random_numbers_as_in_the_tutorial(engine: Any) -> None:
    x, y = torch.randn(50, 1, 28, 28), torch.randint(10, (50,))
    theirs, their_sgd, ours, our_sgd = tutorial.twins(MnistNet(), sgd)
    torch.manual_seed(3)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    expected = [tutorial.fit(theirs, loader, "training", their_sgd, F.nll_loss) for _ in range(2)]
    torch.manual_seed(3)
    loader = cnnrs.DataLoader(cnnrs.FeatureDataset(x, y), batch_size=8, shuffle=True)
    fit = cnnrs.compile(optimizer=our_sgd, loss_fn=F.nll_loss, engine=engine, verbose=False)
    got = [fit(e, ours, loader, "training") for e in range(2)]
    assert got == expected
    assert tutorial.same(ours.state_dict(), theirs.state_dict())


class Everything(nn.Module):
    """One of each operation that the graph knows, batch norm included."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, stride=1, padding=2, dilation=2, groups=8), nn.SiLU(True))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.norm = nn.BatchNorm2d(16, momentum=None)
        self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16, 12), nn.GELU(), nn.Dropout(0.3), nn.Linear(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.deep(x)
        y += x
        y = y * self.squeeze(y)
        x = torch.cat([x, F.hardswish(y)], 1)
        x = F.max_pool2d(F.relu6(self.norm(x)), 2, ceil_mode=True)
        x = F.dropout(self.pool(x), 0.1, self.training)
        return self.head(x.reshape(x.shape[0], -1, 4, 4))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_operation_trains_to_the_same_bits(engine: Any) -> None:
    torch.manual_seed(2)
    theirs, their_sgd, ours, our_sgd = tutorial.twins(Everything(), sgd)
    assert cnnrs.explain(ours).operations > 0, cnnrs.explain(ours)
    data = batches((3, 16, 16), 5, 6, 5)
    for phase in ("training", "validation", "training"):
        torch.manual_seed(9)
        expected = tutorial.fit(theirs, data, phase, their_sgd, F.cross_entropy)
        torch.manual_seed(9)
        assert cnnrs.fit(
            0, ours, data, phase, optimizer=our_sgd, loss_fn=F.cross_entropy, engine=engine, verbose=False
        ) == expected  # fmt: skip
        assert tutorial.same(ours.state_dict(), theirs.state_dict())


OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "everything SGD has": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, nesterov=True, weight_decay=0.01),
    "maximize": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.5, maximize=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "Adam, all options": lambda p: torch.optim.Adam(
        p, lr=1e-3, betas=(0.4, 0.98), eps=1e-6, weight_decay=0.01, amsgrad=True, maximize=True
    ),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW, all options": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, amsgrad=True, betas=(0.8, 0.9)),
    "groups": lambda p: (lambda ps: torch.optim.SGD(
        [{"params": ps[:2], "lr": 0.1}, {"params": ps[2:], "momentum": 0.9}], lr=0.01))(list(p)),
    "left to torch: foreach": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "left to torch: fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "left to torch: RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.1),
    "left to torch: Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_to_the_same_bits_and_keep_their_state(name: str, engine: Any) -> None:
    torch.manual_seed(1)
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(MnistNet(), OPTIMIZERS[name])
    data = batches((1, 28, 28), 10, 8, 6)
    for epoch in range(2):
        torch.manual_seed(epoch)
        expected = tutorial.fit(theirs, data, "training", their_optimizer, F.nll_loss)
        torch.manual_seed(epoch)
        got = cnnrs.fit(epoch, ours, data, optimizer=our_optimizer, loss_fn=F.nll_loss, engine=engine, verbose=False)
        assert got == expected
        assert tutorial.same(ours.state_dict(), theirs.state_dict())
        assert tutorial.same(our_optimizer.state_dict(), their_optimizer.state_dict())
    # The checkpoint goes on in plain PyTorch.
    fresh = MnistNet()
    fresh.load_state_dict(ours.state_dict())
    optimizer = OPTIMIZERS[name](fresh.parameters())
    optimizer.load_state_dict(copy.deepcopy(our_optimizer.state_dict()))
    torch.manual_seed(7)
    tutorial.fit(theirs, data, "training", their_optimizer, F.nll_loss)
    torch.manual_seed(7)
    tutorial.fit(fresh, data, "training", optimizer, F.nll_loss)
    assert tutorial.same(fresh.state_dict(), theirs.state_dict())


def test_which_optimizers_run_compiled() -> None:
    from cnnrs.engine.optimizers import Step

    model = MnistNet()
    native = {
        name: Step(make(model.parameters()), list(model.parameters())).native for name, make in OPTIMIZERS.items()
    }
    assert {name for name, is_native in native.items() if not is_native} == {n for n in OPTIMIZERS if "left" in n}
    hooked = sgd(model.parameters())
    hooked.register_step_post_hook(lambda *_: None)
    assert not Step(hooked, list(model.parameters())).native


LOSSES: dict[str, Any] = {
    "NLLLoss": nn.NLLLoss(),
    "CrossEntropyLoss": nn.CrossEntropyLoss(),
    "weighted": nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 10)),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "ignore_index": nn.NLLLoss(ignore_index=3),
    "a function of one's own": lambda output, target: F.cross_entropy(output, target) * 2,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_on_both_engines_and_in_plain_pytorch(name: str, engine: Any) -> None:
    loss_fn = LOSSES[name]
    theirs, their_sgd, ours, our_sgd = tutorial.twins(MnistNet().eval(), sgd)
    data = batches((1, 28, 28), 10, 8, 4)
    torch.manual_seed(0)
    theirs.train()
    means = []
    for x, y in data:
        their_sgd.zero_grad()
        loss = loss_fn(theirs(x), y)
        means.append(loss.item())
        loss.backward()
        their_sgd.step()
    torch.manual_seed(0)
    got = cnnrs.fit(0, ours, data, optimizer=our_sgd, loss_fn=loss_fn, engine=engine, verbose=False)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    # Mean of means: only the order of float32 additions differs (8 terms, 2**-24 each).
    assert got[0] == pytest.approx(tutorial.mean(loss_fn, means, data), rel=8 * 2**-24)


@pytest.mark.parametrize("engine", ENGINES)
def test_validation_changes_nothing(engine: Any) -> None:
    model = Everything()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    cnnrs.fit(
        0, model, batches((3, 16, 16), 5, 6, 3), "validation", loss_fn=F.cross_entropy, engine=engine, verbose=False
    )
    assert tutorial.same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parts_stay_and_get_no_gradient(engine: Any) -> None:
    model = cnnrs.models.SimpleCNN()
    cnnrs.freeze(model.conv1)
    theirs, their_sgd, ours, our_sgd = tutorial.twins(model, sgd)
    data = batches((3, 32, 32), 10, 4, 3)
    tutorial.fit(theirs, data, "training", their_sgd, F.cross_entropy)
    cnnrs.fit(0, ours, data, optimizer=our_sgd, loss_fn=F.cross_entropy, engine=engine, verbose=False)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert all(p.grad is None for p in ours.conv1.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_scheduler_steps_take_effect_without_a_warning(engine: Any) -> None:
    theirs, their_sgd, ours, our_sgd = tutorial.twins(MnistNet(), sgd)
    data = batches((1, 28, 28), 10, 8, 3)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.1) for o in (their_sgd, our_sgd)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="dropout2d")
        for epoch in range(3):
            torch.manual_seed(epoch)
            tutorial.fit(theirs, data, "training", their_sgd, F.nll_loss)
            torch.manual_seed(epoch)
            cnnrs.fit(epoch, ours, data, optimizer=our_sgd, loss_fn=F.nll_loss, engine=engine, verbose=False)
            for scheduler in schedulers:
                scheduler.step()
    assert our_sgd.param_groups[0]["lr"] == their_sgd.param_groups[0]["lr"] == pytest.approx(1e-5)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_tutorials_line_and_its_four_argument_call(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, their_sgd, ours, our_sgd = tutorial.twins(MnistNet(), sgd)
    data = batches((1, 28, 28), 10, 8, 3)
    fit = cnnrs.compile(optimizer=our_sgd, loss_fn=F.nll_loss, engine=engine)
    torch.manual_seed(0)
    expected = tutorial.fit(theirs, data, "training", their_sgd, F.nll_loss)
    torch.manual_seed(0)
    assert fit(0, ours, data, phase="training") == expected
    loss, accuracy = expected
    correct = round(accuracy / 100 * 24)
    line = f"training loss is {loss:{5}.{2}} and training accuracy is {correct}/24{accuracy:{10}.{4}}\n"
    assert capsys.readouterr() == (line, "")
    fit(0, ours, data, "validation")
    assert capsys.readouterr().out.startswith("validation loss is ")


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def mnist_fit(data: Any, model: nn.Module | None = None, **options: Any) -> tuple[float, float]:
    model = MnistNet() if model is None else model
    options = {"optimizer": sgd(model.parameters()), "loss_fn": F.nll_loss, "verbose": False} | options
    return cnnrs.fit(4, model, data, options.pop("phase", "training"), **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_nan_loss_stops_before_it_reaches_the_weights(engine: Any) -> None:
    data = batches((1, 28, 28), 10, 8, 3)
    model = MnistNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    good = copy.deepcopy(model)
    good_optimizer = torch.optim.SGD(good.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(0)
    cnnrs.fit(4, good, data[:2], optimizer=good_optimizer, loss_fn=F.nll_loss, engine=engine, verbose=False)
    data[2][0][0, 0, 0, 0] = math.nan
    torch.manual_seed(0)
    with pytest.raises(cnnrs.NonFiniteLossError, match=r"loss is NaN in training epoch 4, batch 2; the last finite"):
        cnnrs.fit(4, model, data, optimizer=optimizer, loss_fn=F.nll_loss, engine=engine, verbose=False)
    assert tutorial.same(model.state_dict(), good.state_dict())
    assert tutorial.same(optimizer.state_dict(), good_optimizer.state_dict())
    assert issubclass(cnnrs.NonFiniteLossError, FloatingPointError)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_target_that_the_model_has_no_output_for(engine: Any) -> None:
    data = [(torch.randn(4, 1, 28, 28), torch.tensor([0, 3, 12, 1]))]
    with pytest.raises(IndexError, match=r"[Tt]arget 12 is out of bounds"):
        mnist_fit(data, engine=engine)


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_a_wrong_shape_names_the_layer(engine: Any) -> None:
    """PyTorch's error, caused by the engine's."""
    with pytest.raises(RuntimeError, match=r"^Given groups=1, .* to have 1 channels, but got 3 channels") as raised:
        mnist_fit([(torch.randn(4, 3, 28, 28), torch.zeros(4, dtype=torch.int64))], engine=engine)
    assert str(raised.value.__cause__) == "conv1.0 (Conv2d): expects 1 input channels, got 3"


def test_wrong_arguments_are_named() -> None:
    data = batches((1, 28, 28), 10, 4, 1)
    with pytest.raises(ValueError, match="phase must be 'training' or 'validation', got 'train'"):
        mnist_fit(data, phase="train")
    with pytest.raises(ValueError, match=r"engine must be one of 'auto', .*, got 'gpu'"):
        mnist_fit(data, engine="gpu")
    with pytest.raises(TypeError, match=r"training needs optimizer="):
        mnist_fit(data, optimizer=None)
    with pytest.raises(ValueError, match=r"loss_fn must be one of 'cross_entropy', 'nll_loss', .*, got 'nll'"):
        mnist_fit(data, loss_fn="nll")
    with pytest.raises(TypeError, match=r"got the class CrossEntropyLoss: make one, CrossEntropyLoss\(\)"):
        mnist_fit(data, loss_fn=torch.nn.CrossEntropyLoss)
    with pytest.raises(TypeError, match="loss_fn must be callable, got float"):
        mnist_fit(data, loss_fn=0.5)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        cnnrs.fit(0, lambda x: x, data, loss_fn=F.nll_loss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        mnist_fit(data, optimizer=sgd(MnistNet().parameters()))
    with pytest.raises(ValueError, match="the loader yielded no samples"):
        mnist_fit([])
    with pytest.raises(TypeError, match=r"must yield pairs \(inputs, targets\), got a tuple of length 3"):
        mnist_fit([(*data[0], 1)])


@pytest.mark.parametrize("engine", ENGINES)
def test_devices_that_do_not_fit(engine: Any) -> None:
    data = batches((1, 28, 28), 10, 4, 1)
    with pytest.raises(RuntimeError, match="device meta, which holds no numbers"):
        mnist_fit(data, MnistNet().to("meta"), engine=engine)
    mixed = MnistNet()
    mixed.fc2.to("meta")
    with pytest.raises(RuntimeError, match=r"same device, but found conv1\.0\.weight on cpu, fc2\.0\.weight on meta"):
        mnist_fit(data, mixed, engine=engine)
    with pytest.raises(RuntimeError, match="the model is on cpu and the data on meta"):
        mnist_fit([(x.to("meta"), y) for x, y in data], engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_everything_frozen_is_pytorchs_error(engine: Any) -> None:
    model = MnistNet()
    optimizer = sgd(model.parameters())
    cnnrs.freeze(model)
    with pytest.raises(RuntimeError, match="does not require grad"):
        mnist_fit(batches((1, 28, 28), 10, 4, 1), model, optimizer=optimizer, engine=engine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_exception_in_the_loader_leaves_whole_steps(engine: Any, error: type[BaseException]) -> None:
    data = batches((1, 28, 28), 10, 8, 2)

    def broken() -> Iterator[Any]:
        yield from data
        raise error("stop here")

    theirs, their_sgd, ours, our_sgd = tutorial.twins(MnistNet(), OPTIMIZERS["momentum"])
    torch.manual_seed(0)
    tutorial.fit(theirs, data, "training", their_sgd, F.nll_loss)
    torch.manual_seed(0)
    with pytest.raises(error, match="stop here"):
        mnist_fit(broken(), ours, optimizer=our_sgd, engine=engine)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert tutorial.same(our_sgd.state_dict(), their_sgd.state_dict())


def test_targets_that_are_no_classes_have_no_accuracy() -> None:
    model = nn.Linear(3, 1)
    data = [(torch.randn(4, 3), torch.randn(4, 1))]
    loss, accuracy = mnist_fit(data, model, loss_fn=F.mse_loss)
    assert math.isfinite(loss) and math.isnan(accuracy)


@pytest.mark.parametrize("engine", ["cpu", "torch", "python"])
def test_the_gil_is_released_while_the_engine_works(engine: Any) -> None:
    import threading

    ticks = 0
    running = True

    def count() -> None:
        nonlocal ticks
        while running:
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    x, y = torch.randn(64, 3, 224, 224), torch.zeros(64, dtype=torch.int64)
    seen: list[int] = []

    def one_batch() -> Iterator[Any]:
        seen.append(ticks)
        yield x, y
        seen.append(ticks)

    model = CatDogNet()
    mnist_fit(one_batch(), model, optimizer=sgd(model.parameters()), engine=engine)
    running = False
    thread.join()
    assert seen[1] > seen[0] + 1000


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_training_on_cuda_follows_the_model(engine: Any) -> None:
    theirs, _, ours, _ = tutorial.twins(cnnrs.models.SimpleCNN().cuda(), sgd)
    their_sgd, our_sgd = sgd(theirs.parameters()), sgd(ours.parameters())
    data = batches((3, 32, 32), 10, 8, 10)
    on_gpu = [(x.cuda(), y.cuda()) for x, y in data]
    expected = tutorial.fit(theirs, on_gpu, "training", their_sgd, F.cross_entropy)
    got = cnnrs.fit(0, ours, data, optimizer=our_sgd, loss_fn=F.cross_entropy, engine=engine, verbose=False)
    # cuDNN may pick another algorithm from run to run: float32 sums of some 1,000 terms, 1e-7 each.
    assert got[0] == pytest.approx(expected[0], rel=1e-4)
    assert next(ours.parameters()).is_cuda
