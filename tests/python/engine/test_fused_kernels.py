"""Convolutions that compute the batch norm in front of them, with PyTorch in float64 as the judge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnrs.engine.kernel_functions import Written
from cnnrs.engine.kernels import Kernels
from cnnrs.model.lowering import lower
from native_block import Gated, Inverted, Mean, Padded, assert_as_exact, sequential

pytestmark = pytest.mark.usefixtures("two_threads")


def ready(model: nn.Module, mode: str) -> nn.Module:
    """With statistics as they are after some batches, and weights that are not alike."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor, low, high in ((norm.running_mean, -0.5, 0.5), (norm.running_var, 0.5, 2.0)):
            if tensor is not None:
                nn.init.uniform_(tensor, low, high)
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    model.train(mode != "eval")
    if mode == "frozen statistics":
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval()
    return model


def test_what_is_computed_together() -> None:
    lowered = lower(Inverted(nn.ReLU), True)
    kinds = [[lowered.kinds[node] for node in group.nodes] for group in Kernels(lowered).groups.values()]
    assert kinds == [
        ["BatchNorm2d"], ["Conv2d"], ["BatchNorm2d", "ReLU", "Conv2d"], ["BatchNorm2d", "ReLU", "Conv2d"],
        ["BatchNorm2d", "Add"], ["Conv2d"], ["BatchNorm2d", "ReLU"],
    ]  # fmt: skip

    for pool, kind in ((nn.AdaptiveAvgPool2d(1), "AdaptiveAvgPool2d"), (Mean(), "Mean")):
        lowered = lower(Gated(nn.ReLU, pool=pool), True)
        kinds = [[lowered.kinds[node] for node in group.nodes] for group in Kernels(lowered).groups.values()]
        assert kinds == [
            ["BatchNorm2d"], ["Conv2d"], ["BatchNorm2d", "ReLU", kind], ["Mul", "Conv2d"], ["Conv2d"], ["Conv2d"],
            ["BatchNorm2d", "Add"],
        ]  # fmt: skip

    lowered = lower(Padded(nn.ReLU), True)
    kinds = [[lowered.kinds[node] for node in group.nodes] for group in Kernels(lowered).groups.values()]
    assert kinds == [
        ["BatchNorm2d"], ["Conv2d"], ["BatchNorm2d", "ReLU", "ZeroPad2d", "Conv2d"], ["BatchNorm2d", "ReLU", "Conv2d"],
        ["BatchNorm2d", "Add"], ["Conv2d"], ["BatchNorm2d", "ReLU"],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [Inverted, Gated, Padded])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.ReLU, nn.ReLU6, nn.Identity, nn.GELU])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen statistics"])
def test_a_step_has_the_gradients_of_the_module(kind: Any, activation: Any, mode: str) -> None:
    torch.manual_seed(1)
    assert_as_exact(ready(kind(activation), mode), torch.randn(3, 3, 11, 13))


def test_one_gate_for_all_channels_and_another_mean() -> None:
    torch.manual_seed(1)
    assert_as_exact(ready(Gated(pool=Mean()), "train"), torch.randn(3, 3, 11, 13))
    assert_as_exact(ready(Gated(channels=1), "train"), torch.randn(3, 3, 40, 41))


@pytest.mark.parametrize(
    ("kernel", "stride", "pad"),
    [
        # As wide as the filter or nearly so, none, on all sides alike, and not.
        (3, 1, (1, 1, 1, 1)), (3, 2, (0, 1, 0, 1)), (3, 2, (2, 1, 2, 1)), (5, 1, (4, 0, 4, 0)), (5, 2, (1, 2, 1, 2)),
        (7, 1, (2, 4, 2, 4)), (3, 1, (1, 1, 2, 0)), (3, 1, (2, 0, 1, 1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(12, 8), (17, 20)])
def test_zeros_by_a_layer_of_their_own(
    kernel: int, stride: int, pad: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    model = ready(Padded(nn.Hardswish, kernel, stride, pad), "train")
    assert_as_exact(model, torch.randn(3, 3, *size))
    lowered, alike = lower(model, True), pad[0] == pad[2] and pad[1] == pad[3]
    groups = [[lowered.kinds[node] for node in group.nodes] for group in Kernels(lowered).groups.values()]
    assert any("ZeroPad2d" in kinds for kinds in groups) is alike


def test_zeros_that_somebody_else_reads_too() -> None:
    class Both(Padded):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pad, conv = self.depthwise  # type: ignore[misc]
            y = pad(self.act1(self.norm1(self.expand(self.norm(self.stem(x))))))
            y = self.project(self.act2(self.norm2(conv(y)))).mean((2, 3)) + self.project(y).mean((2, 3))
            return y

    torch.manual_seed(1)
    model = ready(Both(), "train")
    lowered = lower(model, True)
    groups = [[lowered.kinds[node] for node in group.nodes] for group in Kernels(lowered).groups.values()]
    assert not any("ZeroPad2d" in kinds for kinds in groups)
    assert_as_exact(model, torch.randn(3, 3, 12, 9))


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (17, 20)])
def test_sizes(kernel: int, stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    assert_as_exact(ready(Inverted(nn.Hardswish, kernel, stride), "train"), torch.randn(5, 3, *size))


@pytest.mark.parametrize(
    ("kind", "frozen"),
    [
        *((Inverted, name) for name, _ in Inverted().named_children() if name[:3] not in ("act", "fc")),
        *((Gated, name) for name, _ in Gated().named_children() if name[:3] not in ("act", "fc")),
    ],
)
@pytest.mark.parametrize("upto", [False, True])
def test_parts_that_are_not_trained(kind: Any, frozen: str, upto: bool) -> None:
    torch.manual_seed(1)
    model = ready(kind(), "train")
    names = [name for name, _ in model.named_children()]
    for name in names[: names.index(frozen)] * upto + [frozen]:
        getattr(model, name).requires_grad_(False)
    assert_as_exact(model, torch.randn(3, 3, 11, 13), of_inputs=False)


@pytest.mark.parametrize("kind", [Inverted, Gated, Padded])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_loss_may_have_gradients_in_it(kind: Any, mode: str) -> None:
    torch.manual_seed(2)
    model = ready(kind(), mode)
    lowered, inputs = lower(model, True), torch.randn(2, 3, 9, 8)
    parameters, found = list(model.parameters()), []
    for output in (Kernels(lowered).play(lowered, lowered.tensors, inputs), model(inputs)):
        gradients = torch.autograd.grad(output.square().sum(), parameters, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        found.append(torch.autograd.grad(penalty, parameters, allow_unused=True))
    largest = max(float(value.norm()) for value in found[1] if value is not None)
    for got, wanted in zip(*found, strict=True):
        assert (got is None) is (wanted is None)
        assert got is None or float((got - wanted).norm()) <= 2e-4 * float(wanted.norm()) + 2e-5 * largest


@pytest.mark.parametrize("kind", [Inverted, Gated])
def test_gradients_of_some_leave_nothing_behind_for_others(kind: Any) -> None:
    torch.manual_seed(2)
    model = ready(kind(), "train")
    lowered, inputs = lower(model, True), torch.randn(2, 3, 9, 8)
    loss = Kernels(lowered).play(lowered, lowered.tensors, inputs).square().sum()
    parameters = list(model.parameters())
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    for some in (parameters[-4:], parameters[4:8], parameters[:1]):
        torch.autograd.grad(loss, some, retain_graph=True)
        for got, wanted in zip(torch.autograd.grad(loss, parameters, retain_graph=True), once, strict=True):
            assert torch.equal(got, wanted)
    torch.autograd.grad(loss, parameters[-4:], retain_graph=True)
    for got, wanted in zip(torch.autograd.grad(loss, parameters, create_graph=True), once, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [Inverted, Gated])
def test_runs_are_alike_bit_for_bit(kind: Any) -> None:
    torch.manual_seed(2)
    model = ready(kind(), "train")
    lowered, inputs = lower(model, True), torch.randn(8, 3, 40, 40)
    found = []
    for _ in range(3):
        loss = Kernels(lowered).play(lowered, lowered.tensors, inputs).square().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(*both) for other in found[1:] for both in zip(found[0], other, strict=True))


def test_a_derivative_that_was_changed_on_the_way_is_an_error() -> None:
    late: Any = {"derivative": torch.zeros(4)}
    written = Written(late=late)
    assert written.taken(late["derivative"]) is late and written.taken(torch.zeros(4)) is None
    with pytest.raises(RuntimeError, match="changed on the way"):
        Written(late=late).taken(torch.zeros(4))


def test_given_statistics_that_were_overwritten_are_an_error_as_in_pytorch() -> None:
    model = ready(Inverted(), "eval")
    lowered = lower(model, True)
    for run in (model, lambda x: Kernels(lowered).play(lowered, lowered.tensors, x)):
        loss = run(torch.randn(2, 3, 8, 8)).sum()
        model.norm1.running_mean.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_one_pixel_is_refused_in_pytorchs_words() -> None:
    model = sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1, bias=False))
    lowered = lower(model, True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        Kernels(lowered).play(lowered, lowered.tensors, torch.randn(1, 3, 3, 3))


class Reads(nn.Module):
    """What is around a gate, as a function of these layers."""

    def __init__(self, run: Callable[[Any, torch.Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.stem, self.norm1, self.norm2 = nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24), nn.BatchNorm2d(24)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate1, self.gate2 = nn.Conv2d(24, 24, 1), nn.Conv2d(24, 24, 1)
        self.conv1, self.conv2 = nn.Conv2d(24, 24, 1, bias=False), nn.Conv2d(24, 24, 1, bias=False)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, self.stem(x)).mean((2, 3))


def gated(m: Any, x: torch.Tensor) -> Any:
    y = m.norm1(x).relu()
    return m.conv1(y * m.gate1(m.pool(y)).sigmoid())


def two_gates_of_one_value(m: Any, x: torch.Tensor) -> Any:
    a = m.norm1(x).relu()
    of_a = m.pool(a)
    b = F.silu(m.norm2(x))
    of_b = m.pool(b)
    gates = m.gate1(of_a).sigmoid(), m.gate2(of_b).sigmoid()
    return m.conv1(a * gates[0]) + m.conv2(b * gates[1])


def only_the_gate(m: Any, x: torch.Tensor) -> Any:
    y = m.norm1(x).relu()
    gate = m.gate1(m.pool(y)).sigmoid()
    m.conv1(y * gate)
    return gate


def mean_in_place(m: Any, x: torch.Tensor) -> Any:
    y = m.norm1(x).relu()
    return m.conv1(y * F.hardsigmoid(m.pool(y), inplace=True))


@pytest.mark.parametrize("run", [two_gates_of_one_value, only_the_gate, mean_in_place])
def test_who_else_reads_what_is_gated(run: Any) -> None:
    torch.manual_seed(1)
    assert_as_exact(ready(Reads(run), "train"), torch.randn(3, 3, 9, 11))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("size", [(1, 1), (3, 3)])
def test_a_gate_that_is_not_the_same_for_all_pixels(mode: str, size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    model: Any = ready(Reads(gated, gate1=nn.Conv2d(24, 24, 1, padding=1)), mode)
    assert_as_exact(model, torch.randn(3, 3, *size))


def test_a_value_that_is_overwritten_while_its_gate_is_made() -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        y = m.norm1(x).relu()
        mean = m.pool(y)
        x += m.gate2(mean)
        return m.conv1(y * m.gate1(mean).sigmoid()) + x

    model: Any = ready(Reads(run), "train").requires_grad_(False)
    lowered, inputs = lower(model, True), torch.randn(3, 3, 9, 11)
    for norm in (model.norm1, model.norm2):
        norm.momentum = 0.0
    torch.testing.assert_close(Kernels(lowered).play(lowered, lowered.tensors, inputs), model(inputs))


@pytest.mark.parametrize("others_between", [False, True])
def test_derivatives_of_derivatives_that_do_not_come_through_what_is_gated(others_between: bool) -> None:
    torch.manual_seed(1)
    model: Any = ready(Reads(gated), "train")
    lowered, inputs, found = lower(model, True), torch.randn(3, 3, 9, 11), []
    for run in (model, lambda x: Kernels(lowered).play(lowered, lowered.tensors, x)):
        loss = run(inputs).sum()
        (gradient,) = torch.autograd.grad(loss, [model.conv1.weight], create_graph=True)
        if others_between:
            torch.autograd.grad(loss, [model.gate1.weight], retain_graph=True)
        of = [model.stem.weight, model.norm1.weight, model.norm1.bias, model.gate1.weight]
        found.append(torch.autograd.grad(gradient.square().sum(), of))
    for got, wanted in zip(*found, strict=True):
        assert float((got - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-5


@pytest.mark.parametrize("kind", [Inverted, Gated])
def test_hooks_of_parameters_may_scale_gradients_and_make_the_step(kind: Any) -> None:
    def step(parameter: Any) -> None:
        with torch.no_grad():
            parameter.sub_(0.5)

    torch.manual_seed(1)
    model: Any = ready(kind(nn.SiLU), "train")
    lowered, inputs = lower(model, True), torch.randn(3, 3, 11, 13)
    norms: list[Any] = [parameter for name, parameter in model.named_parameters() if name.startswith("norm")]
    before, found = copy.deepcopy(model.state_dict()), []
    for hooked in (False, True):
        model.load_state_dict(before)
        model.zero_grad()
        loss: Any = Kernels(lowered).play(lowered, lowered.tensors, inputs).square().sum()
        for parameter in norms * hooked:
            parameter.register_hook(lambda gradient: gradient.mul_(0.1))
            parameter.register_post_accumulate_grad_hook(step)
        loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, wanted in found[0].items():
        assert wanted is not None
        torch.testing.assert_close(found[1][name], wanted * 0.1 if name.startswith("norm") else wanted)


def test_a_residual_whose_view_is_overwritten_behind_the_sum() -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        residual = m.norm2(x)
        view = residual.permute(0, 2, 3, 1)
        y = (m.norm1(m.conv1(x)) + residual).relu()
        view += y.permute(0, 2, 3, 1)
        return view.permute(0, 3, 1, 2) + y

    torch.manual_seed(1)
    assert_as_exact(ready(Reads(run), "train"), torch.randn(4, 3, 8, 8))


def test_nothing_is_left_at_the_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1, bias=False))
    lowered = lower(model, True)
    with torch.no_grad():
        output = Kernels(lowered).play(lowered, lowered.tensors, torch.randn(2, 3, 5, 5))
    assert not vars(output)
