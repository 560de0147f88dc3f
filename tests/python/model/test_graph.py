"""Lowering: what the graph knows, what it refuses, and that looking at a model does not change it."""

from __future__ import annotations

import operator
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as zoo
from torchvision.ops import StochasticDepth

import cnnrs
import which_engine
from cnnrs import _cnnrs
from cnnrs.engine import verify
from cnnrs.model.lowering import lower
from cnnrs.model.operations import Unsupported
from cnnrs.model.player import play

NAMES = ["vgg16", "vgg11_bn", "alexnet", "resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0",
         "densenet121", "squeezenet1_1", "googlenet", "convnext_tiny"]  # fmt: skip


def operations_of(model: nn.Module, x: torch.Tensor, engine: str) -> torch.Tensor:
    """What the operations of a lowered model compute, on engine "torch" or played one by one."""
    if engine == "torch":
        return cnnrs.preconv([(x, torch.arange(len(x)))], model, engine=engine).features
    lowered = lower(model, gradients=False)
    with torch.no_grad():
        return play(lowered, lowered.tensors, x)


@pytest.mark.parametrize("engine", ["torch", "played"])
@pytest.mark.parametrize("name", NAMES)
def test_torchvisions_networks_give_the_same_bits_in_eval_mode(name: str, engine: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(zoo, name)(weights=None, **options).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model(x)
    assert cnnrs.explain(model).operations > 0
    assert torch.equal(operations_of(model, x, engine), expected)


def reasons(model: nn.Module) -> str:
    with pytest.raises(Unsupported) as refused:
        lower(model)
    assert (cnnrs.explain(model).engine, cnnrs.explain(model).operations) == ("python", 0)
    assert cnnrs.explain(model).reasons == tuple(str(refused.value).split("\n"))
    return str(refused.value)


class Calls(nn.Module):
    """A module whose forward is any function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(1))
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class Halved(torch.autograd.Function):
    """The identity, with half of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] / 2


def remember(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.seen = x
    return self.conv(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Calls(lambda self, x: self.conv.weight * self.weight), "forward does not return one tensor"),
        (Calls(lambda self, x: F.conv2d(x, self.weight)), "expects a weight of 4 dimensions, got shape"),
        (Calls(lambda self, x: F.pad(x, (1, 1), value=2.0)), r"pad\(\): pads with mode='constant', value=2.0, not"),
        (Calls(lambda self, x: F.pad(x, (1, 1), "reflect")), "pads with mode='reflect'"),
        (Calls(lambda self, x: F.pad(x, (1, -1))), r"padding \(1, -1\) is not \(left, right\) or"),
        (Calls(lambda self, x: x.permute(0, 2, 3, 1).contiguous()), "contiguous.*: copies permuted dimensions"),
        (nn.Sequential(nn.ConstantPad2d(1, 0.5)), r"0 \(ConstantPad2d\): pads with mode='constant', value=0.5"),
        (Calls(lambda self, x: self.conv(x) if x.sum() > 0 else x), "reads the value of a tensor .__bool__"),
        (Calls(lambda self, x: x.cumsum(1)), r"cumsum\(\): this function has no counterpart yet"),
        (Calls(lambda self, x: (x, self.conv(x))), "forward does not return one tensor"),
        (Calls(lambda self, x: x.view(x.size(0) * 2, -1)), "forward computes with the size of a tensor"),
        (Calls(lambda self, x: F.softmax(x)), "softmax without dim"),
        (Calls(lambda self, x: F.max_pool2d(x, 2, return_indices=True)[0]), "max_pool2d"),
        (Calls(remember), "forward changes attributes of Calls"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"),
        (nn.Sequential(nn.Conv2d(1, 1, 2, padding="same")), r"0 \(Conv2d\): padding='same' with an even kernel"),
        (nn.Sequential(nn.GRU(3, 3)), r"0 \(GRU\): this layer has no counterpart yet"),
        (nn.Sequential(Calls(lambda self, x: self.conv(x, x))), r"0.conv \(Conv2d\): is called with 2 arguments"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "has parametrized tensors"),
        (torch.compile(nn.Linear(3, 3)), "OptimizedModule wraps the model"),
    ],
)
@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_what_cannot_be_lowered_is_named(model: nn.Module, reason: str, engine: Any) -> None:
    assert re.search(reason, reasons(model)), reasons(model)
    with pytest.raises(cnnrs.UnsupportedModelError, match=f"engine '{engine}' cannot run this model"):
        cnnrs.preconv([(torch.zeros(1, 1, 8, 8), torch.zeros(1))], model, engine=engine)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Calls(lambda self, x: x * (self.weight * 2)), r"mul\(\): a tensor that is neither parameter nor buffer"),
        (
            Calls(lambda self, x: F.conv2d(x, self.conv.weight * 2)),
            r"conv2d\(\): a weight is computed, not a parameter",
        ),
    ],
)
def test_what_is_computed_of_weights_is_frozen_with_them(model: nn.Module, reason: str) -> None:
    assert re.search(reason, reasons(model)), reasons(model)
    images = torch.randn(2, 1, 8, 8)
    features, _ = cnnrs.preconv([(images, torch.zeros(2))], model, engine="cpu")
    with torch.no_grad():
        torch.testing.assert_close(features, model(images))


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (lambda self, x: x + self.weight, "add(): parameter weight is used outside a layer"),
        (lambda self, x: x + 1, "add(): argument 1 is not a tensor of the graph"),
    ],
)
def test_what_only_graphs_for_images_of_one_size_know(add: Any, reason: str) -> None:
    model, images = Calls(add), torch.randn(1, 1, 8, 8)
    assert reasons(model) == reason
    features, _ = cnnrs.preconv([(images, torch.zeros(1))], model, engine="cpu", verbose=False)
    torch.testing.assert_close(features, images + 1)


def test_hooks_keep_firing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    handle = model[0].register_forward_hook(lambda *_: None)
    assert reasons(model) == "0 (Conv2d) has hooks"
    handle.remove()
    assert cnnrs.explain(model).operations == 2
    model[0].weight.register_hook(lambda grad: grad)
    assert reasons(model) == "parameter 0.weight has gradient hooks"


def test_a_subclass_of_a_layer_is_walked_through() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    class Blocked(nn.Sequential):
        pass

    assert reasons(nn.Sequential(Doubled(1, 1, 3))) == "mul(): argument 2 is not a tensor of the graph"
    assert cnnrs.explain(Blocked(nn.Conv2d(1, 1, 3))).operations == 1


def test_lowering_leaves_the_module_as_it_was() -> None:
    model = Calls(remember)
    before = dict(vars(model))
    reasons(model)
    assert vars(model).keys() == before.keys() and "seen" not in vars(model)
    assert model.training


def test_the_graph_shares_the_parameters() -> None:
    model = cnnrs.models.MnistNet()
    tensors = lower(model).tensors
    assert [t.data_ptr() for t in tensors] == [p.data_ptr() for p in model.parameters()]
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    assert len(lower(tied).tensors) == 3


def test_attributes_changed_between_calls_count() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    cnnrs.set_dropout(model, 0.0)
    x = torch.ones(2, 1, 4, 4)
    loss, _ = cnnrs.fit(0, nn.Sequential(model, nn.Linear(16, 2)), [(x, torch.zeros(2, dtype=torch.int64))],
                        "validation", loss_fn=F.cross_entropy, verbose=False)  # fmt: skip
    assert loss > 0
    assert lower(model).operations[2][3]["p"] == 0.0


def test_the_extension_refuses_graphs_that_make_no_sense() -> None:
    node = ("input", "Input", [], {})
    with pytest.raises(ValueError, match=r"node 1 \(a\) reads a later node"):
        _cnnrs.Graph([node, ("a", "Mul", [1, 0], {})], 1, [])
    with pytest.raises(ValueError, match="output 5 of a graph of 1 nodes"):
        _cnnrs.Graph([node], 5, [])
    with pytest.raises(ValueError, match=r"operation 'Magic' is unknown, known are 'Input', 'Conv2d'"):
        _cnnrs.Graph([node, ("a", "Magic", [0], {"inplace": False})], 1, [])
    with pytest.raises(ValueError, match="weight: no tensor 3"):
        _cnnrs.Graph([node, ("a", "Linear", [0], {"weight": 3, "bias": None})], 1, [])
    pool = {"kernel": (2, 2), "stride": (0, 1), "padding": (0, 0), "dilation": (1, 1), "ceil_mode": False}
    with pytest.raises(ValueError, match=r"a \(MaxPool2d\): stride: must be positive, got \[0, 1\]"):
        _cnnrs.Graph([node, ("a", "MaxPool2d", [0], pool)], 1, [])


@pytest.mark.parametrize("engine", ["torch", "played"])
def test_functions_and_methods_are_the_layers_they_stand_for(engine: str) -> None:
    functions = {
        "relu": lambda x: x.relu(), "add": lambda x: x + x, "iadd": lambda x: operator.iadd(x, x.sigmoid()),
        "imul": lambda x: operator.imul(x.tanh(), x),
        "mul": lambda x: torch.mul(x, x), "cat": lambda x: torch.cat([x, x], dim=1), "mean": lambda x: x.mean([2, 3]),
        "flatten": lambda x: x.flatten(1), "view": lambda x: x.view(x.size(0), -1),
        "shape": lambda x: x.view(x.shape[0], 8, -1),
        "tanh": torch.tanh, "leaky": lambda x: F.leaky_relu(x, 0.2), "avg": lambda x: F.avg_pool2d(x, 2),
        "adaptive": lambda x: F.adaptive_avg_pool2d(x, (1, 3)), "log_softmax": lambda x: x.log_softmax(1),
        "permute": lambda x: x.permute(0, 2, -1, 1), "back": lambda x: torch.permute(x, (0, 3, 1, 2)),
        "pad": lambda x: F.pad(x, (1, 2, 0, 3)), "pad of a side": lambda x: F.pad(x, [0, 1], value=0.0),
        "layer norm": lambda x: F.layer_norm(x, (6, 6)),
        "softmax": lambda x: F.softmax(x, dim=1), "keepdim": lambda x: torch.mean(x, dim=1, keepdim=True),
    }  # fmt: skip
    x = torch.randn(2, 4, 6, 6)
    for name, function in functions.items():
        model = Calls(lambda self, x, function=function: function(x))
        expected = function(x.clone())
        assert torch.equal(operations_of(model, x.clone(), engine), expected), name
        assert cnnrs.summary(model, x.shape).layers[-1].output_shape == tuple(expected.shape), name


class Buffered(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x.relu()


def test_a_backward_of_its_own_is_not_dropped_while_training() -> None:
    apply = vars(torch.autograd.Function)["apply"]
    model = nn.Sequential(Calls(lambda self, x: Halved.apply(x)))
    assert reasons(model.train()) == "Halved is an autograd.Function, whose backward has no counterpart"
    # Frozen, it is its forward.
    assert lower(model, gradients=False).kinds == ["Input", "Mul"]
    assert vars(torch.autograd.Function)["apply"] is apply


def test_buffers_that_forward_changes_are_left_alone() -> None:
    model = Buffered()
    assert reasons(model) == "forward changes a tensor in place (add_), once per call"
    assert model.calls.item() == 0


class SamePadding(nn.Conv2d):
    """TensorFlow's padding, as ports of its networks write it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Functional(nn.Module):
    """Layers as functions of the module's own parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.first, self.second = SamePadding(3, 6, 3, stride=2, bias=False), nn.Conv2d(6, 6, 3, padding="same")
        self.gain, self.kernel = nn.Parameter(torch.rand(6, 1, 1)), nn.Parameter(torch.randn(4, 6, 1, 1))
        self.register_buffer("shift", torch.tensor([0.5]))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm
        x = self.first(x)
        x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, n.training, 0.2, n.eps)
        x = x * torch.sigmoid(x) * self.gain
        x = F.conv2d(input=x, weight=self.second.weight, bias=self.second.bias, padding="same")
        x = self.shift * F.layer_norm(x.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2)
        x = F.conv2d(F.pad(x, (1, 0)), self.kernel).mean((2, 3))
        return F.linear(x, self.head.weight, bias=self.head.bias)


@pytest.mark.parametrize("engine", ["torch", "played"])
def test_functions_of_own_parameters_train_to_the_same_bits(engine: str) -> None:
    torch.manual_seed(0)
    ours, plain = Functional(), Functional()
    plain.load_state_dict(ours.state_dict())
    names = [(layer.name, layer.kind) for layer in cnnrs.summary(ours, (1, 3, 11, 9)).layers]
    assert names[:4] == [
        ("first.pad", "ZeroPad2d"),
        ("first", "Conv2d"),
        ("norm", "BatchNorm2d"),
        ("sigmoid", "Sigmoid"),
    ]
    assert ("gain", "Scale") not in names and ("mul_1", "Scale") in names and ("second", "Conv2d") in names
    batches = [(torch.randn(4, 3, 11, 9), torch.randint(5, (4,))) for _ in range(3)]
    # What is played steps as PyTorch's fused optimizers do.
    fused = None if engine == "torch" else True
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=fused) for m in (ours, plain)]
    options: Any = {"optimizer": optimizers[0], "loss_fn": F.cross_entropy, "verbose": False}
    with which_engine.watched() as ran:
        if engine == "torch":
            cnnrs.fit(0, ours, batches, engine="torch", **options)
        else:
            with which_engine.played():
                cnnrs.fit(0, ours, batches, **options)
    assert ran == ["torch" if engine == "torch" else "recorded"]
    for inputs, targets in batches:
        optimizers[1].zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        optimizers[1].step()
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert not torch.equal(state["norm.running_mean"], torch.zeros(6))
    with pytest.raises(ValueError, match=r"first.pad \(ZeroPad2d\): the cpu engine has no training"):
        cnnrs.fit(0, ours, batches, "validation", loss_fn=F.cross_entropy, engine="cpu", verbose=False)


def test_explain_speaks_of_preconv() -> None:
    model = zoo.resnet18().train()
    why = cnnrs.explain(model)
    assert (why.engine, why.preconv, why.preconv_reasons) == ("python", "cpu", ()) and model.training
    assert str(why).endswith("preconv: engine 'cpu', native code, equal to the model up to float rounding")
    gray = cnnrs.models.MnistNet()
    assert cnnrs.explain(gray).preconv == "open" and "give explain() an input_shape" in str(cnnrs.explain(gray))
    assert cnnrs.explain(gray, (2, 1, 28, 28)).preconv == "cpu"
    with pytest.raises(RuntimeError, match=r"expects 1 input channels, got 3"):
        cnnrs.explain(gray, (2, 3, 28, 28))
    turned = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(3))
    why = cnnrs.explain(turned)
    assert why.preconv_reasons == ("1 (Softmax): runs along another dimension than the channels",)
    assert str(why).endswith(f"preconv: engine 'python', because\n  - {why.preconv_reasons[0]}")
    assert cnnrs.explain(turned.double()).preconv_reasons[0].startswith("it computes in float32 on the CPU, but a par")
    branching = Calls(lambda self, x: self.conv(x) if x.sum() > 0 else x)
    assert cnnrs.explain(branching).preconv == "python"
    assert str(cnnrs.explain(branching)).endswith("preconv: engine 'python', for the same reasons")
    # Stochastic depth drops nothing in eval mode.
    deep = zoo.convnext_tiny(stochastic_depth_prob=0.1).train()
    why = cnnrs.explain(deep)
    assert why.engine == "python" and why.preconv == "cpu" and why.operations > 0


def test_explain_does_not_promise_engine_cpu_what_it_cannot_train() -> None:
    normed = nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3))
    refused = "1 (LayerNorm): the cpu engine has no training kernel for it"
    assert cnnrs.explain(normed).engine == "python" and cnnrs.explain(normed).reasons == (refused,)
    assert cnnrs.explain(normed, (2, 16)).reasons == (f"{refused}: use engine='python'",)
    assert cnnrs.explain(normed, (2, 16)).preconv == "cpu"


def test_explain_speaks_of_float32_inputs_whatever_is_the_default() -> None:
    model = nn.Linear(3, 2)
    torch.set_default_dtype(torch.float64)
    try:
        why = cnnrs.explain(model, (2, 3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (why.engine, why.preconv) == ("cpu", "cpu")


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_stochastic_depth_draws_as_torchvision_does(mode: str, p: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), StochasticDepth(p, mode), nn.Flatten(), StochasticDepth(p, mode)).train()
    lowered, x = lower(model), torch.randn(6, 3, 4, 4)
    torch.manual_seed(1)
    expected = model(x)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(play(lowered, lowered.tensors, x), expected) and torch.equal(torch.get_rng_state(), state)
    kinds = [kind for kind in lowered.kinds if kind == "StochasticDepth"]
    assert len(kinds) == (2 if p else 0)
    assert lower(model.eval()).kinds == ["Input", "Conv2d", "Flatten"]
    model.train()
    assert verify.differs(model, lowered, x, engine="python") is None
    assert torch.equal(torch.get_rng_state(), state)
