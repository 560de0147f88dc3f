"""Engine `cpu` against autograd in float64, op by op and over whole trainings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnrs import _cnnrs, errors, models
from cnnrs._records import Loss
from cnnrs.engine import cpu_training
from cnnrs.model.lowering import lower

pytestmark = pytest.mark.usefixtures("two_threads")
CROSS_ENTROPY: Loss = {"kind": "cross_entropy", "weight": None, "ignore_index": -100, "label_smoothing": 0.0}
NLL: Loss = {"kind": "nll", "weight": None, "ignore_index": -100}
WEIGHT = torch.tensor([1.0, 2.0, 0.5])

# A float32 sum of n <= 1e4 products is off by about sqrt(n) * 2**-24 = 6e-6 of its largest term; 4 layers add up.
TOLERANCE = 3e-5


def run(model: nn.Module, loss: Any, optimizer: Any, batches: list[Any], phase: str = "training") -> list[float]:
    """Mean loss of every batch."""
    model.train(phase == "training")
    lowered = lower(model)
    assert cpu_training.obstacles(lowered, batches[0][0], loss=loss, optimizer=optimizer) == []
    losses = []
    for batch in batches:
        losses.append(cpu_training.run(0, phase, model, lowered, loss, optimizer, iter([batch])).mean)
    return losses


def gradients(model: nn.Module, loss: Any, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The engine's gradients: what SGD with momentum keeps after its first step is the gradient itself."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-30, momentum=0.9)
    run(model, loss, optimizer, [(x, y)])
    return {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters() if p.requires_grad}


def check_gradients(
    model: nn.Module, shape: tuple[int, ...], loss: Any = CROSS_ENTROPY, tolerance: float = TOLERANCE
) -> None:
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    exact = copy.deepcopy(model).double().train()
    exact_eval = copy.deepcopy(exact).eval()
    x = torch.randn(shape)
    outputs = exact(x.double())
    y = torch.randint(0, outputs.shape[1], (shape[0],))
    reference = F.cross_entropy if loss["kind"] == "cross_entropy" else F.nll_loss
    value = reference(outputs, y)
    value.backward()
    losses = run(copy.deepcopy(model), loss, torch.optim.SGD(model.parameters(), lr=0.1), [(x, y)], "validation")
    assert losses[0] == pytest.approx(reference(exact_eval(x.double()), y).item(), rel=tolerance)
    found = gradients(model, loss, x, y)
    largest = {n.rpartition(".")[0]: 0.0 for n, _ in exact.named_parameters()}
    for name, p in exact.named_parameters():
        layer = name.rpartition(".")[0]
        largest[layer] = max(largest[layer], p.grad.abs().max().item())
    for name, p in exact.named_parameters():
        # A bias before batch norm has no gradient: its terms cancel and leave the rounding of its layer's.
        scale = largest[name.rpartition(".")[0]]
        assert scale > 0, f"{name}: the test sees no gradient"
        worst = (found[name].double() - p.grad).abs().max().item()
        assert worst <= tolerance * scale, f"{name}: {worst} of {scale}"
    for name, buffer in exact.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name].double(), buffer.double(), rtol=1e-5, atol=1e-6)


def between(*layers: nn.Module, channels: int = 4, out: int | None = None) -> nn.Module:
    """Layers with parameters before them (so that their input's derivative counts) and a classifier after them."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear((out or channels) * 4, 5))
    return nn.Sequential(nn.Conv2d(3, channels, 1), *layers, head)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv3": lambda: between(nn.Conv2d(4, 6, 3, padding=1), out=6),
    "conv5_stride2": lambda: between(nn.Conv2d(4, 6, 5, stride=2, padding=2), out=6),
    "conv_uneven": lambda: between(nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(2, 1), bias=False), out=6),
    "conv_dilated": lambda: between(nn.Conv2d(4, 6, 3, dilation=2, padding=1), out=6),
    "conv_groups": lambda: between(nn.Conv2d(4, 8, 3, groups=2, padding=1), out=8),
    "conv_depthwise": lambda: between(nn.Conv2d(4, 8, 3, groups=4, padding=1), out=8),
    "conv_wide": lambda: between(nn.Conv2d(4, 70, 3, padding=1), nn.Conv2d(70, 130, 3, padding=1), out=130),
    "conv3_pool": lambda: between(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), out=6),
    "conv5_pool": lambda: between(nn.Conv2d(4, 7, 5), nn.ReLU(True), nn.MaxPool2d(2), out=7),
    "conv3_pool_relu": lambda: between(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.ReLU(), out=6),
    "conv3_pool_only": lambda: between(nn.Conv2d(4, 6, 3, bias=False), nn.MaxPool2d(2), out=6),
    "two_conv_pools": lambda: between(
        nn.Conv2d(4, 17, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(17, 9, 3), nn.ReLU(), nn.MaxPool2d(2),
        out=9,
    ),
    "relu": lambda: between(nn.ReLU()),
    "relu6": lambda: between(nn.ReLU6()),
    "leaky": lambda: between(nn.LeakyReLU(0.1)),
    "silu": lambda: between(nn.SiLU()),
    "gelu": lambda: between(nn.GELU()),
    "gelu_tanh": lambda: between(nn.GELU(approximate="tanh")),
    "hardswish": lambda: between(nn.Hardswish()),
    "hardsigmoid": lambda: between(nn.Hardsigmoid()),
    "sigmoid": lambda: between(nn.Sigmoid()),
    "tanh": lambda: between(nn.Tanh()),
    "max_pool": lambda: between(nn.MaxPool2d(3, 2, 1)),
    "max_pool_dilated": lambda: between(nn.MaxPool2d((3, 2), (2, 1), (1, 0), dilation=(2, 1))),
    "max_pool_ceil": lambda: between(nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "avg_pool": lambda: between(nn.AvgPool2d(3, 2, 1)),
    "avg_pool_ceil": lambda: between(nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    "avg_pool_exclude": lambda: between(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "avg_pool_divisor": lambda: between(nn.AvgPool2d(2, divisor_override=3)),
    "adaptive": lambda: between(nn.AdaptiveAvgPool2d((3, 5))),
    "batch_norm": lambda: between(nn.BatchNorm2d(4), nn.ReLU()),
    "batch_norm_plain": lambda: between(nn.BatchNorm2d(4, affine=False, momentum=None), nn.ReLU()),
    "batch_norm_untracked": lambda: between(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
    "log_softmax": lambda: nn.Sequential(between(nn.ReLU()), nn.LogSoftmax(1)),
    "softmax": lambda: between(nn.Softmax(1)),
    "softmax_width": lambda: between(nn.Softmax(-1)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [(3, 3, 12, 11), (2, 3, 19, 34)])
def test_layer_against_float64_autograd(name: str, size: tuple[int, ...]) -> None:
    check_gradients(LAYERS[name](), size, NLL if name == "log_softmax" else CROSS_ENTROPY)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("features", "outputs", "batch"), [(700, 513, 5), (1027, 300, 33), (4096, 64, 7), (513, 700, 1)]
)
def test_large_matrices_against_float64_autograd(features: int, outputs: int, batch: int, trained: bool) -> None:
    torch.manual_seed(0)
    middle = nn.Linear(features, outputs).requires_grad_(trained)
    model = nn.Sequential(nn.Linear(20, features), nn.ReLU(), middle, nn.ReLU(), nn.Linear(outputs, 5))
    x, y = torch.randn(batch, 20), torch.randint(5, (batch,))
    exact = copy.deepcopy(model).double()
    F.cross_entropy(exact(x.double()), y).backward()
    for name, found in gradients(model, CROSS_ENTROPY, x, y).items():
        expected = exact.get_parameter(name).grad
        assert expected is not None
        assert (found.double() - expected).norm() <= TOLERANCE * expected.norm(), name


class Branches(nn.Module):
    """Every way values meet: residual, in-place ReLU, concatenation, a scale per channel, mean, reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.squeeze = nn.Conv2d(4, 4, 1)
        self.large = nn.Linear(8, 40000)
        self.head = nn.Linear(40000, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = self.norm(self.left(x))
        y += x
        y = F.relu(y, inplace=True)
        scale = torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(y, 1)))
        y = torch.cat([scale * y, x + x], 1)
        y = y.mean([2, 3]).view(x.size(0), -1)
        return self.head(F.relu(self.large(y)))


def test_branches_against_float64_autograd() -> None:
    # The head sums 40000 products: twice the square root of 1e4.
    check_gradients(Branches(), (5, 3, 9, 8), tolerance=2 * TOLERANCE)


@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        (CROSS_ENTROPY | {"weight": WEIGHT, "ignore_index": 1}, nn.CrossEntropyLoss(WEIGHT, ignore_index=1)),
        (CROSS_ENTROPY | {"label_smoothing": 0.2}, nn.CrossEntropyLoss(label_smoothing=0.2)),
        (
            CROSS_ENTROPY | {"weight": WEIGHT, "ignore_index": 2, "label_smoothing": 0.2},
            nn.CrossEntropyLoss(WEIGHT, ignore_index=2, label_smoothing=0.2),
        ),
        (NLL | {"weight": WEIGHT, "ignore_index": 0}, nn.NLLLoss(WEIGHT, ignore_index=0)),
    ],
)  # fmt: skip
def test_losses_with_weights_smoothing_and_ignored_targets(loss: Any, reference: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    exact = copy.deepcopy(model).double()
    x, y = torch.randn(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    value = reference.double()(exact(x.double()), y)
    value.backward()
    found = gradients(copy.deepcopy(model), loss, x, y)
    for name, p in exact.named_parameters():
        torch.testing.assert_close(found[name].double(), p.grad, rtol=1e-5, atol=1e-7)
    (mean,) = run(model, loss, None, [(x, y)], "validation")
    weighted = loss["weight"] is not None
    ignored = (y == loss["ignore_index"]).sum().item()
    expected = value.item() if weighted else value.item() * (7 - ignored) / 7
    assert mean == pytest.approx(expected, rel=1e-6)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=1e-3, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, eps=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, eps=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_follow_torch_for_small_and_large_matrices(name: str) -> None:
    torch.manual_seed(0)
    # 600 x 500 is above the size from which gradient and update are one.
    model = nn.Sequential(nn.Linear(20, 600), nn.ReLU(), nn.Linear(600, 500), nn.ReLU(), nn.Linear(500, 3))
    batches = [(torch.randn(9, 20), torch.randint(0, 3, (9,))) for _ in range(6)]
    results = []
    for engine in ("plain", "cpu"):
        net = copy.deepcopy(model)
        optimizer = OPTIMIZERS[name](net.parameters())
        if engine == "cpu":
            losses = run(net, CROSS_ENTROPY, optimizer, batches)
        else:
            losses = eager(net, F.cross_entropy, optimizer, batches)
        results.append((losses, net, optimizer.state_dict()["state"]))
    (expected, net, state), (found, ours, our_state) = results
    # Six steps of float32 noise, 6e-8 each. Adam divides by |gradient| + eps: a gradient's noise times at most 1 / eps.
    tolerance = 1e-5
    assert found == pytest.approx(expected, rel=tolerance)
    for p, q in zip(net.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance)
    assert state.keys() == our_state.keys()
    for index in state:
        assert state[index].keys() == our_state[index].keys()
        if "step" in state[index]:
            assert torch.equal(state[index]["step"], our_state[index]["step"])


def eager(model: nn.Module, loss: Any, optimizer: Any, batches: list[Any]) -> list[float]:
    model.train()
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    return model


@pytest.mark.parametrize(
    ("network", "loss", "shape"),
    [(models.MnistNet, "nll", (32, 1, 28, 28)), (models.SimpleCNN, "cross_entropy", (16, 3, 32, 32))],
)
def test_many_steps_follow_eager(network: Callable[[], nn.Module], loss: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = without_dropout(network())
    batches = [(torch.randn(shape), torch.randint(0, 10, shape[:1])) for _ in range(30)]
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    parts = [(m, torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.5)) for m in (exact, ours)]
    loss_fn = getattr(F, "nll_loss" if loss == "nll" else "cross_entropy")
    # In float64: where a ReLU is nearly zero, eager float32 on some processors is twice the bound away from that, too.
    doubles = [(inputs.double(), targets) for inputs, targets in batches]
    expected = eager(parts[0][0], loss_fn, parts[0][1], doubles)
    found = run(parts[1][0], NLL if loss == "nll" else CROSS_ENTROPY, parts[1][1], batches)
    # The bound of the specification: 1e-5 relative.
    assert found == pytest.approx(expected, rel=1e-5)


def test_frozen_parameters_stay_and_what_is_behind_them_learns() -> None:
    torch.manual_seed(0)
    model = without_dropout(models.MnistNet())
    model.conv1.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    ours = copy.deepcopy(model)
    batches = [(torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,))) for _ in range(3)]
    make = lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)  # noqa: E731
    expected = eager(model, F.nll_loss, make(model), batches)
    assert run(ours, NLL, make(ours), batches) == pytest.approx(expected, rel=1e-5)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("conv1")


def test_same_seed_same_bits_and_dropout_ignores_the_number_of_threads() -> None:
    torch.manual_seed(0)
    model = models.MnistNet()
    batches = [(torch.randn(33, 1, 28, 28), torch.randint(0, 10, (33,))) for _ in range(3)]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (2, 2, 1, 3):
            torch.set_num_threads(count)
            torch.manual_seed(7)
            net = copy.deepcopy(model)
            losses = run(net, NLL, torch.optim.SGD(net.parameters(), lr=0.1), batches)
            results.append((losses, [p.detach() for p in net.parameters()]))
    finally:
        torch.set_num_threads(threads)
    (losses, parameters), (again, same), *others = results
    assert losses == again
    assert all(torch.equal(p, q) for p, q in zip(parameters, same, strict=True))
    for other, _ in others:
        # Other masks would move the loss by whole per cents; another order of adding moves it by rounding.
        assert other == pytest.approx(losses, rel=1e-5)


def test_dropout_keeps_and_scales_as_torch_does() -> None:
    # Gradient of the first bias = scale of each element, averaged over the batch: mean 1, variance p / (1 - p) / N.
    n, p = 4000, 0.3
    model = nn.Sequential(nn.Linear(1, 64), nn.Dropout(p), nn.Linear(64, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[0].bias)
    with torch.no_grad():
        model[2].weight.copy_(torch.stack([torch.zeros(64), torch.full((64,), 1e-6)]))
        model[2].bias.zero_()
    found = gradients(model, CROSS_ENTROPY, torch.zeros(n, 1), torch.ones(n, dtype=torch.int64))["0.bias"] / -5e-7
    spread = (p / (1 - p) / n) ** 0.5
    assert (found - 1).abs().max().item() < 5 * spread
    assert found.std().item() == pytest.approx(spread, rel=0.5)


def test_validation_changes_nothing_and_agrees_with_eager() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(200, 4),
    )
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(7, 3, 12, 12), torch.randint(0, 4, (7,))
    state = torch.get_rng_state()
    (loss,) = run(model, CROSS_ENTROPY, None, [(x, y)], "validation")
    assert loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_plans_are_kept_for_full_and_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[_cnnrs.CpuPlans] = []
    real = _cnnrs.CpuPlans
    monkeypatch.setattr(_cnnrs, "CpuPlans", lambda: made.append(real()) or made[-1])
    model = models.MnistNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,))) for n in (8, 8, 3)]
    for _ in range(2):
        run(model, NLL, optimizer, batches)
    assert sum(map(len, made)) == 2


def test_more_threads_than_samples() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        check_gradients(LAYERS["batch_norm"](), (2, 3, 8, 8))
        check_gradients(LAYERS["two_conv_pools"](), (1, 3, 16, 16))
    finally:
        torch.set_num_threads(threads)


def test_a_loss_that_is_not_finite_leaves_the_weights() -> None:
    model = models.MnistNet()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    x = torch.full((4, 1, 28, 28), float("nan"))
    with pytest.raises(errors.NonFiniteLossError, match="batch 0"):
        run(model, NLL, optimizer, [(x, torch.zeros(4, dtype=torch.int64))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize(
    ("x", "y", "error", "match"),
    [
        (torch.zeros(2, 1, 28, 28), torch.tensor([0, 10]), IndexError, "Target 10"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.float64), torch.tensor([0, 1]), TypeError, "float32"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(2, 10), ValueError, "one target per sample, a class index, got 20"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(2, 1, 10), TypeError, "class indices"),
        (
            torch.zeros(2, 3, 28, 28),
            torch.tensor([0, 1]),
            RuntimeError,
            r"conv1.0 \(Conv2d\): expects 1 input channels",
        ),
        (torch.zeros(2, 1, 28, 28), torch.tensor([0, 1, 2]), ValueError, "one target per sample"),
    ],
)
def test_wrong_batches_say_what_is_wrong(x: torch.Tensor, y: torch.Tensor, error: type[Exception], match: str) -> None:
    model = models.MnistNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=match):
        cpu_training.run(0, "training", model, lower(model.train()), NLL, optimizer, iter([(x, y)]))


class MixesSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softmax(self.fc(x), dim=0)


def test_obstacles_are_named() -> None:
    model = nn.Linear(4, 4)
    lowered, sgd = lower(model), torch.optim.SGD(model.parameters(), lr=0.1)
    assert cpu_training.obstacles(lowered, loss=NLL, optimizer=sgd) == []
    lbfgs = torch.optim.LBFGS(model.parameters())
    assert "LBFGS" in cpu_training.obstacles(lowered, optimizer=lbfgs)[0]
    assert "meta" in cpu_training.obstacles(lowered, torch.zeros(2, 4, device="meta"))[0]
    assert "float64" in cpu_training.obstacles(lowered, torch.zeros(2, 4, dtype=torch.float64))[0]
    (reason,) = cpu_training.obstacles(lower(MixesSamples()), torch.zeros(2, 4), loss=NLL)
    assert "across samples" in reason
