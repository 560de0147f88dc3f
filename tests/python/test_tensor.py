"""Tensors of every kind at the doors of the native engines: PyTorch's numbers or PyTorch's error, and nothing changed.

The oracle is the plain loop, or the module itself, on the same tensors. Engine "auto" must do what that does; engine
"cpu" may refuse.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tutorial
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import transforms

import cnnrs
from cnnrs import _cnnrs
from cnnrs.graph import lower

ENGINES = ["auto", "cpu"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantize:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning"),
]
Tensors = dict[str, Callable[[torch.Tensor], torch.Tensor]]


class Named(torch.Tensor):
    """A subclass that changes nothing."""


class Doubling(torch.Tensor):
    """A subclass whose functions are its own: what its memory says is not what it computes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found * 2 if func is F.conv2d or func is F.linear else found


def read_only(tensor: torch.Tensor) -> torch.Tensor:
    array = tensor.detach().numpy().copy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = np.frombuffer(b"x" + tensor.detach().contiguous().numpy().tobytes(), np.uint8)[1:]
        return torch.from_numpy(memory.view(tensor.detach().numpy().dtype)).view(tensor.shape)


def far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """Rows a MiB apart."""
    memory = torch.zeros(len(tensor), 1 << 18, dtype=tensor.dtype)
    view = memory[:, : tensor[0].numel()].unflatten(1, tensor.shape[1:]) if tensor.dim() > 1 else memory[:, 0]
    return view.copy_(tensor)


def inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


#: The same numbers in other memory.
SAME: Tensors = {
    "view": lambda t: torch.cat([t, t, t])[len(t) : 2 * len(t)],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "step": lambda t: t.repeat_interleave(3, -1)[..., ::3],
    "far apart": far_apart,
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
    "unaligned": unaligned,
    "read-only": read_only,
    "negated": lambda t: torch._neg_view(-t),
    "imaginary": lambda t: torch.complex(t, -t).conj().imag if t.is_floating_point() else torch._neg_view(-t),
    "subclass": lambda t: t.as_subclass(Named),
    "expanded": lambda t: t[:1].expand_as(t),
}
#: Other numbers, or none.
OTHER: Tensors = {
    "meta": lambda t: t.to("meta"),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "conjugated": lambda t: t.to(torch.complex64).conj(),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "sparse": lambda t: t.to_sparse(),
    "functions of its own": lambda t: t.as_subclass(Doubling),
}
IMAGES: Tensors = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "CSR": lambda t: t[:, 0, 0].to_sparse_csr(),
    "MKL-DNN": lambda t: t.to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
    "requires_grad": lambda t: t.clone().requires_grad_(),
    "parameter": nn.Parameter,
    "inference": inference,
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "one number": lambda t: t.flatten()[0],
}


def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(6) % 3


def network() -> nn.Module:
    """Engine "cpu" is what "auto" takes for it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )  # fmt: skip


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


Outcome = Exception | list[torch.Tensor]


def outcome(work: Callable[[], list[torch.Tensor]]) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    except Exception as error:
        return error


def loop(model: nn.Module, optimizer: Any, data: Any, loss_fn: Any = F.cross_entropy) -> list[torch.Tensor]:
    model.train()
    for x, y in data:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def fitted(
    model: nn.Module, optimizer: Any, data: Any, engine: Any, loss_fn: Any = F.cross_entropy
) -> list[torch.Tensor]:
    cnnrs.fit(0, model, data, optimizer=optimizer, loss_fn=loss_fn, engine=engine, verbose=False)
    return [p.detach() for p in model.parameters()]


def follows(got: Outcome, expected: Outcome, engine: str) -> None:
    """What came out is what PyTorch makes of it; engine "cpu" may also refuse."""
    if isinstance(got, Exception):
        refused = engine == "cpu" and isinstance(got, cnnrs.UnsupportedModelError)
        assert refused or type(got) is type(expected), f"{got!r}, expected {expected!r}"
        return
    assert not isinstance(expected, Exception), f"PyTorch raises {expected!r}"
    for a, b in zip(got, expected, strict=True):
        # Float32 sums of up to 600 terms of size one, each rounded by 6e-8.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


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


def digits(root: Path) -> cnnrs.MNIST:
    return cnnrs.MNIST(root, train=False, transform=transforms.ToTensor())


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


def compiled() -> tuple[_cnnrs.CpuNetwork, nn.Module]:
    model = network().eval()
    lowered = lower(model, gradients=False)
    tensors = [tensor.detach().clone() for tensor in lowered.tensors]
    return _cnnrs.CpuNetwork(lowered.graph, tensors, 1, False), model


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


def test_wrong_tensors_of_a_graph_are_refused_before_anything_is_written() -> None:
    model = small()
    lowered = lower(model)
    tensors = [tensor.detach().clone() for tensor in lowered.tensors]
    kept = [tensor.clone() for tensor in tensors]
    x, loss = torch.randn(6, 6), ("cross_entropy", None, -100, 0.0)

    def fit(given: list[Any], batches: Any, state: Any = None) -> None:
        rows = [(0, (given[0], state, True, (0.1, 0.9, 0.0, 0.0), False, False))]
        _cnnrs.fit_cpu(
            0, "training", lowered.graph, given, loss, rows, [], None, _cnnrs.CpuPlans(), 1, 0, batches, 1, None
        )

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


# -- whose memory it is ------------------------------------------------------------------------------------------------


def churn() -> None:
    """What was freed is written over."""
    for rows in (1, 6, 6, 6, 64):
        torch.full((rows, 3, 8, 8), float("nan"))


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_that_are_dropped_while_they_are_read(engine: str) -> None:
    theirs, their_sgd, ours, our_sgd = tutorial.twins(network(), sgd)

    def batches() -> Iterator[Any]:
        for i in range(8):
            yield images() + i, LABELS.clone()
            churn()

    expected = outcome(lambda: loop(theirs, their_sgd, [(images() + i, LABELS) for i in range(8)]))
    follows(outcome(lambda: fitted(ours, our_sgd, batches(), engine)), expected, "auto")


def test_features_that_are_dropped_while_they_are_read() -> None:
    rows = torch.randn(60, 6, generator=torch.Generator().manual_seed(2))
    means = []
    for drop in (False, True):
        model, seen = small(), []
        dataset = cnnrs.FeatureDataset(rows.clone(), torch.arange(60) % 3)

        def after(_: int, mean: float, dataset: Any = dataset, seen: list[float] = seen, drop: bool = drop) -> None:
            seen.append(mean)
            if drop and len(seen) == 1:
                dataset.features, dataset.labels = torch.empty(60, 6), torch.arange(60)
                gc.collect()
                torch.full((60, 6), float("nan"))

        cnnrs.fit(
            0, model, cnnrs.DataLoader(dataset, batch_size=8), optimizer=sgd(model.parameters()), engine="cpu",
            loss_fn=F.cross_entropy, on_batch_end=after, verbose=False,
        )  # fmt: skip
        means.append(seen)
    assert len(means[0]) == 8 and means[0] == means[1]


def test_features_outlive_their_network_and_their_weights() -> None:
    net, model = compiled()
    with torch.no_grad():
        expected = model(images())
    churn()
    features = net(images())
    row, array = features[2], features[3].numpy()
    del net, features
    for _ in range(3):
        other, _ = compiled()
        other(images() * 0)
        churn()
    # Sums of 600 terms of size one, each rounded by 6e-8.
    torch.testing.assert_close(row, expected[2], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(torch.from_numpy(array), expected[3], rtol=1e-5, atol=2e-5)


def test_features_that_somebody_holds_are_not_written_over() -> None:
    net, _ = compiled()
    held = [net(images() + i) for i in range(12)]
    copies = [features.clone() for features in held]
    views = [features[1:, :2] for features in held[:6]]
    kept = [view.clone() for view in views]
    del held[:6]
    for i in range(20):
        net(images() - i)
    assert all(torch.equal(a, b) for a, b in zip(held, copies[6:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(views, kept, strict=True))
    assert len({features.data_ptr() for features in [*held, *views]}) == 12
    addresses = [net(images()).data_ptr() for _ in range(6)]
    assert len(set(addresses)) < 6, "memory that nobody holds is used again"


def test_batches_are_tensors_like_any_others(mnist_root: Path) -> None:
    loader = cnnrs.DataLoader(digits(mnist_root), batch_size=16)
    batches = iter(loader)
    first, _ = next(batches)
    kept = first.clone()
    assert torch.equal(pickle.loads(pickle.dumps(first)), kept)
    assert torch.equal(copy.deepcopy(first), kept)
    assert torch.equal(torch.from_numpy(first.numpy()), kept)
    assert first.share_memory_() is first and first.is_shared() and torch.equal(first, kept)
    first.mul_(2)
    rest = [x for x, _ in batches]
    del loader, batches
    churn()
    assert torch.equal(first, kept * 2)
    plain = [x for x, _ in cnnrs.DataLoader(digits(mnist_root), batch_size=16)]
    assert torch.equal(plain[0], kept) and all(torch.equal(a, b) for a, b in zip(rest, plain[1:], strict=True))
    parameter = nn.Parameter(rest[0])
    (parameter * 2).sum().backward()
    assert parameter.grad is not None and bool((parameter.grad == 2).all())


def test_digits_outlive_their_data_set(mnist_root: Path) -> None:
    dataset = digits(mnist_root)
    expected = [x for x, _ in cnnrs.DataLoader(dataset, batch_size=16)]
    batches = iter(cnnrs.DataLoader(dataset, batch_size=16, num_workers=2))
    found = [next(batches)[0]]
    dataset.data = torch.zeros_like(dataset.data)
    del dataset
    gc.collect()
    torch.full((70, 28, 28), 9, dtype=torch.uint8)
    found += [x for x, _ in batches]
    assert [len(x) for x in found] == [len(x) for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -- memory that moves ---------------------------------------------------------------------------------------------


class Moving:
    """Batches; before one of them, or behind the last, the model's memory moves."""

    def __init__(self, model: nn.Module, at: int, move: Callable[[nn.Module], object]) -> None:
        generator = torch.Generator().manual_seed(5)
        self.data = [(torch.randn(8, 6, 8, 8, generator=generator), torch.arange(8) % 3) for _ in range(4)]
        self.model, self.at, self.move = model, at, move

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.data):
            if number == self.at:
                self.move(self.model)
            yield batch
        if self.at == len(self.data):
            self.move(self.model)


def normed() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 3))


def renew(model: nn.Module) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


MOVES: dict[str, Callable[[nn.Module], object]] = {"share_memory": lambda m: m.share_memory(), "data": renew}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("at", [2, 4])
def test_weights_that_move_between_two_steps(at: int, move: Callable[[nn.Module], object]) -> None:
    ours, theirs = normed(), normed()
    for model, fit in ((ours, "auto"), (theirs, "python")):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        data: Any = Moving(model, at, move)
        cnnrs.fit(0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, engine=fit, verbose=False)  # type: ignore[arg-type]
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("at", [1, 3])
def test_weights_that_move_within_a_step(at: int, move: Callable[[nn.Module], object]) -> None:
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data: Any = Moving(model, at, move)
    with pytest.raises(ValueError, match="were given other memory within a step"):
        cnnrs.fit(
            0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, engine="cpu", accumulate=2, verbose=False
        )


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_frozen_network_follows_its_weights(move: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).eval()
    lowered = lower(model, gradients=False)
    network = _cnnrs.CpuNetwork(lowered.graph, lowered.tensors, 2, False)
    for size in (8, 12):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(network(x), model(x))
        move(model)


def test_labels_of_another_shape_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    lowered = lower(model)
    rows = (torch.randn(4, 6), torch.zeros(4, 2, dtype=torch.int64), [0, 1, 2, 3], [4])
    loss = ("cross_entropy", None, -100, 0.0)
    with pytest.raises(ValueError, match=r"labels int64 \(N,\) or float32 \(N, K\)"):
        _cnnrs.fit_cpu(
            0, "validation", lowered.graph, lowered.tensors, loss, [], [], None, _cnnrs.CpuPlans(), 1, 0, rows, 1, None
        )
