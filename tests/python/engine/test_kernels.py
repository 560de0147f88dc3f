"""Native kernels under autograd against PyTorch's own, with float64 as the judge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnrs import _cnnrs
from cnnrs._util import intraop
from cnnrs.engine.frozen_front import front_of
from cnnrs.engine.kernel_functions import Conv3x3
from cnnrs.engine.kernels import Kernels
from cnnrs.model.lowering import lower
from native_block import Block, assert_as_exact, sequential

LAST: Any = torch.channels_last
pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.ReLU, nn.ReLU6, nn.GELU])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen statistics"])
def test_a_step_has_the_gradients_of_the_module(activation: Any, mode: str) -> None:
    torch.manual_seed(1)
    model = Block(activation).train(mode != "eval")
    # Statistics as they are after some batches.
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        norm.train(norm.training and mode != "frozen statistics")
    assert_as_exact(model, torch.randn(4, 3, 22, 30))


@pytest.mark.parametrize(
    "model",
    [
        sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, padding=0), nn.Conv2d(32, 16, 3, padding=2), nn.Tanh()),
        sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, dilation=1, stride=(1, 1), bias=False)),
        # None of these has a kernel: other strides, paddings, dilations, groups, channels.
        sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, 2), nn.Conv2d(16, 16, 3, padding=(1, 0)), nn.Tanh()),
        sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, dilation=2), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 16, 3)),
        sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 32, 3, groups=16), nn.Tanh()),
        sequential(nn.Conv2d(3, 20, 1), nn.Conv2d(20, 20, 7, padding=3, groups=20), nn.Conv2d(20, 8, 3, groups=4)),
        # What a kernel returns is overwritten.
        sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.ReLU(True), nn.BatchNorm2d(16), nn.LeakyReLU(0, True)),
        # One batch norm behind the other.
        sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, eps=0.1), nn.BatchNorm2d(16), nn.Hardswish()),
        # As many pixels as make no whole vectors.
        sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.SiLU(), nn.Conv2d(10, 10, 3), nn.BatchNorm2d(10)),
    ],
)  # fmt: skip
def test_what_has_a_kernel_and_what_has_none(model: nn.Module) -> None:
    torch.manual_seed(2)
    assert_as_exact(model, torch.randn(3, 3, 11, 13))


@pytest.mark.parametrize(
    ("images", "side", "ins", "outs", "padding"),
    [(32, 2, 64, 64, 1), (32, 1, 64, 80, 1), (3, 7, 512, 64, 1), (2, 3, 64, 512, 0), (5, 2, 48, 64, 2)],
)
def test_sums_over_few_pixels_are_as_exact_as_pytorchs(
    images: int, side: int, ins: int, outs: int, padding: int
) -> None:
    torch.manual_seed(2)
    x, w, b = torch.randn(images, ins, side, side), torch.randn(outs, ins, 3, 3), torch.randn(outs)

    def computed(by: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [value.to(dtype).requires_grad_() for value in (x, w, b)]
        y = by(*leaves)
        weights = torch.arange(y.numel(), dtype=dtype).sin().view_as(y)
        return [y.detach(), *torch.autograd.grad(y, leaves, weights)]

    native = _cnnrs.Kernels(2, None)
    exact = computed(lambda *leaves: F.conv2d(*leaves, 1, padding), torch.float64)
    ours = computed(lambda *leaves: Conv3x3.apply(*leaves, padding, native), torch.float32)
    # Winograd's algorithm is at 5e-7 to 3e-6 here.
    errors = [float((got - wanted).norm() / wanted.norm()) for got, wanted in zip(ours, exact, strict=True)]
    assert max(errors) < 4e-7, errors


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.norm_a(self.a(x)), self.norm_b(self.b(x))
        y = F.silu(a + b)
        return (y * b + b + b).mean((2, 3))


def test_sums_of_two_batch_norms_and_results_that_are_read_again() -> None:
    torch.manual_seed(2)
    assert_as_exact(Shortcut(), torch.randn(2, 3, 8, 8))


def test_parameters_and_buffers_lie_as_they_like() -> None:
    torch.manual_seed(2)
    model = sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.BatchNorm2d(16).eval(), nn.SiLU()
    )
    for tensor in (model[1].bias, *(t for norm in model[2:4] for t in (norm.weight, norm.bias, norm.running_var))):
        tensor.data = (torch.rand(32) + 0.5)[::2]
    lowered, inputs = lower(model, True), torch.randn(2, 3, 8, 8)
    ours, theirs = Kernels(lowered).play(lowered, lowered.tensors, inputs), model(inputs)
    torch.testing.assert_close(ours, theirs)
    # A bias in front of a batch norm has no gradient but rounding.
    weights = [parameter for name, parameter in model.named_parameters() if name not in ("0.bias", "1.bias")]
    got, wanted = (torch.autograd.grad(y.square().sum(), weights) for y in (ours, theirs))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_may_have_gradients_in_it(training: bool) -> None:
    torch.manual_seed(2)
    model = Block().train(training)
    lowered, inputs = lower(model, True), torch.randn(2, 3, 16, 16)
    found = []
    exact = copy.deepcopy(model).double()
    for network, output in (
        (model, Kernels(lowered).play(lowered, lowered.tensors, inputs)), (exact, exact(inputs.double())),
    ):  # fmt: skip
        parameters = list(network.parameters())
        gradients = torch.autograd.grad(output.square().sum(), parameters, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        found.append(torch.autograd.grad(penalty, parameters, allow_unused=True))
    largest = max(float(value.norm()) for value in found[1] if value is not None)
    for got, wanted in zip(*found, strict=True):
        assert (got is None) is (wanted is None)
        assert got is None or float((got - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-5 * largest


class Norms(nn.Module):
    """Two batch norms, or one that is used twice."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1)
        self.norm_a = nn.BatchNorm2d(16)
        self.norm_b = self.norm_a if shared else nn.BatchNorm2d(16)
        nn.init.constant_(self.b.bias, 5.0)


class Reversed(Norms):
    """The first batch norm's sum is behind the second one, which moves the same statistics."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.norm_a(self.a(x)) + self.norm_b(self.b(x))).mean((2, 3))


class OverwrittenLater(Norms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = self.norm_b(self.b(x))
        y = F.silu(self.norm_a(self.a(x)) + other)
        return (y + F.relu_(other)).mean((2, 3))


class OverwrittenBetween(Norms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = self.norm_b(self.b(x))
        y = self.norm_a(self.a(x)) + other
        other = F.relu_(other)
        return (F.silu(y) + other).mean((2, 3))


class Measured(Norms):
    """Asks for the channels of a value that nobody reads else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm_a(self.a(x))
        return F.silu(y).view(y.shape[0], y.shape[1], -1).mean(2) + F.silu(self.norm_b(self.b(x))).mean((2, 3))


@pytest.mark.parametrize("kind", [Reversed, OverwrittenLater, OverwrittenBetween, Measured])
@pytest.mark.parametrize("shared", [False, True])
def test_nothing_is_computed_too_late(kind: type[Norms], shared: bool) -> None:
    torch.manual_seed(2)
    assert_as_exact(kind(shared), torch.randn(2, 3, 8, 8))


def test_a_batch_norm_that_neither_counts_nor_has_a_momentum_leaves_its_statistics() -> None:
    torch.manual_seed(2)
    model = sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16, momentum=None))
    model[1].num_batches_tracked = None
    assert_as_exact(model, torch.randn(2, 3, 8, 8))


def test_the_kernels_are_there() -> None:
    lowered = lower(Block(nn.ReLU), True)
    kinds = [[lowered.kinds[node] for node in group.nodes] for group in Kernels(lowered).groups.values()]
    assert sorted(kinds) == sorted(
        [["Conv2d"]] * 3 + [["BatchNorm2d", "ReLU"]] * 3 + [["BatchNorm2d", "Add", "ReLU"], ["BatchNorm2d"]]
    )
    # Behind a front, a group that begins in it is not complete.
    norm = lowered.names.index("stem.1")
    assert all(min(group.nodes) > norm for group in Kernels(lowered, norm).groups.values())


@pytest.mark.skipif(not (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").exists(), reason="another library")
def test_they_run_on_pytorchs_threads_and_elsewhere_on_others_with_the_same_bits() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 9, 9, 32), torch.randn(48, 32, 3, 3)
    outputs = []
    for library in (intraop.library(), None, "/nowhere/libtorch_cpu.so"):
        native = _cnnrs.Kernels(2, library)
        assert native.openmp == (library is not None and "nowhere" not in library)
        outputs.append(torch.empty(2, 9, 9, 48))
        native.conv3x3(x, w, None, outputs[-1], 1)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


#: A batch norm without anything beside its statistics.
NORM: Any = {
    "weight": None, "bias": None, "mean": torch.zeros(16), "var": torch.ones(16), "eps": 1e-5, "activation": "",
}  # fmt: skip
#: No gradients at all.
NONE: Any = dict.fromkeys(("input", "weight", "bias", "gate", "filters"))


def test_sizes_that_do_not_fit_are_errors() -> None:
    native = _cnnrs.Kernels(1, None)
    x, w = torch.zeros(1, 4, 4, 16), torch.zeros(16, 16, 3, 3)
    with pytest.raises(ValueError, match="shapes do not fit"):
        native.conv3x3(x, w, None, torch.zeros(1, 3, 4, 16), 1)
    with pytest.raises(ValueError, match="filters do not fit"):
        native.conv3x3(x, w[:, :8], None, torch.zeros(1, 4, 4, 16), 1)
    with pytest.raises(ValueError, match="channels do not fit"):
        native.conv3x3(x[..., :8], w, None, torch.zeros(1, 4, 4, 16), 1)
    with pytest.raises(ValueError, match="float64"):
        native.conv3x3(x.double(), w, None, torch.zeros(1, 4, 4, 16), 1)
    with pytest.raises(ValueError, match="batch norm: activation 'Tanh' is unknown"):
        native.batch_norm(x, None, {**NORM, "activation": "Tanh"}, x.clone())
    with pytest.raises(ValueError, match="vectors do not fit"):
        native.batch_norm(x, None, {**NORM, "mean": torch.zeros(8), "var": torch.ones(8)}, x.clone())
    with pytest.raises(ValueError, match="shapes do not fit"):
        native.convolution(x, None, None, torch.zeros(16, 1, 4, 4), x.clone(), 1, 1, None)
    with pytest.raises(ValueError, match="filters do not fit"):
        native.convolution(x, None, None, torch.zeros(16, 8, 1, 1), x.clone(), 1, 0, None)
    with pytest.raises(ValueError, match="shapes do not fit"):
        native.convolution(x, None, None, torch.zeros(16, 16, 1, 1), x.clone(), 2, 0, None)
    with pytest.raises(ValueError, match="vectors do not fit"):
        native.convolution(x, None, None, torch.zeros(16, 16, 1, 1), x.clone(), 1, 0, (torch.zeros(8), torch.zeros(16)))
    with pytest.raises(ValueError, match="gate do not fit"):
        native.convolution(x, None, torch.zeros(1, 16), torch.zeros(16, 16, 1, 1), x.clone(), 1, 0, None)
    with pytest.raises(ValueError, match="gate do not fit"):
        native.convolution(x, NORM, torch.zeros(1, 8), torch.zeros(16, 16, 1, 1), x.clone(), 1, 0, None)
    with pytest.raises(ValueError, match="gate do not fit"):
        native.convolution(x, NORM, torch.zeros(1, 16), torch.zeros(16, 1, 3, 3), x.clone(), 1, 1, None)
    with pytest.raises(ValueError, match="means do not fit"):
        native.squeeze(x, NORM, torch.zeros(2, 16))
    late: Any = {"norm": NORM, "weight": torch.zeros(16), "bias": torch.zeros(16), "training": True, "derivative": x}
    with pytest.raises(ValueError, match="output and late do not fit"):
        native.convolution_backward(x, None, None, torch.zeros(16, 16, 1, 1), 1, 0, x, None, late, NONE)


def test_they_have_as_many_threads_as_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    native = _cnnrs.Kernels
    monkeypatch.setattr(_cnnrs, "Kernels", lambda threads, library: made.append(threads) or native(threads, library))
    lowered = lower(Block(), True)
    kernels = Kernels(lowered)
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        kernels.play(lowered, lowered.tensors, torch.randn(2, 3, 8, 8)).sum().backward()
    assert made == [2, 1]


def test_a_batch_of_one_pixel_is_refused_in_pytorchs_words() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
    lowered = lower(model, True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        Kernels(lowered).play(lowered, lowered.tensors, torch.randn(1, 3, 3, 3))


def test_only_training_is_divided_for_the_kernels() -> None:
    lowered = lower(Block().eval(), False)
    inputs = torch.randn(2, 3, 20, 20)
    assert front_of(lowered, inputs, training=False, batches=1) is None
    lowered = lower(Block().train(), True)
    # Too little to be worth the while.
    assert front_of(lowered, inputs, training=True, batches=1) is None
    front = front_of(lowered, torch.empty(1).expand(64, 3, 224, 224), training=True, batches=1)
    assert front is not None and front.last == 0 and front.kernels.operations == 13


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
def test_derivatives_at_corners_and_beyond_all_numbers(activation: Any) -> None:
    model = nn.Sequential(nn.BatchNorm2d(16, eps=0.0), activation()).eval()
    lowered = lower(model, True)
    corners = torch.tensor([-torch.inf, -3.0, 0.0, 3.0, 6.0, 1.0, -1.0, 7.0]).repeat(2)
    if activation is nn.SiLU:
        corners[::8] = -20.0
    x = corners.expand(2, 16, 2, 16).contiguous()
    gradients = []
    for run in (model, lambda x: Kernels(lowered).play(lowered, lowered.tensors, x)):
        inputs = x.clone().requires_grad_()
        run(inputs).mul(torch.arange(1.0, 17.0)).sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_images_of_one_channel_have_one_order_only() -> None:
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    lowered = lower(model.train(), True)
    assert front_of(lowered, torch.empty(1).expand(64, 1, 224, 224), training=True, batches=1) is None


def test_empty_images_are_an_error() -> None:
    native = _cnnrs.Kernels(1, None)
    empty, filters = torch.zeros(0, 4, 4, 16), torch.zeros(16, 16, 3, 3)
    with pytest.raises(ValueError, match="without zeros"):
        native.conv3x3(empty, filters, None, empty.clone(), 1)
    with pytest.raises(ValueError, match="without zeros"):
        native.convolution(empty, None, None, torch.zeros(16, 1, 3, 3), empty.clone(), 1, 1, None)
    with pytest.raises(ValueError, match="without zeros"):
        native.batch_norm(empty, None, NORM, empty.clone())
