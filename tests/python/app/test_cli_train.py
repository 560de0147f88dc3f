"""`cnnrs train`: what a run holds, that features are used again, and every way to get it wrong."""

import csv
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import ResNet18_Weights

import cnnrs
from cnnrs.app.cli import main
from cnnrs.app.cli.commands import parser
from cnnrs.image.reading import SCALES
from fruit import fruit, train


def test_run_folder(workplace: Path) -> None:
    run = workplace / "runs" / "fruit"
    assert sorted(path.name for path in run.iterdir()) == [
        "history.csv",
        "mistakes.csv",
        "model.json",
        "model.safetensors",
        "novelty.safetensors",
        "report.html",
    ]
    card = json.loads((run / "model.json").read_text())
    assert card["classes"] == ["berry", "plum"]
    assert (card["backbone"], card["head"], card["accuracy"]) == ("resnet18", "linear", 100.0)
    assert (card["train_photos"], card["measured_photos"]) == (40, 40)
    preset = ResNet18_Weights.DEFAULT.transforms()
    assert card["transform"] == {
        "resize": preset.resize_size[0], "crop": preset.crop_size[0], "interpolation": preset.interpolation.value,
        "mean": preset.mean, "std": preset.std,
    }  # fmt: skip
    rows = list(csv.DictReader((run / "history.csv").open()))
    assert [row["epoch"] for row in rows] == [str(i) for i in range(1, 31)]
    assert card["epoch"] == 30
    # Another user of the machine may use the model.
    assert (run / "model.safetensors").stat().st_mode == (run / "model.json").stat().st_mode


def test_weights_load_in_plain_pytorch(workplace: Path) -> None:
    model = torchvision.models.resnet18(num_classes=2)
    model.load_state_dict(load_file(workplace / "runs" / "fruit" / "model.safetensors"))
    image = Image.open(workplace / "fruit" / "plum" / "03.jpg").convert("RGB")
    with torch.no_grad():
        expected = model.eval()(ResNet18_Weights.DEFAULT.transforms()(image)[None]).softmax(dim=1)[0]
    run = cnnrs.load_run(workplace / "runs" / "fruit")
    (prediction,), failed = run.predict([workplace / "fruit" / "plum" / "03.jpg"])
    assert failed == []
    assert prediction.label == "plum" == run.classes[int(expected.argmax())]
    # The same network on the same pixels, by another engine: float32 rounding through 18 layers.
    assert prediction.probability == pytest.approx(float(expected.max()), abs=1e-5)


def test_backbone_is_untouched(workplace: Path) -> None:
    before = torch.load(workplace / "weights.pth")
    after = load_file(workplace / "runs" / "fruit" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("fc."))


def test_another_head_reuses_the_features(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = workplace / "runs" / "features" / "fruit-resnet18-weights" / "all" / "features.npy"
    written = store.stat().st_mtime_ns
    assert train(workplace, "runs/mlp", "--head", "mlp", "--epochs", "2") == 0
    assert store.stat().st_mtime_ns == written
    assert "nothing to compute" in capsys.readouterr().out
    run = cnnrs.load_run(workplace / "runs" / "mlp")
    assert [type(layer).__name__ for layer in run.model.fc] == ["Linear", "ReLU", "Dropout", "Linear"]
    predictions, _ = run.predict([workplace / "fruit" / "plum" / "03.jpg"])
    assert len(predictions) == 1


def test_same_seed_same_classifier(workplace: Path) -> None:
    states = []
    for _ in range(2):
        assert train(workplace, "runs/again", "--epochs", "2", "--seed", "7", "--quiet") == 0
        states.append(load_file(workplace / "runs" / "again" / "model.safetensors"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_json_is_all_there_is_on_stdout(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(workplace, "runs/json", "--epochs", "1", "--json") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["measured_photos"] == 40 and result["skipped"] == []
    assert Path(result["report"]).is_file()
    assert "40 photos are few" in printed.err


def test_quiet_is_quiet(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, the result, also where a run is replaced and features are computed."""
    more = ["--epochs", "1", "--quiet", "--features", str(workplace / "quiet-features")]
    for _ in range(2):
        assert train(workplace, "runs/quiet", *more) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"(?:\d+\.\d\d % of 40 photos, [^\n]*\n){2}", printed.out)
    # What has to be said is said.
    assert all(line.startswith("cnnrs train: note: ") for line in printed.err.splitlines())


def test_replacing_a_run_is_said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert train(workplace, "runs/twice", "--epochs", "1") == 0
    assert "replaces the resnet18 of 20" in capsys.readouterr().out


def test_train_and_valid_folders(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fruit(tmp_path / "both" / "train", 6)
    fruit(tmp_path / "both" / "val", 3, seed=1)
    arguments = ["--backbone", "resnet18", "--weights", str(workplace / "weights.pth"), "--epochs", "1"]
    assert main(["train", str(tmp_path / "both"), "--out", str(tmp_path / "run"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "18 photos of berry, plum" in printed and "measuring with" in printed
    assert "linear: epoch 1/1" in printed


def test_bad_photos(workplace: Path, bad_fruit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(bad_fruit), "--backbone", "resnet18", "--weights", str(workplace / "weights.pth")]
    arguments += ["--out", str(tmp_path / "run"), "--epochs", "1", "--valid", "0.25"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "plum/0" in message and "--fix move" in message and "--skip-bad" in message
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--skip-bad"]) == 0
    assert sum(line.startswith("left out ") for line in capsys.readouterr().out.splitlines()) == 2
    assert "Photos that were left out" in (tmp_path / "run" / "report.html").read_text()


def test_classifier_head_is_the_tutorials(tmp_path: Path) -> None:
    fruit(tmp_path / "fruit", 5)
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    arguments = ["train", str(tmp_path / "fruit"), "--backbone", "alexnet", "--weights", str(tmp_path / "alexnet.pth")]
    # One part that measures: with folds the head would be trained six times.
    arguments += ["--test", "0.2", "--out", str(tmp_path / "run"), "--epochs", "1", "--head", "classifier"]
    assert main(arguments) == 0
    state = load_file(tmp_path / "run" / "model.safetensors")
    torchvision.models.alexnet(num_classes=2).load_state_dict(state)
    before = torch.load(tmp_path / "alexnet.pth")
    assert torch.equal(state["features.0.weight"], before["features.0.weight"])
    assert not torch.equal(state["classifier.1.weight"], before["classifier.1.weight"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "there is no such folder"),
        (
            ["fruit/plum/03.jpg"],
            "(pets/cat/1.jpg, pets/dog/2.jpg), or a table (.csv), is wanted",
        ),
        (["fruit", "--backbone", "vgg61"], "vgg16"),
        (["fruit", "--backbone", "squeezenet1_1", "--weights", "squeezenet.pth"], "no linear layer"),
        (["fruit", "--backbone", "resnet18", "--weights", "none.pth"], "none.pth"),
        (["fruit", "--backbone", "resnet18", "--weights", "fruit/plum/03.jpg"], "or give a .pth or .safetensors file"),
        (["fruit", "--backbone", "resnet18", "--weights", "photo.pth"], "cannot be read as weights"),
        (["fruit", "--backbone", "vgg16", "--weights", "weights.pth"], "does not fit"),
        (["fruit", "--backbone", "resnet18", "--weights", "weights.pth", "--head", "classifier"], "VGG or AlexNet"),
        (["fruit", "--valid", "0"], "--valid 0 leaves no photos to choose with"),
        (["fruit", "--device", "abacus"], "--device abacus: expected cpu"),
        (["fruit", "--out", "weights.pth"], "is a file; a folder is wanted"),
        (["fruit", "--out", "fruit"], "holds something else than a run"),
        (["single"], "one class folder only (plum)"),
        (["empty"], "a folder with one folder per class (pets/cat/1.jpg, pets/dog/2.jpg) is wanted"),
        (["few"], "2 photos are too few"),
    ],
)
def test_what_cannot_be_trained(
    arguments: list[str],
    reason: str,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workplace)
    (workplace / "empty").mkdir(exist_ok=True)
    if not (workplace / "single").exists():
        (workplace / "single").mkdir()
        (workplace / "single" / "plum").symlink_to(workplace / "fruit" / "plum")
    if not (workplace / "few").exists():
        fruit(workplace / "few", 1)
    before = sorted(workplace.rglob("*"))
    assert main(["train", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("cnnrs train: ") and reason in message and "Traceback" not in message
    assert sorted(workplace.rglob("*")) == before


def test_disk_that_is_full(workplace: Path) -> None:
    """The weights do not fit: the run that is there stays as it was."""
    assert train(workplace, "runs/full", "--epochs", "1", "--quiet") == 0
    run = workplace / "runs" / "full"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    # A file may have 1 MiB: the features that are there are only read.
    limited = (
        "import resource, sys; from cnnrs.app.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--backbone", "resnet18", "--weights", str(workplace / "weights.pth"), "--out", str(run)]
    done = subprocess.run(
        [sys.executable, "-c", limited, "train", str(workplace / "fruit"), *arguments, "--epochs", "1"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "cnnrs train: " in done.stderr and "model.safetensors cannot be written" in done.stderr
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_unreadable_photo(bad_fruit: Path, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A photo that is gone or may not be read is its own fault, not that of the folder for the features."""
    for name in ("00.jpg", "01.jpg"):
        (bad_fruit / "plum" / name).unlink()
    (bad_fruit / "plum" / "02.jpg").unlink()
    (bad_fruit / "plum" / "02.jpg").symlink_to(tmp_path / "nowhere.jpg")
    arguments = ["train", str(bad_fruit), "--backbone", "resnet18", "--weights", str(workplace / "weights.pth")]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "plum/02.jpg: No such file or directory" in message and "--skip-bad" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(workplace, "runs/cuda", "--device", "cuda") == 2
    assert "finds no usable CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [["--epochs", "0"], ["--epochs", "many"], ["--lr", "0"], ["--valid", "1"], ["--dropout", "-1"], ["--head", "big"]],
)
def test_options_are_checked_first(option: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train(workplace, "runs/none", *option)
    assert stop.value.code == 2
    assert f"argument {option[0]}: " in capsys.readouterr().err


def test_options_are_the_arguments_of_the_function() -> None:
    options = vars(parser().parse_args(["train", "pets"]))
    # What a program reads, and how much it hears, is of the command line alone.
    for name in ("command", "folder", "json", "quiet"):
        del options[name]
    arguments = {name: given.default for name, given in inspect.signature(cnnrs.train).parameters.items()}
    del arguments["data"], arguments["verbose"]
    assert {name: value or None for name, value in options.items()} == {n: v or None for n, v in arguments.items()}


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_an_option(scale: str) -> None:
    assert parser().parse_args(["train", "pets", "--scale", scale]).scale == scale
