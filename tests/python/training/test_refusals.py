"""What PyTorch refuses is refused, by every engine with PyTorch's exception, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import tutorial

ENGINES = ["auto", "cpu", "torch", "python"]
Case = tuple[nn.Module, torch.Tensor, torch.Tensor, Callable[..., Any]]


class Call(nn.Module):
    """A function of images between a normalised convolution and a classifier."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.function = function
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.function(self.norm(self.conv(x))).mean((2, 3)))


class Features(nn.Module):
    """A batch norm of features, which the function takes and the layer does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(192), nn.Linear(192, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.norm.running_mean, self.norm.running_var
        x = F.batch_norm(x.flatten(1), mean, var, self.norm.weight, self.norm.bias, training=True)
        return self.head(x)


def between(*layers: nn.Module) -> nn.Module:
    """Layers of four channels behind a batch norm, whose statistics must stay."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


def changed(layer: nn.Module, **attributes: Any) -> nn.Module:
    """A layer whose attributes were set after it was made, behind its own checks."""
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def weights(layer: nn.Module, **shapes: tuple[int, ...]) -> nn.Module:
    """A layer with parameters or buffers of other shapes."""
    for name, shape in shapes.items():
        old = getattr(layer, name)
        setattr(layer, name, nn.Parameter(torch.ones(shape)) if isinstance(old, nn.Parameter) else torch.ones(shape))
    return layer


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm of other channels": lambda: between(nn.BatchNorm2d(6)),
    "batch norm, statistics": lambda: between(weights(nn.BatchNorm2d(4), running_mean=(3,))),
    "batch norm, variance": lambda: between(weights(nn.BatchNorm2d(4), running_var=(5,))),
    "batch norm, weight": lambda: between(weights(nn.BatchNorm2d(4), weight=(3,))),
    "batch norm, bias": lambda: between(weights(nn.BatchNorm2d(4), bias=(5,))),
    "batch norm, eps": lambda: between(changed(nn.BatchNorm2d(4), eps="small")),
    "batch norm on features": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Flatten(), nn.BatchNorm2d(256), nn.Linear(256, 5)
    ),
    "batch norm without statistics": lambda: Call(lambda x: F.batch_norm(x, None, None)),
    "conv, channels": lambda: between(nn.Conv2d(3, 4, 1)),
    "conv, no stride": lambda: between(changed(nn.Conv2d(4, 4, 1), stride=(0, 1))),
    "conv, padding": lambda: between(changed(nn.Conv2d(4, 4, 1), padding=(-1, 0))),
    "conv, no dilation": lambda: between(changed(nn.Conv2d(4, 4, 3), dilation=(0, 0))),
    "conv, groups": lambda: between(changed(nn.Conv2d(2, 3, 1), groups=2)),
    "conv, no groups": lambda: between(changed(nn.Conv2d(4, 4, 1), groups=0)),
    "conv, large": lambda: between(nn.Conv2d(4, 4, 9)),
    "conv, same": lambda: between(changed(nn.Conv2d(4, 4, 3, padding="same"), stride=(2, 2))),
    "conv, bias": lambda: between(weights(nn.Conv2d(4, 4, 1), bias=(3,))),
    "max pool, padding": lambda: between(nn.MaxPool2d(3, padding=2)),
    "max pool, dilated padding": lambda: between(nn.MaxPool2d(2, padding=2, dilation=2)),
    "max pool, large": lambda: between(nn.MaxPool2d(9)),
    "max pool, no stride": lambda: between(nn.MaxPool2d(2, stride=0)),
    "max pool, no kernel": lambda: between(nn.MaxPool2d(0)),
    "max pool, no dilation": lambda: between(nn.MaxPool2d(2, dilation=0)),
    "average pool, padding": lambda: between(nn.AvgPool2d(2, padding=2)),
    "average pool, large": lambda: between(nn.AvgPool2d(9)),
    "average pool, no stride": lambda: between(nn.AvgPool2d(2, stride=0)),
    "average pool, divisor": lambda: between(nn.AvgPool2d(2, divisor_override=0)),
    "adaptive pool": lambda: between(nn.AdaptiveAvgPool2d(-1)),
    "adaptive pool, sides": lambda: between(nn.AdaptiveAvgPool2d((1, 2, 3))),
    "linear, features": lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 5)),
    "linear, bias": lambda: nn.Sequential(nn.Flatten(), weights(nn.Linear(192, 5), bias=(4,))),
    "layer norm, shape": lambda: between(nn.LayerNorm((4, 8))),
    "layer norm, weight": lambda: between(weights(nn.LayerNorm((8, 8)), weight=(8,))),
    "flatten, order": lambda: Call(lambda x: torch.flatten(x, 3, 1)),
    "flatten, dims": lambda: Call(lambda x: torch.flatten(x, 1, 4)),
    "view, size": lambda: Call(lambda x: x.view(4, 100)),
    "view, two inferred": lambda: Call(lambda x: x.view(-1, 4, -1)),
    "view, negative": lambda: Call(lambda x: x.view(4, -2)),
    "cat, dim": lambda: Call(lambda x: torch.cat([x, x], 4)),
    "cat, shapes": lambda: Call(lambda x: torch.cat([x, F.max_pool2d(x, 2)], 1)),
    "mean, dim": lambda: Call(lambda x: x.mean((2, 4))),
    "mean, twice": lambda: Call(lambda x: x.mean((2, -2))),
    "mean of all": lambda: Call(lambda x: torch.mean(x, dim=[])),
    "permute, repeated": lambda: Call(lambda x: x.permute(0, 1, 1, 2)),
    "permute, range": lambda: Call(lambda x: x.permute(0, 1, 2, 7)),
    "permute, number": lambda: Call(lambda x: x.permute(0, 1, 2)),
    "pad": lambda: Call(lambda x: F.pad(x, (1, 1, 1))),
    "pad, negative": lambda: Call(lambda x: F.pad(x, (-5, -5))),
    "softmax, dim": lambda: between(nn.Softmax(dim=7)),
    "log softmax, dim": lambda: between(nn.LogSoftmax(dim=-5)),
    "softmax of features": lambda: nn.Sequential(between(), nn.LogSoftmax(dim=2)),
    "dropout": lambda: between(changed(nn.Dropout(), p=1.5)),
    "dropout2d": lambda: between(changed(nn.Dropout2d(), p=-0.1)),
    "F.dropout": lambda: Call(lambda x: F.dropout(x, 2.0)),
    "F.dropout, off": lambda: Call(lambda x: F.dropout(x, -2.0, training=False)),
    "leaky relu": lambda: between(nn.LeakyReLU(-0.1, inplace=True)),
    "gelu": lambda: between(changed(nn.GELU(), approximate="erf")),
    "add, shapes": lambda: Call(lambda x: x + F.max_pool2d(x, 3)),
    "mul, shapes": lambda: Call(lambda x: x * F.max_pool2d(x, 3)),
    "nothing to train": lambda: frozen(between()),
    "nothing on the way": lambda: Call(lambda x: x.detach() * 0).requires_grad_(False),
    "double precision": lambda: between().double(),
}  # fmt: skip


def targets(*values: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


GOOD = targets(0, 1, 2, 3)
#: Targets and a loss for four rows of five classes.
LOSSES: dict[str, tuple[torch.Tensor, Callable[..., Any]]] = {
    "label smoothing": (GOOD, nn.CrossEntropyLoss(label_smoothing=1.5)),
    "weight, short": (GOOD, nn.CrossEntropyLoss(weight=torch.ones(4))),
    "weight, long": (GOOD, nn.NLLLoss(weight=torch.ones(6))),
    "weight, double": (GOOD, nn.CrossEntropyLoss(weight=torch.ones(5, dtype=torch.float64))),
    "weight, matrix": (GOOD, nn.CrossEntropyLoss(weight=torch.ones(5, 1))),
    "target, large": (targets(0, 1, 5, 2), F.cross_entropy),
    "target, negative": (targets(0, 1, -1, 2), F.nll_loss),
    "target, another ignored": (targets(0, 1, -100, 2), nn.CrossEntropyLoss(ignore_index=-1)),
    "targets, too few": (targets(0, 1, 2), F.cross_entropy),
    "targets, too few, nll": (targets(0, 1, 2), F.nll_loss),
    "targets, float": (targets(0, 1, 2, 3, dtype=torch.float32), F.cross_entropy),
    "targets, int32": (targets(0, 1, 2, 3, dtype=torch.int32), F.nll_loss),
    "targets, bool": (targets(0, 1, 1, 0, dtype=torch.bool), F.cross_entropy),
    "targets, one column": (GOOD[:, None], F.cross_entropy),
    "targets of mse": (torch.zeros(4, 3), F.mse_loss),
    "integers for mse": (GOOD, F.mse_loss),
    "targets of bce": (torch.zeros(4, 3), F.binary_cross_entropy_with_logits),
    "integers for bce": (GOOD, nn.BCEWithLogitsLoss()),
    "loss of every sample": (GOOD, nn.CrossEntropyLoss(reduction="none")),
}  # fmt: skip

INPUTS: dict[str, torch.Tensor] = {
    "one value per channel": torch.randn(1, 3, 1, 1),
    "no values": torch.randn(4, 3, 0, 8),
    "channels": torch.randn(4, 1, 8, 8),
    "no channels": torch.randn(4, 64),
    "five dimensions": torch.randn(4, 3, 8, 8, 1),
    "double": torch.randn(4, 3, 8, 8, dtype=torch.float64),
    "integers": torch.randint(9, (4, 3, 8, 8)),
}


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, loss_fn: Callable[..., Any]) -> None:
    model.train()
    for x, y in data:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def check(
    engine: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss_fn: Callable[..., Any], before: int = 0
) -> None:
    """``before``: good batches before the one that is refused."""
    good = [(torch.randn(4, 3, 8, 8), GOOD)] * before

    def optimizer(of: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(of.parameters(), lr=0.1, momentum=0.9)

    theirs = copy.deepcopy(model)
    with pytest.raises(Exception) as expected:
        plain(theirs, optimizer(theirs), [(x, y)], loss_fn)
    ours, whole = copy.deepcopy(model), copy.deepcopy(model)
    our_sgd, whole_sgd = optimizer(ours), optimizer(whole)
    if good:
        cnnrs.fit(0, whole, good, optimizer=whole_sgd, loss_fn=loss_fn, engine=engine, verbose=False)
    state = torch.get_rng_state()
    with pytest.raises(type(expected.value)) as found:
        cnnrs.fit(0, ours, [*good, (x, y)], optimizer=our_sgd, loss_fn=loss_fn, engine=engine, verbose=False)
    assert type(found.value) is type(expected.value)
    assert str(found.value)[:24] == str(expected.value)[:24]
    assert tutorial.same(ours.state_dict(), whole.state_dict())
    assert tutorial.same(our_sgd.state_dict(), whole_sgd.state_dict())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_arguments_of_every_operation(name: str, engine: str) -> None:
    torch.manual_seed(0)
    check(engine, MODELS[name](), torch.randn(4, 3, 8, 8), GOOD, F.cross_entropy)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_targets(name: str, engine: str) -> None:
    torch.manual_seed(0)
    check(engine, between(), torch.randn(4, 3, 8, 8), *LOSSES[name])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_the_first_and_of_the_last_batch(name: str, before: int, engine: str) -> None:
    torch.manual_seed(0)
    x = INPUTS[name]
    check(engine, between(), x, GOOD[: len(x)], F.cross_entropy, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_photo_left_over_for_a_resnet(engine: Any) -> None:
    """32 x 32 pixels are one behind the last stride: the last batch of one has one value per channel."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    data = [(torch.randn(n, 3, 32, 32), GOOD[:n]) for n in (2, 1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        cnnrs.fit(0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, engine=engine, verbose=False)
    assert model.bn1.num_batches_tracked == 1 and bool(model.layer4[0].bn1.running_var.isfinite().all())


def bad_step(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """An optimizer whose options were set behind its own checks."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        kind = torch.optim.Adam if "betas" in options or "amsgrad" in options else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=0.1)
        optimizer.param_groups[0].update(options)
        return optimizer

    return make


@pytest.mark.parametrize("engine", ["auto", "torch", "python"])
@pytest.mark.parametrize("options", [
    {"lr": "0.1"}, {"lr": None}, {"momentum": "0.9"}, {"weight_decay": "0.1"}, {"betas": (0.9, "0.999")},
    {"betas": 0.9},
], ids=str)  # fmt: skip
def test_options_of_optimizers_that_are_no_numbers(options: dict[str, Any], engine: Any) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(4, 3, 8, 8), GOOD)] * 2
    theirs = between()
    with pytest.raises(Exception) as expected:
        plain(theirs, bad_step(**options)(theirs), data, F.cross_entropy)
    ours = between()
    with pytest.raises(type(expected.value)):
        cnnrs.fit(0, ours, data, optimizer=bad_step(**options)(ours), loss_fn=F.cross_entropy, engine=engine)


def test_what_pytorch_takes_is_taken() -> None:
    """Neighbours of the cases above."""
    models = {
        "batch norm of features": Features(),
        "bias of one": nn.Sequential(nn.Flatten(), weights(nn.Linear(192, 5), bias=(1,))),
        "stride of one side": between(changed(nn.MaxPool2d(2), stride=[2])),
        "negative slope": between(nn.LeakyReLU(-0.1)),
        "empty list of strides": between(nn.MaxPool2d(2, stride=[])),
        "negative padding": Call(lambda x: F.pad(x, (-1, 1))),
    }
    data = [(torch.randn(4, 3, 8, 8), GOOD)]
    for name, model in models.items():
        twin = copy.deepcopy(model)
        plain(twin, torch.optim.SGD(twin.parameters(), lr=0.1), data, F.cross_entropy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cnnrs.fit(0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            # One step of lr 0.1 in float32: gradients of order 1 are off by some 1e-6.
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
