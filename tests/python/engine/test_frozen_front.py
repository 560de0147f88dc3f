"""`engine="auto"` computes the frozen front of a called network as preconv does: only rounding tells."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import tutorial
import which_engine
from cnnrs.engine import cpu_inference, frozen_front, memory_order
from cnnrs.engine.frozen_front import front_of
from cnnrs.model.lowering import lower
from cnnrs.training.batches import length_of

pytestmark = pytest.mark.usefixtures("two_threads")


class Net(nn.Module):
    """Two blocks with a sum around each, batch norm, dropout in the head; no max-pool, so PyTorch trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.a = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.b = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(16 * 8 * 8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.size(0)
        x = F.relu(self.stem(x))
        x = F.relu_(self.a(x) + x)
        x = F.relu(self.b(x) + x)
        return self.fc(self.drop(x.reshape(size, -1)))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks count as large."""
    monkeypatch.setattr(frozen_front, "LEAST_FLOPS", 1)
    monkeypatch.setattr(frozen_front, "_LEAST_FLOPS_PER_WEIGHT", 0)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that a front has computed."""
    found: list[int] = []
    original = frozen_front.Network._features

    def spy(self: Any, inputs: torch.Tensor) -> torch.Tensor | None:
        features = original(self, inputs)
        if features is not None:
            found.append(len(inputs))
        return features

    monkeypatch.setattr(frozen_front.Network, "_features", spy)
    return found


def net(frozen: Callable[[Net], list[nn.Module]] = lambda net: [net.stem, net.a]) -> Net:
    torch.manual_seed(2)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    for part in frozen(model):
        cnnrs.freeze(part, statistics=True)
    return model


def batches(count: int = 4, last: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(3)
    sizes = (*[6] * count, last)
    return [(torch.randn(n, 3, 16, 16, generator=drawn), torch.randint(4, (n,), generator=drawn)) for n in sizes]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def trained(model: nn.Module, data: Any, optimizer: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    return cnnrs.fit(0, model, data, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False, **options)


def close(ours: nn.Module, theirs: nn.Module) -> None:
    """Sums of some 1e3 float32 terms in another order, some steps of them."""
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_training_is_the_loops_up_to_rounding(computed: list[int]) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(net(), sgd)
    before = copy.deepcopy(ours.state_dict())
    torch.manual_seed(5)
    expected = tutorial.fit(theirs, batches(), "training", their_optimizer, F.cross_entropy)
    generator = torch.get_rng_state()
    with which_engine.watched() as engines:
        # The same accuracy: the masks of dropout are the loop's.
        assert trained(ours, batches(), our_optimizer) == pytest.approx(expected, rel=1e-5)
    assert engines == ["python"] and computed == [6, 6, 6, 6, 3]
    assert torch.equal(torch.get_rng_state(), generator)
    close(ours, theirs)
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None) == name.startswith(("stem", "a."))
        if mine.grad is None:
            assert torch.equal(mine, before[name])
        else:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)
    assert int(ours.b[1].num_batches_tracked) == 5
    assert torch.equal(ours.a[1].running_mean, before["a.1.running_mean"])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_options_of_fit_hold(accumulate: int, computed: list[int]) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(net(), sgd)
    options: dict[str, Any] = {"clip_grad_norm": 0.5, "accumulate": accumulate}
    expected = trained(theirs, batches(), their_optimizer, engine="python", **options)
    assert not computed
    assert trained(ours, batches(), our_optimizer, **options) == pytest.approx(expected, rel=1e-5)
    assert len(computed) == 5
    close(ours, theirs)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, lambda outputs, targets: F.cross_entropy(outputs, targets) * 2])
def test_validation_computes_the_whole_network(loss_fn: Any, computed: list[int]) -> None:
    model = net(lambda net: [])
    before = copy.deepcopy(model.state_dict())
    expected = cnnrs.fit(0, model, batches(), "validation", loss_fn=loss_fn, engine="python", verbose=False)
    assert not computed
    got = cnnrs.fit(0, model, batches(), "validation", loss_fn=loss_fn, verbose=False)
    assert got == pytest.approx(expected, rel=1e-5) and computed == [6, 6, 6, 6, 3]
    assert tutorial.same(model.state_dict(), before)
    # As the weights are, not as they were.
    with torch.no_grad():
        model.fc.weight.mul_(-1)
    again = cnnrs.fit(1, model, batches(), "validation", loss_fn=loss_fn, verbose=False)
    expected = cnnrs.fit(0, model, batches(), "validation", loss_fn=loss_fn, engine="python", verbose=False)
    assert again == pytest.approx(expected, rel=1e-5) != got


# -- where the front ends ------------------------------------------------------------------------------------


def ends(model: nn.Module, training: bool = True, size: int = 16) -> str | None:
    front = front_of(lower(model.train(training), gradients=training), torch.zeros(2, 3, size, size), training, 1)
    return None if front is None or front.last == 0 else front.end


@pytest.mark.parametrize(
    ("frozen", "last"),
    [
        (lambda net: [], None),
        (lambda net: [net.a], None),
        (lambda net: [net.stem], "relu (ReLU)"),
        # The sum reads what is before the block.
        (lambda net: [net.stem, net.a[0]], "relu (ReLU)"),
        (lambda net: [net.stem, net.a], "relu_1 (ReLU)"),
        # Between the sums only one value is read on.
        (lambda net: [net.stem, net.a, net.b[0]], "relu_1 (ReLU)"),
        (lambda net: [net.stem, net.a, net.b], "reshape (View)"),
    ],
)  # fmt: skip
def test_it_ends_where_training_begins(frozen: Any, last: str | None) -> None:
    model = net(frozen)
    assert ends(model) == last
    assert ends(model, training=False) == "fc (Linear)"


def test_it_ends_before_statistics_that_move_and_what_draws() -> None:
    model = net()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.fc.weight.requires_grad_(True)
    # Frozen weights alone: the statistics of b move.
    assert ends(model) == "relu_1 (ReLU)"
    cnnrs.freeze(model.b, statistics=True)
    assert ends(model) == "reshape (View)"
    without = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 3))
    assert ends(without, training=False) == "0 (Conv2d)"


def test_sizes_that_are_read_later_keep_it_whole() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = cnnrs.freeze(nn.Conv2d(3, 3, 3, padding=1), statistics=True)
            self.fc = nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(self.conv(x))
            return self.fc(y.view(-1, x.size(3))).view(x.size(0), -1)

    assert ends(Sized()) is None


def test_small_batches_are_called_and_have_the_loops_bits(computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(net(), sgd)
    torch.manual_seed(5)
    expected = tutorial.fit(theirs, batches(), "training", their_optimizer, F.cross_entropy)
    assert trained(ours, batches(), our_optimizer) == expected
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert "runs in native code" not in str(cnnrs.explain(ours)).split("preconv")[0]


def test_short_epochs_of_many_weights_are_not_worth_their_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    # 1e9 operations on a batch and 5e6 weights, as numbers that nobody has written.
    model = (
        nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Conv2d(512, 1024, 3), nn.Flatten())
        .to("meta")
        .to_empty(device="cpu")
    )
    lowered, inputs = lower(model.eval(), gradients=False), torch.empty(1).expand(1, 3, 14, 14)
    assert front_of(lowered, inputs, training=False, batches=100) is not None
    assert front_of(lowered, inputs, training=False, batches=2) is None


def test_how_many_batches_there_are_is_asked_of_nobody_who_does_not_know(recwarn: pytest.WarningsRecorder) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return ((x[0], y[0]) for x, y in batches(7))

        def __len__(self) -> int:
            return 2

    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    cnnrs.fit(0, net(), loader, "validation", loss_fn=F.cross_entropy, verbose=False)
    assert length_of(loader) == 1 and length_of(iter([])) == 1 and length_of(batches(7)) == 8
    assert length_of(cnnrs.DataLoader([0] * 7, batch_size=2)) == 4
    assert not recwarn.list


# -- what else may come --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"engine": "python"}, {"amp": "bf16"}, {"memory_format": torch.channels_last}],
    ids=["engine", "amp", "format"],
)
def test_the_users_choice_stays(options: dict[str, Any], computed: list[int]) -> None:
    model = net()
    trained(model, batches(), sgd(model.parameters()), **options)
    assert not computed


def test_other_batches_are_called(computed: list[int]) -> None:
    data = batches()
    data[1] = (data[1][0].to(memory_format=torch.channels_last), data[1][1])
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(net(), sgd)
    torch.manual_seed(5)
    expected = tutorial.fit(theirs, data, "training", their_optimizer, F.cross_entropy)
    assert trained(ours, data, our_optimizer) == pytest.approx(expected, rel=1e-5)
    assert computed == [6, 6, 6, 3]
    close(ours, theirs)


def changed(change: str, model: Net, optimizer: torch.optim.Optimizer) -> None:
    """What a user's code may do between two batches."""
    torch.manual_seed(8)
    if change == "unfreeze":
        cnnrs.unfreeze(model.a)
    elif change == "eval":
        model.eval()
    elif change == "front":
        model.stem = cnnrs.freeze(nn.Conv2d(3, 16, 3, stride=2, padding=1))
    elif change == "rest":
        model.b = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    elif change == "p":
        model.drop.p = 0.9
    elif change == "weights":
        with torch.no_grad():
            model.a[0].weight.mul_(2)
    elif change == "data":
        model.a[0].weight.data.mul_(2)
    elif change == "numpy":
        model.a[0].weight.detach().numpy()[:] *= 2
    elif change == "hook":
        model.a.register_forward_hook(lambda module, args, output: output * 0.5)
    else:
        optimizer.param_groups[0]["lr"] = 0.001


CHANGES = ["unfreeze", "eval", "front", "rest", "p", "weights", "data", "numpy", "hook", "rates"]


@pytest.mark.filterwarnings("ignore:on_batch_end has left the model in eval mode")
@pytest.mark.parametrize("change", CHANGES)
def test_what_the_user_changes_between_batches_holds(change: str, computed: list[int]) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(net(), sgd)

    def changing(model: Any, optimizer: torch.optim.Optimizer) -> Callable[[int, float], None]:
        return lambda batch, mean: changed(change, model, optimizer) if batch == 1 else None

    call = changing(theirs, their_optimizer)
    expected = trained(theirs, batches(), their_optimizer, engine="python", on_batch_end=call)
    call = changing(ours, our_optimizer)
    assert trained(ours, batches(), our_optimizer, on_batch_end=call) == pytest.approx(expected, rel=1e-5)
    assert len(computed) == (5 if change == "rates" else 2)
    close(ours, theirs)


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in ("data", "numpy", "eval")])
def test_what_a_loader_changes_holds(change: str, computed: list[int]) -> None:
    def loading(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
        for number, batch in enumerate(batches()):
            if number == 2:
                changed(change, model, optimizer)
            yield batch

    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(net(), sgd)
    torch.manual_seed(5)
    expected = tutorial.fit(theirs, loading(theirs, their_optimizer), "training", their_optimizer, F.cross_entropy)
    assert trained(ours, loading(ours, our_optimizer), our_optimizer) == pytest.approx(expected, rel=1e-5)
    assert len(computed) == (5 if change == "rates" else 2)
    close(ours, theirs)


def test_without_memory_the_model_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(lowered: Any, **_: Any) -> Any:
        raise MemoryError("no memory for 1 GiB of weights")

    monkeypatch.setattr(cpu_inference, "network", full)
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(net(), sgd)
    torch.manual_seed(5)
    expected = tutorial.fit(theirs, batches(), "training", their_optimizer, F.cross_entropy)
    with pytest.warns(UserWarning, match="fit, Net: there is no memory for its frozen layers in native code"):
        assert trained(ours, batches(), our_optimizer) == expected
    assert tutorial.same(ours.state_dict(), theirs.state_dict())


def test_a_forward_that_does_more_is_called(computed: list[int]) -> None:
    class Doubled(Net):
        """Tells what looks at it from what runs it."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return F.relu(y) if type(x) is torch.Tensor else y

    model = Doubled()
    expected = cnnrs.fit(0, model, batches(), "validation", loss_fn=F.cross_entropy, engine="python", verbose=False)
    with pytest.warns(UserWarning, match="fit calls Doubled itself, .* its outputs"):
        got = cnnrs.fit(0, model, batches(), "validation", loss_fn=F.cross_entropy, verbose=False)
    assert got == expected and not computed


def test_a_front_that_computes_something_else_is_left(monkeypatch: pytest.MonkeyPatch, computed: list[int]) -> None:
    original = cpu_inference.network
    wrong = lambda lowered, **_: lambda inputs: original(lowered)(inputs) * 1.01  # noqa: E731
    monkeypatch.setattr(cpu_inference, "network", wrong)
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(net(), sgd)
    torch.manual_seed(5)
    expected = tutorial.fit(theirs, batches(), "training", their_optimizer, F.cross_entropy)
    with pytest.warns(UserWarning, match="its frozen layers in native code do not do what they do"):
        assert trained(ours, batches(), our_optimizer) == expected
    assert not computed and tutorial.same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "frozen"), [("resnet18", "layer4"), ("mobilenet_v3_small", "features.11")])
def test_networks_people_fine_tune_have_a_front(
    name: str, frozen: str, seed: int, computed: list[int], recwarn: pytest.WarningsRecorder
) -> None:
    import torchvision

    torch.manual_seed(seed)
    model = cnnrs.freeze(torchvision.models.get_model(name, num_classes=3), statistics=True)
    for part in (model.get_submodule(frozen), list(model.modules())[-1]):
        cnnrs.unfreeze(part)
    data = [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))] * 2
    trained(model, data, sgd([p for p in model.parameters() if p.requires_grad]))
    assert computed == [4, 4] and not recwarn.list


def test_the_rest_may_have_another_order_of_memory(monkeypatch: pytest.MonkeyPatch, computed: list[int]) -> None:
    monkeypatch.setattr(memory_order, "LEAST_PIXELS", 1)
    monkeypatch.setattr(frozen_front, "_LEAST_SHARE", 2.0)
    seen: list[bool] = []
    original = memory_order.MemoryOrder.ordered

    def ordered(self: Any, inputs: Any) -> Any:
        result = original(self, inputs)
        seen.append(result.is_contiguous(memory_format=torch.channels_last))
        return result

    monkeypatch.setattr(memory_order.MemoryOrder, "ordered", ordered)
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(net(), sgd)
    torch.manual_seed(5)
    expected = tutorial.fit(theirs, batches(8), "training", their_optimizer, F.cross_entropy)
    assert trained(ours, batches(8), our_optimizer) == pytest.approx(expected, rel=1e-5)
    assert seen[:8] == [False, True] * 4 and len(computed) == 9
    close(ours, theirs)


def test_a_loss_that_is_not_finite_leaves_the_weights() -> None:
    data = batches()
    data[2][0][0, 0, 0, 0] = float("nan")
    model = net()
    optimizer = sgd(model.parameters())
    theirs = copy.deepcopy(model)
    with pytest.raises(cnnrs.NonFiniteLossError, match="batch 2"):
        trained(model, data, optimizer)
    torch.manual_seed(5)
    tutorial.fit(theirs, data[:2], "training", sgd(theirs.parameters()), F.cross_entropy)
    close(model, theirs)


def test_explain_names_it() -> None:
    model = net()
    why = cnnrs.explain(model.train(), (8, 3, 16, 16))
    assert why.engine == "python" and why.front is not None
    assert why.front.startswith("but everything up to relu_1 (ReLU) is frozen") and "move" not in why.front
    assert why.front in str(why)
    everything = cnnrs.explain(model.eval(), (8, 3, 16, 16)).front
    assert everything is not None and "all 13 operations run in native code" in everything
    whole = cnnrs.explain(net(lambda net: []).train(), (8, 3, 16, 16)).front
    assert whole == "but 8 of its operations have native kernels, which large batches get where they are faster"


@pytest.mark.parametrize("affine", [True, False])
def test_explain_names_statistics_that_move(affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Frozen weights alone: who does that means the statistics too, as a rule.
    model = net(lambda net: [net.stem])
    if not affine:
        model.a[1] = nn.BatchNorm2d(16, affine=False)
    model.a.requires_grad_(False)
    front = str(cnnrs.explain(model.train(), (8, 3, 16, 16)).front)
    assert "everything up to relu (ReLU) is frozen" in front
    assert "a.1 (BatchNorm2d) is frozen, but its statistics move" in front
    assert "move" not in str(cnnrs.explain(model.eval(), (8, 3, 16, 16)))
    # Not where it would not help.
    monkeypatch.undo()
    assert cnnrs.explain(model.train(), (8, 3, 16, 16)).front is None
