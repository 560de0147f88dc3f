"""`cnnrs train --finetune`: what the run of a fine-tuned network holds, what is refused, and that nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cnnrs
from cnnrs.app.cli import main
from cnnrs.app.jobs import finetune
from cnnrs.app.jobs import train as job
from cnnrs.classifier.finetune import Plan, Tuned, described, unfinished
from cnnrs.classifier.neighbours import unit
from cnnrs.classifier.run_folder import Run, load_run
from cnnrs.training.history import History
from fruit import fruit, train

# 28 photos train, 4 choose and 8 measure: an epoch has one step.
PARTS = ["--test", "0.2", "--valid", "0.1"]


@pytest.fixture(scope="module")
def tuned(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose network was fine-tuned, and what was said: its head had one step only, so there was much to gain."""
    patch, said = pytest.MonkeyPatch(), []
    patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    try:
        assert train(workplace, "runs/tuned", *PARTS, "--epochs", "1", "--finetune", "last") == 0
    finally:
        patch.undo()
    return workplace / "runs" / "tuned", "\n".join(said)


def test_the_run(tuned: tuple[Path, str], workplace: Path) -> None:
    place, said = tuned
    card = json.loads((place / "model.json").read_text())
    facts = card["finetune"]
    assert (facts["which"], facts["block"], facts["kept"]) == ("last", "layer4.1", True)
    assert facts["after"]["loss"] < facts["before"]["loss"]
    assert "fine-tuning layer4.1 and all behind it (4.7 of 11 million weights)" in said
    assert "on 28 photos: 1 epoch of 1 step, about " in said
    # The last block has learnt, all before it and the statistics are the pretrained ones.
    before, after = torch.load(workplace / "weights.pth"), load_file(place / "model.safetensors")
    changed = {name for name in before if not name.startswith("fc") and not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[0] for name in changed} == {
        "layer4.1.conv1", "layer4.1.bn1", "layer4.1.conv2", "layer4.1.bn2",
    }  # fmt: skip
    assert not [name for name in changed if "running" in name]
    # Epochs of both stages.
    assert len((place / "history.csv").read_text().splitlines()) == 1 + 1 + facts["epochs"]
    page = (place / "report.html").read_text()
    assert "fine-tuned layer4.1 and all behind it" in page and f"{facts['after']['loss']:.4f} after" in page


def test_what_depends_on_the_network_is_of_the_new_one(tuned: tuple[Path, str], workplace: Path) -> None:
    run = load_run(tuned[0])
    files = sorted((workplace / "fruit").rglob("*.jpg"))
    loader = cnnrs.DataLoader(cnnrs.ImageList(files, run.transform), batch_size=8, **run.read)
    body, head = run.halves()
    rows = cnnrs.preconv(loader, body, verbose=False).features
    pretrained = cnnrs.backbone("resnet18", weights=str(workplace / "weights.pth"))
    others = cnnrs.preconv(loader, pretrained, verbose=False).features
    assert run.novelty is not None
    known = run.novelty.rows.float()

    def apart(features: torch.Tensor) -> float:
        """How far the photo that is remembered worst is from all of these."""
        return float((known[:, None] - unit(features)[None]).abs().amax(dim=2).amin(dim=1).max())

    # Numbers below 1/4 in half precision are off by 2**-14 at most; the engine's rounding is a fraction of that.
    assert apart(rows) < 2**-13 < apart(others)
    predictions, _ = run.predict(files, verbose=False)
    with torch.no_grad():
        assert [one.label for one in predictions] == [run.classes[number] for number in head(rows).argmax(dim=1)]


def test_it_is_measured_anew(tuned: tuple[Path, str], workplace: Path) -> None:
    """The mistakes and the accuracy are those of the network that is kept."""
    place = tuned[0]
    run = load_run(place)
    (share,) = {line.split(" %")[0] for line in tuned[1].splitlines() if " test photos are right" in line}
    assert float(share) == pytest.approx(run.accuracy, abs=0.005)
    wrong = [line.split(",")[0] for line in (place / "mistakes.csv").read_text().splitlines()[1:]]
    assert len(wrong) == round(8 * (1 - run.facts["accuracy"] / 100))


def test_without_cnnrs(tuned: tuple[Path, str], workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, photo = load_run(tuned[0]), workplace / "fruit" / "plum" / "03.jpg"
    _, _, recipe = run.recipe(str(tuned[0]), str(photo)).partition("# without cnnrs\n")
    exec(compile(recipe, "recipe", "exec"), {})
    label, probability = capsys.readouterr().out.split()
    (ours,), _ = run.predict([photo], verbose=False)
    assert label == ours.label and float(probability) == pytest.approx(ours.probability, abs=1e-4)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fruit(tmp_path_factory.mktemp("few") / "few", 8)


def options(workplace: Path, few: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "data": few, "backbone": "resnet18", "weights": str(workplace / "weights.pth"), "test": 0.25,
        "features": few.parent / "features", "out": tmp_path / "run", "verbose": False, "epochs": 1, **more,
    }  # fmt: skip


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds less."""
    monkeypatch.setattr(job, "write_report", lambda *_: None)


def test_the_head_alone_where_that_is_no_worse(workplace: Path, few: Path, tmp_path: Path, no_report: None) -> None:
    """A learning rate at which nothing moves: a tie."""
    run = cnnrs.train(**options(workplace, few, tmp_path, lr=1e-12, finetune="all"))
    before = torch.load(workplace / "weights.pth")
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("fc"))
    facts = load_run(tmp_path / "run").facts["finetune"]
    assert (facts["which"], facts["kept"], run.facts["epochs"]) == ("all", False, 1)
    assert described(facts).endswith("That is not smaller by more than 0.0001: the first stage is kept")


def test_stopped(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill leaves the first stage, whole; Ctrl-C that and its report."""
    there: list[Run] = []

    def stop(*_: object) -> None:
        there.append(load_run(tmp_path / "run"))
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "fine_tune", stop)
    given = ["--weights", str(workplace / "weights.pth"), "--features", str(workplace / "runs" / "features")]
    given += ["--backbone", "resnet18", "--out", str(tmp_path / "run"), "--epochs", "1", *PARTS]
    assert main(["train", str(workplace / "fruit"), *given, "--finetune", "last"]) == 130
    assert f"stopped; {tmp_path / 'run'} holds the first stage" in capsys.readouterr().err
    (killed,), stopped = there, load_run(tmp_path / "run")
    assert killed.accuracy == stopped.accuracy and killed.facts == stopped.facts
    assert stopped.facts["finetune"] == {"which": "last", "kept": False, "stopped": "interrupted"}
    assert "Fine-tuning was interrupted" in (tmp_path / "run" / "report.html").read_text()


def test_stopped_when_the_network_has_changed_already(
    workplace: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "preconv", stop)
    # A run is there: the first stage is not written before it is known what takes its place.
    cnnrs.train(**options(workplace, few, tmp_path))
    with pytest.raises(KeyboardInterrupt, match="holds the first stage"):
        cnnrs.train(**options(workplace, few, tmp_path, finetune="last", force=True))
    before, after = torch.load(workplace / "weights.pth"), load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("fc"))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"finetune": "first"}, "finetune must be one of last, all"),
        ({"finetune": "last", "head": "knn"}, "nothing that could be trained together with the network; take linear"),
        ({"finetune": "all", "test": None}, "say what measures: --test 0.2, or a folder"),
    ],
)
def test_what_is_refused_before_anything_takes_time(
    more: dict[str, Any], reason: str, workplace: Path, few: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        cnnrs.train(**options(workplace, few, tmp_path, features=tmp_path / "features", **more))
    assert not list(tmp_path.iterdir())


def test_photos_without_a_group_are_groups_of_their_own() -> None:
    bursts = [f"burst {i % 10}" for i in range(100)]
    paths = [str(i) for i in range(1000)]
    finetune.check_parts([None] * 1000, bursts + [""] * 900, paths, None)
    with pytest.raises(ValueError, match=r"1,000 photos in 11 groups are few \(300 and 20 at least\)"):
        finetune.check_parts([None] * 1000, bursts + ["others"] * 900, paths, None)


def test_features_are_computed_where_the_network_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Any] = []

    class Net(torch.nn.Flatten):
        def to(self, *to: Any, **_: Any) -> Net:
            places.extend(to)
            return self

        def cpu(self) -> Net:
            places.append("cpu")
            return self

        def halves(self) -> tuple[Net, None]:
            return self.model, None

    run = Net()
    run.model = Net()
    monkeypatch.setattr(finetune, "preconv", lambda *_, **more: places.append(more["out"]))
    finetune._features(run, None, torch.device("cuda"), tmp_path, False)  # type: ignore[arg-type]
    assert places == [torch.device("cuda"), tmp_path / "all", "cpu"]


@pytest.fixture
def better(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second stage that takes no time: the head's biases grow by one."""

    def tune(model: Any, head: str, kind: str, which: Any, *_: Any) -> Tuned:
        def move(by: int) -> None:
            with torch.no_grad():
                model.fc.bias.add_(by)

        history, plan = History(), Plan(which, "layer4.1", 1, 2, 1, 1, (1e-5, 1e-4), (0.5, 50.0), 1.0)
        history.append(train=(0.4, 50.0), valid=(0.4, 50.0))
        move(1)
        return Tuned(plan, True, "", history, undo=lambda: move(-1))

    monkeypatch.setattr(finetune, "fine_tune", tune)


@pytest.mark.parametrize(
    ("where", "error", "there"),
    [
        ("print", BrokenPipeError, False),
        ("_novelty", KeyboardInterrupt, False),
        ("write_report", RuntimeError, False),
        ("write_report", RuntimeError, True),
    ],
)
def test_whatever_ends_the_second_stage(
    where: str, error: type[BaseException], there: bool, workplace: Path, few: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, no_report: None, better: None, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What is in the folder is the first stage, with a report, and the same command begins anew."""
    if there:
        cnnrs.train(**options(workplace, few, tmp_path, seed=1))
    calls, reports = list[str](), list[Any]()
    monkeypatch.setattr(job, "write_report", lambda path, facts, *_: reports.append(facts))
    own = print if where == "print" else getattr(job, where)
    # The first stage is made before; a report is that of the second first.
    fatal = 2 if where == "_novelty" else 1

    def fail(*words: Any, **more: Any) -> Any:
        if where != "print" or str(words[0]).startswith("fine-tuned"):
            calls.append(where)
            if len(calls) == fatal:
                raise error("out of memory")
        return own(*words, **more)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.print" if where == "print" else f"{job.__name__}.{where}", fail)
        with pytest.raises(error):
            cnnrs.train(**options(workplace, few, tmp_path, finetune="last", force=True, verbose=where == "print"))
    run = load_run(tmp_path / "run")
    assert run.facts["finetune"] == reports[-1]["finetune"] == unfinished("last")
    assert float(run.model.fc.bias.detach().abs().max()) < 0.5  # type: ignore[operator, union-attr]
    assert ("a smaller --batch-size" in capsys.readouterr().err) == (error is RuntimeError)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not list(few.parent.rglob("fine-tuned-*"))
    if there or where != "print":
        return
    # As good as this none can be: the photos that measure would keep it.
    card = json.loads((tmp_path / "run" / "model.json").read_text())
    (tmp_path / "run" / "model.json").write_text(json.dumps({**card, "accuracy": 101.0}))
    done = cnnrs.train(**options(workplace, few, tmp_path, finetune="last"))
    assert done.folder == tmp_path / "run" and done.facts["finetune"]["kept"]
    assert float(done.model.fc.bias.detach().min()) > 0.5  # type: ignore[operator, union-attr]
