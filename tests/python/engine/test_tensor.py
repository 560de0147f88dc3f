"""Tensors of every kind at the doors of the native engines: PyTorch's numbers or PyTorch's error, and nothing changed.

The oracle is the plain loop, or the module itself, on the same tensors. Engine "auto" must do what that does; engine
"cpu" may refuse.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cnnrs
import tutorial
from cnnrs import _cnnrs
from cnnrs._records import CpuTask, CrossEntropy, Epoch, IndexedSgdRow
from cnnrs.model.lowering import lower
from tensors import (
    ENGINES,
    IMAGES,
    LABELS,
    OTHER,
    SAME,
    Tensors,
    compiled,
    digits,
    fitted,
    follows,
    images,
    loop,
    network,
    outcome,
    sgd,
    small,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantize:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning"),
]


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [*SAME, *OTHER, *IMAGES])
def test_inputs_of_fit(kind: str, engine: str) -> None:
    make = {**SAME, **OTHER, **IMAGES}[kind]
    theirs, their_sgd, ours, our_sgd = tutorial.twins(network(), sgd)
    before = copy.deepcopy(ours.state_dict())
    expected = outcome(lambda: loop(theirs, their_sgd, [(make(images()), LABELS)]))
    got = outcome(lambda: fitted(ours, our_sgd, [(make(images()), LABELS)], engine))
    if kind == "inference":
        # Autograd refuses what this mode has made; the numbers are all that engine "cpu" reads.
        assert isinstance(expected, RuntimeError)
        expected = outcome(lambda: loop(theirs, their_sgd, [(images(), LABELS)]))
    follows(got, expected, engine)
    if isinstance(got, Exception):
        assert tutorial.same(ours.state_dict(), before) and not our_sgd.state


@pytest.mark.parametrize("kind", [*SAME, *OTHER, *IMAGES])
def test_inputs_in_the_middle_of_an_epoch(kind: str) -> None:
    """Engine "cpu" has begun: the module goes on, or says what is wrong, and the steps before are whole."""
    if kind == "inference":
        pytest.skip("the loop refuses it")
    make = {**SAME, **OTHER, **IMAGES}[kind]
    theirs, their_sgd, ours, our_sgd = tutorial.twins(network(), sgd)
    data = [(images(), LABELS), (make(images()), LABELS), (images() + 1, LABELS)]
    expected = outcome(lambda: loop(theirs, their_sgd, data))
    follows(outcome(lambda: fitted(ours, our_sgd, data, "auto")), expected, "auto")
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [*SAME, *OTHER])
def test_targets(kind: str, engine: str) -> None:
    make = {**SAME, **OTHER}[kind]
    theirs, their_sgd, ours, our_sgd = tutorial.twins(network(), sgd)
    before = copy.deepcopy(ours.state_dict())
    expected = outcome(lambda: loop(theirs, their_sgd, [(images(), make(LABELS))]))
    got = outcome(lambda: fitted(ours, our_sgd, [(images(), make(LABELS))], engine))
    follows(got, expected, engine)
    if isinstance(got, Exception):
        assert tutorial.same(ours.state_dict(), before) and not our_sgd.state


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [*SAME, *OTHER, *IMAGES])
def test_inputs_of_preconv(kind: str, engine: Any) -> None:
    make = {**SAME, **OTHER, **IMAGES}[kind]
    model = network().eval()

    def features() -> list[torch.Tensor]:
        return [cnnrs.preconv([(make(images()), LABELS)], model, engine=engine, verbose=False).features]

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(make(images())).as_subclass(torch.Tensor)]

    if kind in ("one number", "nested"):
        # Their number of rows is asked for first.
        with pytest.raises((ValueError, RuntimeError), match=r"one target per input|support sizes"):
            features()
    else:
        follows(outcome(features), outcome(outputs), engine)


def test_no_rows_at_all() -> None:
    model, empty = network(), (images()[:0], LABELS[:0])
    with pytest.raises(ValueError, match="no samples"):
        fitted(model, sgd(model.parameters()), [empty], "auto")
    with pytest.raises(cnnrs.UnsupportedModelError, match="the batch is empty"):
        fitted(model, sgd(model.parameters()), [empty], "cpu")
    assert cnnrs.preconv([empty], model, verbose=False).features.shape == (0, 3)


# -- models, losses, optimizers ----------------------------------------------------------------------------------------

WEIGHTS: Tensors = {kind: make for kind, make in {**SAME, **OTHER}.items() if kind not in ("int32", "bool", "meta")}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_the_model(kind: str, engine: Any) -> None:
    def model() -> nn.Module:
        made: Any = small()
        made[0].weight = nn.Parameter(WEIGHTS[kind](made[0].weight.detach()))
        return made

    data = [(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)), LABELS)]
    theirs, ours = model(), model()
    expected = outcome(lambda: loop(theirs, sgd(theirs.parameters()), data))
    follows(outcome(lambda: fitted(ours, sgd(ours.parameters()), data, engine)), expected, engine)
    with torch.no_grad():
        features = outcome(lambda: [model().eval()(data[0][0]).as_subclass(torch.Tensor)])
    got = outcome(lambda: [cnnrs.preconv(data, model(), engine=engine, verbose=False).features])
    follows(got, features, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [*SAME, *OTHER, "trained"])
def test_class_weights(kind: str, engine: str) -> None:
    make = {**SAME, **OTHER, "trained": lambda t: t.clone().requires_grad_()}[kind]
    theirs, their_sgd, ours, our_sgd = tutorial.twins(network(), sgd)
    before = copy.deepcopy(ours.state_dict())
    data, loss = [(images(), LABELS)], nn.CrossEntropyLoss(weight=make(torch.tensor([1.0, 2.0, 3.0])))
    expected = outcome(lambda: loop(theirs, their_sgd, data, loss))
    got = outcome(lambda: fitted(ours, our_sgd, data, engine, loss))
    follows(got, expected, engine)
    if isinstance(got, Exception):
        assert tutorial.same(ours.state_dict(), before) and not our_sgd.state


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": sgd,
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, eps=0.1),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_state_of_the_optimizer(kind: str, optimizer: str, engine: str) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = small()
        steps = OPTIMIZERS[optimizer](model.parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        steps.step()
        for state in steps.state.values():
            for name, value in state.items():
                if value.dim() == 2:
                    state[name] = WEIGHTS[kind](value)
        return model, steps

    data = [(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)), LABELS)]
    theirs, ours = made(), made()
    expected = outcome(lambda: loop(*theirs, data))
    follows(outcome(lambda: fitted(*ours, data, engine)), expected, engine)


# -- features and rows in memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [*SAME, *OTHER])
def test_features_in_memory(kind: str, engine: str) -> None:
    make = {**SAME, **OTHER}[kind]
    rows = torch.randn(6, 6, generator=torch.Generator().manual_seed(2))
    theirs, their_sgd, ours, our_sgd = tutorial.twins(small(), sgd)

    def loader(kind: Any) -> Any:
        return kind(cnnrs.FeatureDataset(make(rows), LABELS), batch_size=4)

    expected = outcome(lambda: loop(theirs, their_sgd, loader(torch.utils.data.DataLoader)))
    got = outcome(lambda: fitted(ours, our_sgd, loader(cnnrs.DataLoader), engine))
    follows(got, expected, engine)


@pytest.mark.parametrize("kind", [*SAME, *OTHER])
def test_digits_in_memory(kind: str, mnist_root: Path) -> None:
    def loaded(kind_of_loader: Any) -> list[torch.Tensor]:
        dataset = digits(mnist_root)
        dataset.data = {**SAME, **OTHER}[kind](dataset.data)
        return [x for x, _ in kind_of_loader(dataset, batch_size=16)]

    expected, got = outcome(lambda: loaded(torch.utils.data.DataLoader)), outcome(lambda: loaded(cnnrs.DataLoader))
    if isinstance(got, Exception):
        assert isinstance(expected, type(got)), f"{got!r}, expected {expected!r}"
        return
    assert not isinstance(expected, Exception), expected
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# -- the extension itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, 1.5, np.zeros((6, 3, 8, 8), np.float32), [[0.0]]], ids=lambda v: type(v).__name__
)
def test_what_is_no_tensor(value: Any) -> None:
    net, _ = compiled()
    with pytest.raises(TypeError, match=f"expected a torch.Tensor, got {type(value).__name__}"):
        net(value)


@pytest.mark.parametrize("kind", ["transposed", "step", "far apart", "unaligned"])
def test_the_network_copies_what_is_in_another_order(kind: str) -> None:
    net, _ = compiled()
    assert torch.equal(net(SAME[kind](images())), net(images()))


@pytest.mark.parametrize("kind", ["float64", "float16", "int32", "bool", "complex"])
def test_the_network_reads_plain_floats(kind: str) -> None:
    net, _ = compiled()
    with pytest.raises(ValueError, match=r"contiguous float32 images on cpu, got .* of shape \[6, 3, 8, 8\]"):
        net({**SAME, **OTHER}[kind](images()))


@pytest.mark.parametrize("kind", ["negated", "imaginary", "conjugated"])
def test_the_border_does_not_guess_what_lazy_views_mean(kind: str) -> None:
    net, _ = compiled()
    with pytest.raises(ValueError, match=r"call \.resolve_neg\(\)\.resolve_conj\(\) first"):
        net({**SAME, **OTHER}[kind](images()))


@pytest.mark.parametrize("kind", ["meta", "sparse", "CSR", "MKL-DNN", "quantized"])
def test_the_border_has_torchs_error_where_there_is_no_memory(kind: str) -> None:
    net, _ = compiled()
    with pytest.raises((RuntimeError, BufferError)):
        net({**OTHER, **IMAGES}[kind](images()))


def task(sgd: list[IndexedSgdRow]) -> CpuTask:
    """Cross entropy, by one thread."""
    loss: CrossEntropy = {"kind": "cross_entropy", "weight": None, "ignore_index": -100, "label_smoothing": 0.0}
    return {"loss": loss, "sgd": sgd, "adam": [], "clip": None, "workers": 1, "seed": 0, "unseen": False}


def test_wrong_tensors_of_a_graph_are_refused_before_anything_is_written() -> None:
    model = small()
    lowered = lower(model)
    tensors = [tensor.detach().clone() for tensor in lowered.tensors]
    kept = [tensor.clone() for tensor in tensors]
    x = torch.randn(6, 6)

    def fit(given: list[Any], batches: Any, state: Any = None) -> None:
        row: IndexedSgdRow = {
            "parameter": 0, "momentum_buffer": state, "used": True, "lr": 0.1, "momentum": 0.9, "dampening": 0.0,
            "weight_decay": 0.0, "nesterov": False, "maximize": False,
        }  # fmt: skip
        epoch: Epoch = {"number": 0, "phase": "training", "accumulate": 1, "after": None}
        _cnnrs.fit_cpu(epoch, lowered.graph, given, task(sgd=[row]), _cnnrs.CpuPlans(), batches)

    good = torch.zeros_like(tensors[0])
    for make in (lambda t: t[:1].clone(), lambda t: t.double(), lambda t: t[:0], lambda t: t.t(), SAME["expanded"]):
        with pytest.raises(ValueError):
            fit([make(tensors[0]), *tensors[1:]], iter([(x, LABELS)]), good)
        with pytest.raises(ValueError):
            fit(tensors, iter([(x, LABELS)]), make(good))
    for batch in ((x, LABELS[:2]), (x[:2], LABELS), (x[:0], LABELS[:0]), (x[:, :5], LABELS), (x[0, 0], LABELS)):
        with pytest.raises((ValueError, RuntimeError)):
            fit(tensors, iter([batch]), good)
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        fit(tensors, iter([(x, LABELS + 5)]), good)
    for rows in (
        (x, LABELS, [0, 6], [2]),
        (x, LABELS, [0, -1], [2]),
        (x, LABELS, [0, 1], [2, 1]),
        (x, LABELS[:3], [0], [1]),
    ):
        with pytest.raises(ValueError):
            fit(tensors, rows, good)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


def test_labels_of_another_shape_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    lowered = lower(model)
    rows = (torch.randn(4, 6), torch.zeros(4, 2, dtype=torch.int64), [0, 1, 2, 3], [4])
    epoch: Epoch = {"number": 0, "phase": "validation", "accumulate": 1, "after": None}
    with pytest.raises(ValueError, match=r"labels int64 \(N,\) or float32 \(N, K\)"):
        _cnnrs.fit_cpu(epoch, lowered.graph, lowered.tensors, task(sgd=[]), _cnnrs.CpuPlans(), rows)
