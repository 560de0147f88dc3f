"""The check on the first batch: it finds what lowering has missed, leaves no trace, and costs one small step."""

from __future__ import annotations

import copy
import random
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as zoo

import cnnrs
import tutorial
from cnnrs import _cnnrs
from cnnrs.engine.verify import differs
from cnnrs.model.lowering import Lowered, lower
from cnnrs.model.operations import FUNCTIONS, LAYERS, WEIGHTED
from cnnrs.model.player import OPERATIONS, play

#: name, kind, inputs, attributes; parameters and buffers as tensors.
Node = tuple[str, str, list[int], dict[str, Any]]


def crafted(nodes: list[Node]) -> Lowered:
    """A graph that somebody has made of a module, rightly or wrongly."""
    tensors: list[torch.Tensor] = []

    def index(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if not any(value is known for known in tensors):
            tensors.append(value)
        return next(i for i, known in enumerate(tensors) if value is known)

    operations: list[Node] = [("input", "Input", [], {})]
    operations += [(name, kind, ins, {k: index(v) for k, v in given.items()}) for name, kind, ins, given in nodes]
    output = len(operations) - 1
    graph = _cnnrs.Graph(operations, output, [list(t.shape) for t in tensors])
    names, kinds = [o[0] for o in operations], [o[1] for o in operations]
    return Lowered(graph, tensors, names, kinds, operations, output)


def linear(model: Any, name: str, source: int) -> Node:
    layer = model.get_submodule(name)
    return (name, "Linear", [source], {"weight": layer.weight, "bias": layer.bias})


class Two(nn.Module):
    """Two layers and what stands between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Linear(6, 6)
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.head = nn.Linear(6, 3)
        self.register_buffer("steps", torch.zeros(()))


class Probe(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(x)


class Unused(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + 0 * self.body(x)[:, :3].detach()


class Scaled(Two):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)) + self.centres


class Leaky(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x)
        return self.head(h + self.act(h))


class Aliased(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x)
        out = h
        out += torch.sigmoid(h)
        return self.head(h)


class Counting(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.head(self.body(x))


class Branching(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)) if isinstance(x, torch.Tensor) else self.head(x)


def two(model: Any) -> list[Node]:
    return [linear(model, "body", 0), linear(model, "head", 1)]


LEAKY: dict[str, Any] = {"negative_slope": 0.2, "inplace": False}
# What a lowering that sees calls only makes of them, what the check says, and whether features are wrong too.
MISSED: dict[str, tuple[type[Two], Callable[[Any], list[Node]], str, bool]] = {
    "a context": (Probe, two, r"parameter body\.weight gets a gradient of up to .* that were found in it, none", False),
    "a parameter that gets none": (
        Unused,
        lambda m: [linear(m, "head", 0)],
        "",
        False,
    ),
    "a parameter outside": (Scaled, two, r"parameter centres gets a gradient of up to .* from it, none from", False),
    "an in-place layer": (
        Leaky,
        lambda m: [linear(m, "body", 0), ("act", "LeakyReLU", [1], LEAKY), ("add", "Add", [1, 2], {"inplace": False}),
                   linear(m, "head", 3)],
        r"its outputs of up to .* differ by up to .*, first behind head \(Linear\)",
        True,
    ),
    "an alias": (
        Aliased,
        lambda m: [linear(m, "body", 0), ("sigmoid", "Sigmoid", [1], {"inplace": False}),
                   ("add", "Add", [1, 2], {"inplace": False}), linear(m, "head", 1)],
        r"its outputs of up to .* differ by up to .*, first behind head \(Linear\)",
        True,
    ),
    "a counter": (Counting, two, "its forward changes buffer steps, otherwise than", False),
    "a branch": (Branching, lambda m: [linear(m, "head", 0)], r"differ by up to .*, first behind head", True),
}  # fmt: skip


def batches(count: int = 3, size: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1, weight_decay=0.01)


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes lowering believe anything."""

    def believe(nodes: Callable[[Any], list[Node]]) -> None:
        for user in ("choice", "explain"):
            monkeypatch.setattr(f"cnnrs.engine.{user}.lower", lambda model, *_, **__: crafted(nodes(model)))

    return believe


@pytest.mark.parametrize("name", MISSED)
def test_fit_calls_the_module_where_its_operations_are_not_what_it_computes(name: str, believed: Any) -> None:
    make, nodes, words, _ = MISSED[name]
    believed(nodes)
    theirs, their_adam, ours, our_adam = tutorial.twins(make(), adam)
    fit: Any = cnnrs.compile(optimizer=our_adam, loss_fn=F.cross_entropy, verbose=False)
    for phase in ("training", "validation", "training"):
        expected = tutorial.fit(theirs, batches(), phase, their_adam, F.cross_entropy)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = fit(0, ours, batches(), phase)
        notes = [str(one.message) for one in caught]
        assert got == pytest.approx(expected, rel=1e-6)
        if phase == "training" and words:
            assert len(notes) == 1 and notes[0].startswith(f"fit calls {make.__name__} itself, as engine='python' does")
            assert re.search(words, notes[0]), notes
    # Engine "cpu", where nothing is wrong: float rounding, which Adam makes the most of.
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    for b, c in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(b, c)


@pytest.mark.parametrize("engine", ["torch", "cpu"])
@pytest.mark.parametrize("name", [name for name in MISSED if MISSED[name][2]])
def test_an_engine_that_was_asked_for_refuses(name: str, engine: Any, believed: Any) -> None:
    make, nodes, words, _ = MISSED[name]
    believed(nodes)
    model = make()
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(cnnrs.UnsupportedModelError, match=words) as refused:
            cnnrs.fit(0, model, batches(), optimizer=adam(model.parameters()), loss_fn=F.cross_entropy, engine=engine)
        assert str(refused.value).startswith(f"engine '{engine}' cannot run this model:\n")
    assert tutorial.same(model.state_dict(), before)


@pytest.mark.parametrize("engine", ["auto", "torch", "cpu"])
@pytest.mark.parametrize("name", [name for name in MISSED if MISSED[name][3]])
def test_preconv_calls_the_module_too(name: str, engine: Any, believed: Any) -> None:
    make, nodes, words, _ = MISSED[name]
    believed(nodes)
    model = make().eval()
    with torch.no_grad():
        expected = torch.cat([model(x.clone()) for x, _ in batches()])
    if engine == "auto":
        with pytest.warns(UserWarning, match=f"preconv calls {make.__name__} itself, as .*{words}"):
            features, _ = cnnrs.preconv(batches(), model)
        assert torch.equal(features, expected)
    else:
        with pytest.raises(cnnrs.UnsupportedModelError, match=words):
            cnnrs.preconv(batches(), model, engine=engine)
    wrong, _ = cnnrs.preconv(batches(), model, check=False)
    assert not torch.allclose(wrong, expected)


def test_check_can_be_switched_off(believed: Any) -> None:
    believed(two)
    model = Probe()
    body = model.body.weight.detach().clone()
    fit = cnnrs.compile(optimizer=adam(model.parameters()), loss_fn=F.cross_entropy, check=False, verbose=False)
    fit(0, model, batches())
    assert not torch.equal(model.body.weight, body), "the wrong graph was meant to be believed"


def test_explain_knows_what_was_found(believed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    believed(two)
    model = Probe()
    assert cnnrs.explain(model, (12, 6)).engine == "cpu"
    with pytest.warns(UserWarning, match="fit calls Probe itself"):
        cnnrs.fit(0, model, batches(), optimizer=adam(model.parameters()), loss_fn=F.cross_entropy, verbose=False)
    why = cnnrs.explain(model, (12, 6))
    assert why.engine == "python" and "parameter body.weight gets a gradient" in why.reasons[0]


# -- no trace ------------------------------------------------------------------------------------------------


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were copied, each copy called once: a forward that counted itself would be refused."""
    made: list[nn.Module] = []
    real = copy.deepcopy

    def spy(value: Any, memo: Any = None) -> Any:
        if isinstance(value, Whole):
            made.append(value)
        return real(value, memo)

    monkeypatch.setattr(copy, "deepcopy", spy)
    return made


class Whole(nn.Module):
    """Everything that a check could leave a trace in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, momentum=None)
        self.drop = nn.Dropout2d(0.3)
        self.head = nn.Linear(4 * 36, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return self.head(F.dropout(self.drop(x), 0.2, training=True).flatten(1))


def photos(size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size, 1, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator)


@pytest.mark.parametrize("engine", ["torch", "cpu"])
def test_the_check_leaves_no_trace_and_runs_once(engine: str, copies: list[nn.Module]) -> None:
    model = Whole()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lowered = lower(model)
    x, _ = photos()
    state, inputs = copy.deepcopy(model.state_dict()), x.clone()
    attributes = [dict(vars(module)) for module in model.modules()]
    grads, tensors = [p.grad for p in model.parameters()], [*model.parameters(), *model.buffers()]
    versions = [t._version for t in tensors]
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for _ in range(3):
        assert differs(model, lowered, x, engine=engine, optimizer=optimizer) is None
    assert len(copies) == 1
    assert tutorial.same(model.state_dict(), state) and torch.equal(x, inputs)
    assert [t._version for t in tensors] == versions, "written to, if only the same"
    assert all(vars(module) == old for module, old in zip(model.modules(), attributes, strict=True))
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad and torch.equal(grad, torch.ones_like(p))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn[:2]
    assert torch.equal(torch.get_rng_state(), drawn[2])
    assert not optimizer.state


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_what_was_checked_is_not_checked_again(engine: Any, copies: list[nn.Module]) -> None:
    model = Whole()
    fit: Any = cnnrs.compile(
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=F.cross_entropy, engine=engine, verbose=False
    )
    cnnrs.fit(0, model, [photos()], "validation", loss_fn=F.cross_entropy, engine=engine, check=False, verbose=False)
    assert not copies
    counts = []
    for phase in ("training", "validation", "training", "validation"):
        fit(0, model, [photos(), photos(5)], phase)
        counts.append(len(copies))
    assert counts == [1, 2, 2, 2]
    # Of another size of batch the four samples are the same; another layer is another question.
    fit(0, model, [photos(30)])
    assert len(copies) == 2
    model.head = nn.Linear(4 * 36, 3)
    fit(0, model, [photos()])
    assert len(copies) == 3


@pytest.mark.libtorch
def test_the_bits_and_the_random_numbers_stay_the_loops() -> None:
    theirs, their_adam, ours, our_adam = tutorial.twins(Whole(), adam)
    torch.manual_seed(3)
    expected = [tutorial.fit(theirs, [photos()] * 3, "training", their_adam, F.cross_entropy) for _ in range(2)]
    after = torch.get_rng_state()
    torch.manual_seed(3)
    fit = cnnrs.compile(optimizer=our_adam, loss_fn=F.cross_entropy, engine="torch", verbose=False)
    assert [fit(e, ours, [photos()] * 3) for e in range(2)] == expected
    assert torch.equal(torch.get_rng_state(), after)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())


# -- what forward does besides computing ---------------------------------------------------------------------


class Doing(Two):
    """Does something, then computes."""

    def __init__(self, does: Callable[[Any], object]) -> None:
        super().__init__()
        self.does = does
        self.seen: dict[str, int] = {"calls": 0}
        self.log: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.does(self)
        return self.head(self.body(x))


def count(module: Any) -> None:
    module.seen["calls"] += 1


DOING: dict[str, tuple[Callable[[Any], object], str]] = {
    # Python's and NumPy's, from which a loader's threads draw too, are seen while the model is taken apart.
    "draws": (lambda m: torch.rand(1), "it draws random numbers, and not for dropout"),
    "counts": (count, r"its forward changes seen\['calls'\]"),
    "lists": (lambda m: m.log.append(1), r"its forward changes log\[0\]"),
    "remembers": (lambda m: setattr(m, "last", 1), "its forward changes last"),
    "clamps": (lambda m: m.head.weight.data.clamp_(-9, 9), ""),
    "writes": (lambda m: torch.no_grad()(m.head.weight.mul_)(0.9), r"its forward changes head\.weight"),
}


@pytest.mark.parametrize("engine", ["cpu", "torch"])
@pytest.mark.parametrize("name", DOING)
def test_a_forward_that_does_more_is_called(name: str, engine: str, believed: Any) -> None:
    does, words = DOING[name]
    model = Doing(does)
    reason = differs(model, crafted(two(model)), batches()[0][0], engine=engine, optimizer=adam(model.parameters()))
    assert re.search(words, reason) if words else reason is None
    assert model.seen == {"calls": 0} and model.log == [] and not hasattr(model, "last")


def test_a_module_that_cannot_be_copied_is_called() -> None:
    model = Two()
    model.lock = threading.Lock()  # type: ignore[assignment]
    model.forward = Branching.forward.__get__(model)  # type: ignore[method-assign]
    lowered = crafted(two(model))
    reason = differs(model, lowered, batches()[0][0], engine="cpu")
    assert reason is not None and "it cannot be copied" in reason and "TypeError (cannot pickle" in reason


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "torch", "cpu"])
def test_errors_are_those_of_the_run(engine: Any) -> None:
    model = cnnrs.models.MnistNet()
    wrong = [(torch.randn(4, 1, 20, 20), torch.zeros(4, dtype=torch.int64))]
    said = []
    for check in (True, False):
        with pytest.raises((RuntimeError, ValueError)) as error:
            cnnrs.fit(0, model, wrong, "validation", loss_fn=F.nll_loss, engine=engine, check=check)
        said.append((type(error.value), str(error.value)))
    assert said[0] == said[1]
    beyond = [(torch.randn(2, 1, 28, 28), torch.tensor([1, 10]))]
    with pytest.raises(IndexError, match=r"(?i)target 10 is out of bounds"):
        cnnrs.fit(0, model, beyond, "validation", loss_fn=F.nll_loss, engine=engine)


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
], ids=str)  # fmt: skip
def test_memory_that_runs_out_says_nothing_about_the_model(error: Exception) -> None:
    class Large(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    model = nn.Sequential(nn.Linear(6, 3))
    lowered = lower(model)
    model.__class__ = Large
    assert differs(model, lowered, batches()[0][0], engine="cpu") is None


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_what_only_the_module_refuses_is_refused(engine: Any, believed: Any) -> None:
    class Refusing(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.mean() < 100:
                raise ValueError("too dark")
            return self.head(self.body(x))

    believed(two)
    model = Refusing()
    with pytest.raises(ValueError, match=r"^too dark$"), pytest.warns(UserWarning, match="raises ValueError"):
        cnnrs.fit(0, model, batches(), "validation", loss_fn=F.cross_entropy)
    with pytest.raises(ValueError, match=r"^too dark$") as refused:
        cnnrs.fit(0, model, batches(), "validation", loss_fn=F.cross_entropy, engine=engine)
    assert "it raises ValueError (too dark)" in str(refused.value.__cause__)


@pytest.mark.parametrize("engine", ["auto", "torch", "cpu"])
def test_a_backward_that_pytorch_refuses_is_refused(engine: Any) -> None:
    class Overwriting(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.sigmoid(self.body(x))
            return self.head(F.relu(h, inplace=True))

    model = Overwriting()
    with pytest.raises((RuntimeError, cnnrs.UnsupportedModelError), match="modified by an inplace operation"):
        cnnrs.fit(0, model, batches(), optimizer=adam(model.parameters()), loss_fn=F.cross_entropy, engine=engine)


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_a_model_for_one_size_of_batch_is_checked_with_all_of_it(engine: str) -> None:
    class Fixed(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x).view(12, 6))

    model = Fixed()
    assert differs(model, lower(model), batches()[0][0], engine=engine) is None
    wrong = crafted([linear(model, "head", 0)])
    assert "differ by up to" in (differs(model, wrong, batches()[0][0], engine=engine) or "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_left_to_the_run(value: float) -> None:
    model = cnnrs.models.MnistNet()
    x = torch.randn(4, 1, 28, 28)
    x[1, 0, 3, 3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cnnrs.preconv([(x, torch.arange(4))], model).features.shape == (4, 10)


# -- the same everywhere else --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["recorded", "torch"])
@pytest.mark.parametrize(
    ("name", "amp"), [("resnet18", None), ("mobilenet_v3_small", None), ("squeezenet1_1", torch.bfloat16)]
)
def test_nothing_is_found_in_torchvisions_networks(name: str, amp: Any, engine: str) -> None:
    torch.manual_seed(0)
    model = getattr(zoo, name)(weights=None, num_classes=5)
    x = torch.randn(5, 3, 64, 64)
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), None):
        model.train(optimizer is not None)
        assert differs(model, lower(model), x, engine=engine, optimizer=optimizer, amp=amp, most=4) is None


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "googlenet", "efficientnet_b0"])
def test_the_player_has_the_modules_bits(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(zoo, name)(weights=None, **({"init_weights": False} if name == "googlenet" else {})).eval()
    lowered, x = lower(model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(play(lowered, lowered.tensors, x), model(x))


def test_the_player_knows_every_operation() -> None:
    kinds = {kind for table in (LAYERS, FUNCTIONS, WEIGHTED) for kind, _ in table.values()}
    assert kinds <= OPERATIONS.keys(), kinds - OPERATIONS.keys()


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_a_wrong_statistic_or_gradient_is_found(engine: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    optimizer, x = adam(model.parameters()), photos()[0]
    for kind, changes, words in [
        ("BatchNorm2d", {"momentum": 0.2}, "its forward changes buffer 1.running_mean, otherwise than"),
        ("BatchNorm2d", {"num_batches_tracked": None}, "its forward changes buffer 1.num_batches_tracked"),
        ("BatchNorm2d", {"eps": 1e-2}, r"its outputs of up to .*, first behind 1 \(BatchNorm2d\)"),
    ]:
        right = lower(model)
        operations = [(n, k, i, {**a, **(changes if k == kind else {})}) for n, k, i, a in right.operations]
        graph = _cnnrs.Graph(operations, right.output, [list(t.shape) for t in right.tensors])
        wrong = Lowered(graph, right.tensors, right.names, right.kinds, operations, right.output)
        found = differs(model, wrong, x, engine=engine, optimizer=optimizer)
        assert found is not None and re.search(words, found), found
