"""`preconv(engine="auto")` may call a network in channels_last where that is faster: all rows are of one order."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

import cnnrs
from cnnrs.engine import memory_order
from cnnrs.features.store import Store

LAST: Any = torch.channels_last
TRANSFORM = transforms.Compose([transforms.Resize((24, 24)), transforms.ToTensor()])
pytestmark = pytest.mark.usefixtures("two_threads")


class Net(nn.Module):
    """Rolls its channels, for which no engine but the module itself has an operation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)))
        # What a mean adds first depends on what lies beside what, so that bits tell the order.
        return self.end(self.deep(x.roll(1, 1) * x.mean((2, 3), keepdim=True)))

    def end(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Counting(Net):
    calls = 0

    def end(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


class Moving(Net):
    """Its statistics go on whatever the mode is."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.train()
        return self


class Viewing(Net):
    def end(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.size(0), -1)


class Drawing(Net):
    def end(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5)


class Locked(Net):
    """Cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is one of it")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks and jobs count as large."""
    monkeypatch.setattr(memory_order, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(memory_order, "LEAST_PIXELS", 1)
    monkeypatch.setattr(memory_order, "_LEAST_JOB", 1 / 8)


class Clock:
    """On it channels_last takes half as long as contiguous, or twice; counts what was timed."""

    def __init__(self) -> None:
        self.last_wins = True
        self.timed: list[bool] = []

    def seconds(self, model: nn.Module, inputs: torch.Tensor, last: bool) -> float:
        self.timed.append(last)
        model(inputs.contiguous(memory_format=LAST) if last else inputs)
        return 0.5 if last == self.last_wins else 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(memory_order, "_seconds", made.seconds)
    yield made


def loader(count: int = 27, batch: int = 6) -> DataLoader[Any]:
    torch.manual_seed(3)
    return DataLoader(TensorDataset(torch.randn(count, 3, 24, 24), torch.arange(count)), batch_size=batch)


@torch.no_grad()
def plain(model: nn.Module, data: Any, last: bool = False) -> torch.Tensor:
    """What a loop over the batches makes of them in one order of memory."""
    model.eval()
    if last:
        model = memory_order._in_channels_last(model)
    rows = [model(x.to(memory_format=LAST) if last else x).contiguous() for x, _ in data]
    return torch.cat(rows)


def features(model: nn.Module, data: Any = None, **options: Any) -> torch.Tensor:
    return cnnrs.preconv(data or loader(), model, verbose=False, **options).features


def memory(model: nn.Module) -> list[Any]:
    return [(id(t), t.data_ptr(), t.stride(), t._version) for t in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("wins", [True, False])
def test_all_rows_have_the_faster_order(wins: bool, clock: Clock) -> None:
    clock.last_wins = wins
    model = Net()
    before = memory(model)
    found = features(model)
    assert torch.equal(found, plain(model, loader(), wins))
    # Of one of the two only, or this test tells nothing.
    assert not torch.equal(found, plain(model, loader(), not wins))
    assert clock.timed == [False, True] * 4
    assert memory(model) == before
    why = cnnrs.explain(model, (6, 3, 24, 24))
    assert why.preconv == "python" and why.preconv_order is not None and why.preconv_order in str(why)
    assert ("channels_last;" in why.preconv_order) == wins
    # It is known from now on, for this form.
    assert torch.equal(features(model), found) and len(clock.timed) == 8


@pytest.mark.parametrize(
    "what", ["model", "batches", "python", "deterministic", "autocast", "hook", "few", "unknown", "small"]
)
def test_the_order_stays(what: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, options, calls = Net(), loader(), {}, []
    if what == "model":
        model.to(memory_format=LAST)  # type: ignore[call-overload]
    elif what == "batches":

        def collate(some: Any) -> Any:
            return torch.stack([x for x, _ in some]).to(memory_format=LAST), torch.zeros(len(some))

        data = DataLoader(data.dataset, 6, collate_fn=collate)
    elif what == "python":
        options = {"engine": "python"}
    elif what == "autocast":
        options = {"precision": "bf16"}
    elif what == "hook":
        model.deep.register_forward_hook(lambda module, args, output: calls.append(output.is_contiguous()))
    elif what == "few":
        monkeypatch.setattr(memory_order, "_LEAST_JOB", 1)
    elif what == "unknown":
        data = list(data)  # type: ignore[assignment]
    elif what == "small":
        monkeypatch.setattr(memory_order, "LEAST_PIXELS", 6 * 24 * 24 + 1)
    torch.use_deterministic_algorithms(what == "deterministic")
    try:
        found = features(model, data, **options)
        if what != "autocast":
            assert torch.equal(found, plain(model, data))
        assert not clock.timed and (what != "hook" or calls[:5] == [True] * 5)
        if what == "deterministic":
            assert "deterministic algorithms are asked for" in str(cnnrs.explain(model).preconv_order)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", [Counting, Viewing, Locked])
def test_networks_that_would_notice_are_called_as_they_are(kind: type[Net], clock: Clock) -> None:
    model = kind()
    found = features(model)
    assert getattr(model, "calls", 5) == 5 and not clock.timed
    assert torch.equal(found, plain(model, loader()))
    assert "that of the batches, because" in str(cnnrs.explain(model).preconv_order)


def test_statistics_that_move_are_those_of_the_plain_loop(clock: Clock) -> None:
    ours, theirs = Moving(), Moving()
    assert torch.equal(features(ours), plain(theirs, loader())) and not clock.timed
    assert all(torch.equal(*both) for both in zip(ours.buffers(), theirs.buffers(), strict=True))


@pytest.mark.filterwarnings("ignore:the features of this model are drawn")
def test_draws_are_those_of_the_plain_loop(clock: Clock) -> None:
    model, data = Drawing(), loader()
    torch.manual_seed(7)
    expected = plain(model, data)
    torch.manual_seed(7)
    assert torch.equal(features(model, data), expected) and not clock.timed


def test_what_fails_in_the_trial_is_no_error(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(*_: Any) -> float:
        raise torch.OutOfMemoryError("no memory for two")

    monkeypatch.setattr(memory_order, "_seconds", seconds)
    model = Net()
    assert torch.equal(features(model), plain(model, loader()))


# -- in a folder -------------------------------------------------------------------------------------------------------

NAMES = ("features.npy", "labels.npy", "meta.json")


class Stopped(Exception):
    """As a kill."""


def store(folder: Path, out: Path, model: nn.Module, **options: Any) -> Any:
    return cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), model, out=out, batch_size=4, **options)


def stopped_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """The next `preconv` is stopped when so many batches have been computed."""
    original = memory_order.FrozenOrder.__call__
    left = [batches]

    def call(self: Any, inputs: torch.Tensor) -> Any:
        if left[0] == 0:
            raise Stopped
        left[0] -= 1
        return original(self, inputs)

    monkeypatch.setattr(memory_order.FrozenOrder, "__call__", call)


@pytest.mark.parametrize("wins", [True, False])
@pytest.mark.parametrize("batches", [0, 1, 4])
def test_who_goes_on_computes_in_the_same_order(
    folder: Path, tmp_path: Path, clock: Clock, wins: bool, batches: int
) -> None:
    clock.last_wins = wins
    store(folder, tmp_path / "whole", Net())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stopped_after(patch, batches)
        store(folder, tmp_path / "f", Net())
    # By now the clock would choose the other one.
    clock.last_wins, timed = not wins, len(clock.timed)
    store(folder, tmp_path / "f", Net())
    assert len(clock.timed) == timed
    assert all(filecmp.cmp(tmp_path / "f" / name, tmp_path / "whole" / name, shallow=False) for name in NAMES)
    assert json.loads((tmp_path / "f" / "meta.json").read_text()).get("order") == ("channels_last" if wins else None)


def test_rows_that_get_another_order_are_said(
    folder: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stopped_after(patch, 1)
        store(folder, tmp_path / "f", Net())
    monkeypatch.setattr(memory_order, "_in_channels_last", lambda _: 1 / 0)
    with pytest.warns(UserWarning, match="computed in channels_last, in which the model no longer runs"):
        store(folder, tmp_path / "f", Net())


def test_new_photos_get_the_order_of_the_others(folder: Path, tmp_path: Path, clock: Clock) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    before = store(photos, tmp_path / "f", Net()).features.clone()
    for image in sorted(photos.rglob("*.*"))[:12]:
        shutil.copy(image, image.with_name(f"zz-{image.name}"))
        (image.with_name(f"zz-{image.name}")).write_bytes(image.read_bytes() + b"\0")
    clock.last_wins = False
    made = store(photos, tmp_path / "f", Net())
    assert len(made.features) == len(before) + 12 and len(clock.timed) == 8
    new = [i for i, path in enumerate(made.paths) if Path(path).name.startswith("zz-")]
    batch = torch.stack([cnnrs.ImageFolder(photos, TRANSFORM)[i][0] for i in new[:4]])
    data = [(batch, None)]
    assert torch.equal(made.features[new[:4]], plain(Net(), data, True))
    assert not torch.equal(made.features[new[:4]], plain(Net(), data, False))


def test_a_store_that_began_without_a_choice_goes_on_without(
    folder: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            stopped_after(patch, 3)
            store(folder, tmp_path / "f", Net())
    finally:
        torch.use_deterministic_algorithms(False)
    found = store(folder, tmp_path / "f", Net())
    data = cnnrs.DataLoader(cnnrs.ImageFolder(folder, TRANSFORM), batch_size=4)
    assert torch.equal(found.features, plain(Net(), data)) and not clock.timed


def test_an_engine_by_name_has_a_key_of_its_own(folder: Path, tmp_path: Path, clock: Clock, capsys: Any) -> None:
    store(folder, tmp_path / "f", Net())
    found = store(folder, tmp_path / "f", Net(), engine="python")
    assert "because another engine is asked for" in capsys.readouterr().out
    data = cnnrs.DataLoader(cnnrs.ImageFolder(folder, TRANSFORM), batch_size=4)
    assert torch.equal(found.features, plain(Net(), data))
    assert "order" not in json.loads((tmp_path / "f" / "meta.json").read_text())


def test_other_processes_are_told_the_order(folder: Path, tmp_path: Path, clock: Clock) -> None:
    """Each one's clock might choose otherwise: a worker of Ray has the order that it is given."""
    ray = pytest.importorskip("cnnrs.features.on_ray")
    data = cnnrs.DataLoader(cnnrs.ImageFolder(folder, TRANSFORM), batch_size=4)
    paths = [path for path, _ in data.dataset.samples[:4]]
    for order, last in (("contiguous", False), ("channels_last", True)):
        worker = ray.Extract(Net(), TRANSFORM, batch_size=4, order=order)
        found = torch.from_numpy(worker({"path": paths})["features"])
        assert torch.equal(found, plain(Net(), [next(iter(data))], last))
    assert not clock.timed


def test_a_note_leaves_the_records(folder: Path, tmp_path: Path, clock: Clock) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stopped_after(patch, 4)
        store(folder, tmp_path / "f", Net())
    made = Store(tmp_path / "f")
    before = made.journal()
    made.note({"order": "contiguous"})
    after = made.journal()
    assert before is not None and after is not None and before.runs and after.runs == before.runs
    assert after.header == {**before.header, "order": "contiguous"}
