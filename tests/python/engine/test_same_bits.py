"""The quick answer to whether a module is what its operations are: never a wrong yes, no copy and no trace."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as zoo

from cnnrs.engine import same_bits as quick
from cnnrs.engine.derivatives import same_derivatives
from cnnrs.engine.verify import differs
from cnnrs.model.lowering import Lowered, lower
from cnnrs.model.player import play


def asked(model: nn.Module, lowered: Lowered, inputs: torch.Tensor, training: bool = True) -> quick.Sample | None:
    return quick.same_bits(model, lowered, play, inputs, training, lambda _: nullcontext())


class Plain(nn.Module):
    """What the operations are taken from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 36, 3)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """Between the layers."""
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.seen(self.conv(x))))
        x = self.other(x) + x
        return self.head(self.drop(x.flatten(1)))


def images() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def of_another(make: type[Plain]) -> tuple[Plain, Lowered]:
    """A module, and the operations of a plain one over its weights."""
    model = Plain().train()
    lowered = lower(model)
    model.__class__ = make
    return model, lowered


# -- what is the same ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "convnext_tiny", "efficientnet_b0", "vgg11_bn"]
)
def test_networks_need_no_backward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = getattr(zoo, name)(weights=None, num_classes=5)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    for optimizer in (sgd, None):
        model.train(optimizer is not None)
        assert differs(model, lower(model), torch.randn(3, 3, 64, 64), engine="front", optimizer=optimizer) is None


def test_what_is_known_of_the_outputs_is_what_the_module_returns() -> None:
    model, x = Plain().train(), images()
    sample = asked(model, lower(model), x)
    model.drop.p = 0.0
    assert sample is not None and torch.equal(sample.outputs, model(x)) and torch.equal(sample.inputs, x)
    assert not sample.outputs.requires_grad


def test_weights_are_not_copied_and_products_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[torch.Tensor] = []
    known: list[str] = []

    class Telling(Plain):
        def seen(self, x: torch.Tensor) -> torch.Tensor:
            weights.extend(self.parameters())
            return x

    original = quick.Again.__torch_dispatch__

    def spy(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = [product.result for product in self._products]
        result = original(self, func, types, args, kwargs)
        if any(result is one for one in results):
            known.append(str(func))
        return result

    monkeypatch.setattr(quick.Again, "__torch_dispatch__", spy)
    model, lowered = of_another(Telling)
    assert asked(model, lowered, images()) is not None
    assert [w.data_ptr() for w in weights] == [p.data_ptr() for p in model.parameters()]
    assert not any(w is p for w, p in zip(weights, model.parameters(), strict=True))
    assert known == ["aten.convolution.default", "aten.convolution.default", "aten.addmm.default"]


# -- what is not ---------------------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, derivative: torch.Tensor) -> Any:
        return -derivative


def without_gradient(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x * 1


def hooked(x: torch.Tensor) -> torch.Tensor:
    x.register_hook(lambda derivative: derivative * 2)
    return x


def hooked_unless_that_fails(x: torch.Tensor) -> torch.Tensor:
    with suppress(Exception):
        x.register_hook(lambda derivative: derivative * 2)
    return x


def hooked_at_the_node(x: torch.Tensor) -> torch.Tensor:
    node: Any = x.grad_fn
    if node is not None:
        node.register_prehook(lambda derivatives: tuple(d * 2 for d in derivatives))
    return x


def packed(x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        return F.relu(x.abs()) if False else (x * x.detach().sign()).abs() * x.detach().sign()


def overwritten(x: torch.Tensor) -> torch.Tensor:
    return x.data.mul_(1.5)


# Values stay, derivatives or other things do not.
BETWEEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "a context": without_gradient,
    "half a gradient": lambda x: x / 2 + x.detach() / 2,
    "twice the gradient": lambda x: x * 2 - x.detach(),
    "a function of its own": Reversed.apply,
    "a hook": hooked,
    "a hook unless that fails": hooked_unless_that_fails,
    "a hook at the node": hooked_at_the_node,
    "saved otherwise": packed,
    "another value": overwritten,
    "a draw": lambda x: x + 0 * torch.rand(1),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_done_between_the_layers_is_seen(name: str) -> None:
    class Doing(Plain):
        def seen(self, x: torch.Tensor) -> torch.Tensor:
            return BETWEEN[name](x)

    model, lowered = of_another(Doing)
    drawn = torch.get_rng_state()
    assert asked(model, lowered, images()) is None
    assert torch.equal(torch.get_rng_state(), drawn)


class Swapped(Plain):
    """A product of the same sizes with other weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = self.conv._conv_forward(x[:, :3], self.conv.weight, self.conv.bias) + x
        return self.head(self.drop(x.flatten(1)))


class Early(Plain):
    """Its second product reads what is overwritten behind it, with what the operations read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        y = self.other(x)
        x.data.clamp_(min=0)
        return self.head(self.drop((y + F.relu(x)).flatten(1)))


class Frozen(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.conv.weight.requires_grad_(False)
        return super().forward(x)


class Twice(Plain):
    """Statistics move twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm(self.conv(x))
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [Swapped, Early, Frozen, Twice])
def test_another_forward_is_seen(make: type[Plain], training: bool) -> None:
    model, lowered = of_another(make)
    if make is Frozen and not training:
        return
    assert asked(model, lowered, images(), training) is None
    assert all(p.requires_grad for p in model.parameters())


# -- no trace ------------------------------------------------------------------------------------------------


def by_numpy(weight: Any) -> None:
    weight.detach().numpy()[:] *= 2


def by_an_array(weight: Any) -> None:
    import numpy as np

    np.asarray(weight.detach())[:] = 0


def as_statistics(weight: Any) -> None:
    column = weight.data[0, :, 0, 0]
    F.batch_norm(torch.randn(2, len(column), 2, 2), column, torch.ones(len(column)), training=True)


WRITES: dict[str, Callable[[Any], object]] = {
    "data": lambda w: w.data.clamp_(-0.01, 0.01),
    "without gradients": lambda w: torch.no_grad()(w.mul_)(0.5),
    "a view": lambda w: w.detach()[0].zero_(),
    "out": lambda w: torch.mul(w.detach(), 2.0, out=w.data),
    "several at once": lambda w: torch._foreach_mul_([w.data], 2.0),
    "numpy": by_numpy,
    "an array": by_an_array,
    "apply": lambda w: w.data.apply_(lambda value: value * 2),
    "other memory": lambda w: setattr(w, "data", w.data * 2),
    "statistics": as_statistics,
}


@pytest.mark.parametrize("name", WRITES)
def test_nobody_writes_into_the_weights(name: str) -> None:
    class Writing(Plain):
        def seen(self, x: torch.Tensor) -> torch.Tensor:
            WRITES[name](self.conv.weight)
            return x

    model, lowered = of_another(Writing)
    before, versions = copy.deepcopy(model.state_dict()), [p._version for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Whatever the slow answer is, the weights are what they were.
    differs(model, lowered, images(), engine="front", optimizer=optimizer)
    assert all(torch.equal(now, then) for now, then in zip(model.state_dict().values(), before.values(), strict=True))
    assert [p._version for p in model.parameters()] == versions
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def in_a_thread(weight: Any) -> None:
    thread = threading.Thread(target=lambda: weight.data.mul_(0.5))
    thread.start()
    thread.join()


def unless_that_fails(weight: Any) -> None:
    with suppress(Exception):
        weight.data.mul_(0.5)


def in_other_memory_of_the_same_place(weight: Any) -> None:
    behind = torch.utils.dlpack.from_dlpack(torch._C._to_dlpack(weight.detach()[1:]))  # type: ignore[attr-defined]
    behind.mul_(0.5)


def hooked_weight(weight: Any) -> None:
    with suppress(Exception), torch._C.DisableTorchFunction():
        weight.register_hook(lambda derivative: derivative * 2)


# Not all of them can be stopped.
UNSEEN: dict[str, Callable[[Any], object]] = {
    "a thread": in_a_thread,
    "unless that fails": unless_that_fails,
    "the same place": in_other_memory_of_the_same_place,
    "another tensor": lambda w: torch.utils.swap_tensors(w, nn.Parameter(w.detach() * 2)),
    "other memory": lambda w: setattr(w, "data", w.data * 2),
    "a hook": hooked_weight,
    "a hook behind": lambda w: w.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2)),
    "a gradient": lambda w: w.square().sum().backward(),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_modes_do_not_see_of_weights_is_no_yes(name: str) -> None:
    class Doing(Plain):
        def seen(self, x: torch.Tensor) -> torch.Tensor:
            UNSEEN[name](self.head.weight)
            return x

    model, lowered = of_another(Doing)
    assert asked(model, lowered, images()) is None
    assert differs(model, lowered, images(), engine="front", optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


# -- derivatives ---------------------------------------------------------------------------------------------


def test_graphs_are_compared_by_nodes_leaves_and_what_is_saved() -> None:
    a, b = (torch.randn(3, 4, requires_grad=True) for _ in range(2))

    def alike(one: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor]) -> bool:
        return same_derivatives(one(), other())

    assert alike(lambda: (a * b).relu().sum(), lambda: (a * b).relu().sum())
    assert alike(lambda: a.view(12).exp(), lambda: a.reshape(12).exp())
    assert alike(lambda: F.hardtanh(a, 0, 6), lambda: F.hardtanh(a, 0.0, 6.0))
    assert alike(lambda: torch.ones(2), lambda: torch.ones(2))
    for one, other in [
        (lambda: a * b, lambda: a.detach() * b),
        (lambda: a * b, lambda: b * a),
        (lambda: a * 2, lambda: a * 3),
        (lambda: a + b, lambda: torch.add(a, b, alpha=2)),
        (lambda: a.sum(0), lambda: a.sum(1)[:1].expand(4)),
        (lambda: a.exp().sum(), lambda: (a + 1e-3).exp().sum()),
        (lambda: torch.cat([a, b]), lambda: torch.cat([b, a])),
        (lambda: a.unbind()[0], lambda: a.unbind()[1]),
        (lambda: Reversed.apply(a), lambda: Reversed.apply(a)),
        (lambda: torch.ones(2), lambda: a),
        (lambda: (lambda x: x + x)(a * b), lambda: a * b + a * b),
    ]:
        assert not alike(one, other)  # type: ignore[arg-type]
    one, other = a.exp(), a.exp()
    one.mul_(2)
    assert not same_derivatives(one, other.mul_(2)), "backward would raise"
