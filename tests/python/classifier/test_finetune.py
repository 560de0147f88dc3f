"""The second stage: which layers learn, that the better network is kept, and that nothing is lost however it ends."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cnnrs import NonFiniteLossError
from cnnrs.classifier import finetune
from cnnrs.classifier.finetune import Plan, Tuned, described, fine_tune
from cnnrs.classifier.heads import cut
from cnnrs.classifier.last_block import last_block, thaw
from cnnrs.classifier.train_head import HeadOptions
from cnnrs.model.weights import find

TRAIN, VALID = torch.arange(24), torch.arange(24, 36)


class Pictures(Dataset[tuple[Tensor, Any]]):
    """Small pictures of two kinds, 48 of them, which remembers the numbers that were asked for."""

    def __init__(self, flipped: bool = False, several: bool = False) -> None:
        self.labels = torch.arange(48) % 2
        order = torch.Generator().manual_seed(0)
        self.images = torch.randn(48, 3, 8, 8, generator=order) + self.labels[:, None, None, None]
        # Those that choose say the opposite.
        self.shown = torch.where((torch.arange(48) >= 24) & flipped, 1 - self.labels, self.labels)
        if several:
            self.shown = nn.functional.one_hot(self.shown, 2).float()
        self.asked: set[int] = set()

    def __len__(self) -> int:
        return 48

    def __getitem__(self, number: int) -> tuple[Tensor, Any]:
        self.asked.add(number)
        label = self.shown[number]
        return self.images[number], label if label.dim() else int(label)


def network() -> nn.Module:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.blocks = nn.Sequential(nn.Sequential(Block(), Block()), nn.BatchNorm2d(4))
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]

    return Net().eval()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.two = nn.Dropout(0.2), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.drop(self.norm(self.one(x)).relu()))  # type: ignore[no-any-return]


def tuned(
    model: nn.Module, photos: Pictures | None = None, which: Any = "last", lr: float = 0.1, kind: str = "linear",
    **more: Any,
) -> Tuned:  # fmt: skip
    photos = photos or Pictures()
    options = HeadOptions(2, batch_size=8, lr=lr, epochs=more.pop("epochs", None))
    announce = more.pop("announce", lambda plan: None)
    return fine_tune(
        model, "fc", kind, which, photos, photos.shown, TRAIN, VALID, options, DataLoader, announce, **more
    )  # fmt: skip


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("name", "head", "block"),
    [
        ("resnet18", "linear", "layer4.1"),
        ("vgg16", "linear", "classifier.3"),
        ("vgg16", "classifier", "features.28"),
        ("mobilenet_v3_large", "mlp", "features.15"),
        ("densenet121", "linear", "features.denseblock4.denselayer16"),
        ("inception_v3", "linear", "Mixed_7c"),
        ("vit_b_16", "linear", "encoder.layers.encoder_layer_11"),
        ("swin_t", "linear", "features.7.1"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of inception_v3")
def test_last_block(name: str, head: str, block: str) -> None:
    with torch.device("meta"):
        found = find(name, None)
        parts = cut(found, head, 2)
    assert last_block(parts.join(), parts.path) == block


def test_nothing_beside_the_head() -> None:
    with pytest.raises(ValueError, match="no weights beside its head"):
        last_block(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "1")


def test_what_is_behind_the_block_learns_and_nothing_before() -> None:
    model = network()
    assert thaw(model, "fc", "last") == "blocks.0.1"
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0] for name in learns} == {
        "blocks.0.1.one", "blocks.0.1.norm", "blocks.0.1.two", "blocks.1", "fc",
    }  # fmt: skip
    # In front of it all is as it was for the head, dropout included, also when an epoch begins.
    model.train()
    still = {path for path, module in model.named_modules() if not module.training}
    assert {path for path in still if not path.startswith("blocks.0.0")} == {"stem", "blocks.0.1.norm", "blocks.1"}
    assert {"blocks.0.0", "blocks.0.0.one", "blocks.0.0.norm", "blocks.0.0.drop", "blocks.0.0.two"} <= still


@pytest.mark.parametrize("which", ["last", "all"])
def test_a_better_network_is_kept(which: str) -> None:
    model, photos = network(), Pictures()
    before, heard = state(model), list[Plan]()
    done = tuned(model, photos, which, announce=heard.append)
    assert done.kept and not model.training
    facts = done.facts()
    assert facts["after"]["loss"] < facts["before"]["loss"]
    assert done.history.val_losses[done.best] == min(done.history.val_losses)
    moved = changed(before, model)
    # Statistics are those that the head was trained with; the first layers are the pretrained ones.
    assert not [name for name in moved if "running" in name or "tracked" in name]
    assert ("stem.weight" in moved) == (which == "all") and "blocks.0.1.one.weight" in moved
    # What has measured the head has no say.
    assert photos.asked == {*TRAIN.tolist(), *VALID.tolist()}
    # It is the network of that epoch, and it can be trained like any other.
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(photos.images[VALID]), photos.labels[VALID])
    assert float(loss) == pytest.approx(done.history.val_losses[done.best], abs=1e-5)
    model.train()
    assert all(layer.training for layer in model.modules())
    assert (len(heard), heard[0].steps) == (1, 3)
    done.undo()
    assert not changed(before, model)


@pytest.mark.parametrize(("flipped", "lr"), [(True, 0.1), (False, 1e-30)])
def test_a_worse_one_is_not_and_neither_is_an_equal_one(flipped: bool, lr: float) -> None:
    model = network()
    before = state(model)
    done = tuned(model, Pictures(flipped), lr=lr)
    assert not done.kept and done.history.val_losses[done.best] >= done.plan.before[0] - 1e-4
    assert not changed(before, model)


def test_several_labels_per_photo() -> None:
    done = tuned(network(), Pictures(several=True))
    assert done.kept and "after; " not in described(done.facts()) and " after" in described(done.facts())


def test_the_head_learns_faster_than_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = network(), list[dict[str, Any]]()

    class Spy(torch.optim.AdamW):
        def __init__(self, params: Any, **more: Any) -> None:
            groups[:] = params if isinstance(params[0], dict) else []
            super().__init__(params, **more)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    tuned(model, which="all")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    body, head = ({names[id(one)] for one in group["params"]} for group in groups)
    assert head == {"fc.weight", "fc.bias"} and body | head == set(names.values())
    assert groups[1]["initial_lr"] == pytest.approx(0.01) == 10 * groups[0]["initial_lr"]


def test_a_loss_that_is_not_finite() -> None:
    model = network()
    before = state(model)
    done = tuned(model, lr=1e38)
    assert not done.kept and "given up" in done.why and "nan" in done.why.lower()
    assert not changed(before, model)


def test_stopped() -> None:
    model = network()
    before, heard = state(model), []

    def stop(epoch: int, *_: object) -> None:
        heard.append(bool(changed(before, model)))
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(model, tell=stop)
    assert heard == [True, True]
    assert not changed(before, model)
    assert all(layer.training for layer in model.train().modules())


def test_the_cost_is_known_before_anything_changes() -> None:
    model = network()
    before, heard = state(model), []

    def look(plan: Plan) -> None:
        heard.append(plan)
        assert not changed(before, model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(model, announce=look)
    (plan,) = heard
    assert plan.seconds > 0 and (plan.epochs, plan.steps, plan.block) == (10, 3, "blocks.0.1")
    learns = (model.blocks[0][1], model.blocks[1], model.fc)  # type: ignore[index]
    assert plan.trained == sum(parameter.numel() for part in learns for parameter in part.parameters())


@pytest.mark.parametrize(
    ("losses", "best", "why"),
    [
        ([0.4, 0.39995, 0.45], None, ""),
        ([0.4, 0.39995, 0.3999, 0.39985, 0.3998], 4, ""),
        ([0.4, 0.5, 0.3, math.nan], 2, "given up: "),
        ([0.4, math.nan], None, "given up: "),
        ([math.nan], None, "given up before anything has learnt: "),
    ],
)
def test_the_weights_are_those_of_the_epoch_that_is_named(
    losses: list[float], best: int | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation finds these losses, the first before anything has learnt; an epoch adds one to a bias."""
    left, model = list(losses), network()
    before = model.fc.bias.detach().clone()  # type: ignore[operator, union-attr]

    def fit(epoch: int, model: Any, loader: Any, phase: str = "training", **more: Any) -> tuple[float, float]:
        if isinstance(ticks := more.get("on_batch_end"), finetune._Ticks):
            ticks(0, 0.0)
        if phase == "validation":
            if not math.isfinite(loss := left.pop(0)):
                raise NonFiniteLossError("the loss is nan")
            return loss, 50.0
        with torch.no_grad():
            # A learning rate of nothing times a gradient that is not finite.
            model.fc.bias.add_(math.nan if isinstance(loader, itertools.islice) else 1)
        return 0.1, 50.0

    monkeypatch.setattr(finetune, "fit", fit)
    done = tuned(model, epochs=max(1, len(losses) - 1))
    assert torch.allclose(model.fc.bias, before + (best or 0))  # type: ignore[arg-type, union-attr]
    facts = done.facts()
    assert (facts["kept"], facts["epoch"] if facts["kept"] else None) == (best is not None, best)
    assert facts["stopped"].startswith(why) and bool(facts["stopped"]) == bool(why)
    assert described(facts).endswith("the first stage is kept") == (best is None)


def test_what_was_frozen_stays_frozen() -> None:
    model = network()
    model.blocks[0][1].one.requires_grad_(False)  # type: ignore[index, union-attr]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = state(model)
    tuned(model, which="all")
    moved = changed(before, model)
    assert "blocks.0.1.two.weight" in moved and not [name for name in moved if name.startswith("blocks.0.1.one")]
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_can_choose() -> None:
    photos = Pictures()
    photos.shown[:24], photos.shown[24:36] = 0, 1
    with pytest.raises(ValueError, match="all photos that choose are of classes without photos that train"):
        tuned(network(), photos)


def test_what_a_photo_takes() -> None:
    """Neither the setting up of the first batch nor a rest of one photo counts for all."""
    clock = finetune._Ticks()
    clock.ends = [0.0, 100.0, 132.0, 133.0]
    assert clock.per_photo(65, 32) == 1.0 and clock.per_batch() == 16.5
    clock.ends = [0.0, 8.0]
    assert clock.per_photo(8, 32) == 1.0 and clock.per_batch() == 8.0
