"""Lowering: what the graph knows, what it refuses, and that looking at a model does not change it."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as zoo

import cnnrs
from cnnrs import _cnnrs
from cnnrs.graph import lower
from cnnrs.operations import Unsupported

NAMES = ["vgg16", "vgg11_bn", "alexnet", "resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0",
         "densenet121", "squeezenet1_1", "googlenet"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_torchvisions_networks_give_the_same_bits_in_eval_mode(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(zoo, name)(weights=None, **options).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model(x)
    assert cnnrs.explain(model).engine == "torch"
    features, labels = cnnrs.preconv([(x, torch.arange(2))], model, engine="torch")
    assert torch.equal(features, expected)
    assert torch.equal(labels, torch.arange(2))


def reasons(model: nn.Module) -> str:
    with pytest.raises(Unsupported) as refused:
        lower(model)
    assert cnnrs.explain(model).engine == "python"
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


def remember(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.seen = x
    return self.conv(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Calls(lambda self, x: x * self.weight), r"weight\(\): a parameter is used outside a layer"),
        (Calls(lambda self, x: self.conv(x) if x.sum() > 0 else x), "forward cannot be traced: TraceError"),
        (Calls(lambda self, x: x.cumsum(1)), r"cumsum\(\): this function has no counterpart yet"),
        (Calls(lambda self, x: (x, self.conv(x))), "forward does not return one tensor"),
        (Calls(lambda self, x: x + 1), r"add\(\): argument 1 is not a tensor of the graph"),
        (Calls(lambda self, x: x.view(x.size(0) * 2, -1)), r"mul\(\): argument"),
        (Calls(lambda self, x: F.softmax(x)), "softmax without dim"),
        (Calls(lambda self, x: F.max_pool2d(x, 2, return_indices=True)[0]), "max_pool2d"),
        (Calls(remember), "forward changes attributes of Calls"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"),
        (nn.Sequential(nn.Conv2d(1, 1, 2, padding="same")), r"0 \(Conv2d\): padding='same' with an even kernel"),
        (nn.Sequential(nn.GRU(3, 3)), r"0 \(GRU\): this layer has no counterpart yet"),
        (nn.Bilinear(2, 2, 2), "forward takes 2 arguments: input1, input2"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "has parametrized tensors"),
        (torch.compile(nn.Linear(3, 3)), "OptimizedModule wraps the model"),
    ],
)
def test_what_cannot_be_lowered_is_named(model: nn.Module, reason: str) -> None:
    import re

    assert re.search(reason, reasons(model)), reasons(model)
    with pytest.raises(cnnrs.UnsupportedModelError, match="engine 'torch' cannot run this model"):
        cnnrs.preconv([(torch.zeros(1, 1, 8, 8), torch.zeros(1))], model, engine="torch")


def test_hooks_keep_firing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    handle = model[0].register_forward_hook(lambda *_: None)
    assert reasons(model) == "0 (Conv2d) has hooks"
    handle.remove()
    assert cnnrs.explain(model).engine == "torch"
    model[0].weight.register_hook(lambda grad: grad)
    assert reasons(model) == "parameter 0.weight has gradient hooks"


def test_a_subclass_of_a_layer_is_walked_through() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    class Blocked(nn.Sequential):
        pass

    assert "0.weight(): a parameter is used outside a layer" in reasons(nn.Sequential(Doubled(1, 1, 3)))
    assert cnnrs.explain(Blocked(nn.Conv2d(1, 1, 3))).engine == "torch"


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
    with pytest.raises(ValueError, match="unknown operation Magic"):
        _cnnrs.Graph([node, ("a", "Magic", [0], {"inplace": False})], 1, [])
    with pytest.raises(ValueError, match="weight: no tensor 3"):
        _cnnrs.Graph([node, ("a", "Linear", [0], {"weight": 3, "bias": None})], 1, [])
    pool = {"kernel": (2, 2), "stride": (0, 1), "padding": (0, 0), "dilation": (1, 1), "ceil_mode": False}
    with pytest.raises(ValueError, match=r"stride must be positive, got \[0, 1\]"):
        _cnnrs.Graph([node, ("a", "MaxPool2d", [0], pool)], 1, [])


def test_functions_and_methods_are_the_layers_they_stand_for() -> None:
    functions = {
        "relu": lambda x: x.relu(), "add": lambda x: x + x, "iadd": lambda x: operator.iadd(x, x.sigmoid()),
        "mul": lambda x: torch.mul(x, x), "cat": lambda x: torch.cat([x, x], dim=1), "mean": lambda x: x.mean([2, 3]),
        "flatten": lambda x: x.flatten(1), "view": lambda x: x.view(x.size(0), -1),
        "shape": lambda x: x.view(x.shape[0], 8, -1),
        "tanh": torch.tanh, "leaky": lambda x: F.leaky_relu(x, 0.2), "avg": lambda x: F.avg_pool2d(x, 2),
        "adaptive": lambda x: F.adaptive_avg_pool2d(x, (1, 3)), "log_softmax": lambda x: x.log_softmax(1),
        "softmax": lambda x: F.softmax(x, dim=1), "keepdim": lambda x: torch.mean(x, dim=1, keepdim=True),
    }  # fmt: skip
    x = torch.randn(2, 4, 6, 6)
    for name, function in functions.items():
        model = Calls(lambda self, x, function=function: function(x))
        expected = function(x.clone())
        features, _ = cnnrs.preconv([(x.clone(), torch.arange(2))], model, engine="torch")
        # leaky_relu is computed as max(x, 0) + slope * min(x, 0): one of the terms is zero, so the bits are the same.
        assert torch.equal(features, expected), name
        assert cnnrs.summary(model, x.shape).layers[-1].output_shape == tuple(expected.shape), name
