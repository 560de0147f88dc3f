"""report.html: what it says, that it needs nothing else, and how a browser shows it."""

import base64
import csv
import io
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cnnrs
from cnnrs.app.report import Evidence, write_report
from cnnrs.app.report.charts import curves, rates, reliability
from cnnrs.app.report.evidence import Curve, HeadRow, Neighbour, Twins, Unknown
from cnnrs.app.report.page import MATRIX_CLASSES
from cnnrs.classifier.heads import Preprocessing
from cnnrs.classifier.run_folder import Run
from cnnrs.training.metrics import wilson
from cnnrs.training.several import several_labels

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Every tag is closed, and every address is data."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a report about random scores, in which the true class has the largest but for the first few photos."""

    def make(
        classes: list[str], number: int = 60, wrong: int = 14, epochs: int = 12, read: Any = None,
        seconds: float = 21.0, **more: Any,
    ) -> Path:  # fmt: skip
        rng = np.random.default_rng(0)
        paths = []
        for i in range(number):
            path = tmp_path / f"photo <{i}>.png"
            Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(path)
            paths.append(str(path))
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(number) % len(classes)
        scores = torch.randn(number, len(classes), generator=generator)
        taken = labels.clone()
        taken[:wrong] = (labels[:wrong] + 1) % len(classes)
        scores[torch.arange(number), taken] += 6
        history = cnnrs.History()
        for epoch in range(epochs):
            valid = 0.9 / (epoch + 1) + 0.03 * max(0, epoch - 6)
            history.append(train=(1 / (epoch + 1), 99 - 30 / (epoch + 1)), valid=(valid, 95 - 20 / (epoch + 1)))
        facts = {
            "data": "/photos/pets & <others>", "train_photos": 240, "valid_photos": number,
            "date": "2026-11-24T11:00:00", "command": "cnnrs train 'pets & <others>' --backbone resnet18",
            "weights": "resnet18 (IMAGENET1K_V1)", "seed": 0, "device": "cpu",
            "versions": {"cnnrs": "0.1.0", "torch": "2.13.0"},
        }  # fmt: skip
        shape = Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        run = Run(torch.nn.Identity(), classes, shape, "resnet18", read=read or {})
        stages = {"scan": 0.01, "reading": 1.5, "features": seconds, "training": 3.2, "validation": 0.4}
        shown = {"scores": scores, "labels": labels, "paths": paths, "classes": classes, **more}
        evidence = Evidence(history, min(5, epochs - 1), **shown)
        target = tmp_path / "report.html"
        write_report(target, facts, evidence, run, stages)
        return target

    return make


def read(path: Path) -> tuple[Checker, str]:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    return checker, " ".join(" ".join(checker.text).split())


def test_content(write: Write) -> None:
    target = write(["cat", "dog", "<b>rabbit</b>"])
    page, text = read(target)
    assert "default-src 'none'" in target.read_text()
    assert page.addresses and all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "a"} & set(page.tags)
    assert "76.67 % right" in text and "46 of 60 validation photos" in text
    for expected in (
        "pets & <others>, classified by resnet18", "<b>rabbit</b>", "cnnrs train 'pets & <others>' --backbone resnet18",
        "best epoch 6 of 12", "The validation loss has begun to rise", "14 photos are wrong",
        "these it was surest about", "computing features 21.0 s", "waiting for photos 1.5 s", "training the head 3.2 s",
        "resnet18 (IMAGENET1K_V1)", "2.13.0", "photo <0>.png", "model = torchvision.models.resnet18(num_classes=3)",
        "as many others would give 65 to 86 %", "Always saying cat would be right for 33.3 %",
        "The weights are those of the epoch that did best on these very photos",
        f"cnnrs predict {target.parent}", f'cnnrs.load_run("{target.parent}")', f'"{target.parent}/model.safetensors"',
    ):  # fmt: skip
        assert expected in text, expected
    assert page.tags.count("img") == 12 and page.tags.count("svg") == 3
    # Nobody has found out about these.
    for unknown in ("Labels that may be wrong", "nearly the same", "Heads that were tried", "Other thresholds"):
        assert unknown not in text


class Suspect:
    """As `cnnrs.classifier.suspects` has it."""

    def __init__(self, row: int, path: str | None) -> None:
        self.row, self.path, self.given, self.proposed, self.probability, self.agreement = (
            row,
            path,
            "a",
            "b",
            0.07,
            0.2,
        )


def test_everything_that_was_found_out(write: Write, tmp_path: Path) -> None:
    names = [str(tmp_path / f"photo <{i}>.png") for i in range(60)]
    line = ([0.0, 0.1, 1.0], [0.0, 0.9, 1.0])
    target = write(
        ["cat", "dog"], measured="test photos", untouched=True, parts={"training": 400, "validation": 90, "test": 60},
        roc=[Curve("dog", *line, 0.912, (0.1, 0.9))], precision_recall=[Curve("dog", *line, 0.934)],
        heads=[HeadRow("logistic, penalty 0.01", 0.1234, 97.5, 1.2, chosen=True), HeadRow("knn, k 5", 0.2, 96, 0.1)],
        why_stopped="Stopped after epoch 12: the validation loss had not fallen for 5 epochs.",
        warnings=["dog has 12 times as many photos as cat", "<i>3 photos</i> are in two classes"],
        suspects=[Suspect(i, names[i]) for i in range(30)],
        twins=[Twins((names[1], names[2]), ("cat", "cat"), 0.999), Twins((names[3], names[4]), ("cat", "dog"), 0.98),
               Twins((names[5], names[6]), ("dog", "dog"), 0.98, ("train", "test"))],
        neighbours={i: [Neighbour(names[20 + k], "dog", 0.9 - k / 10) for k in range(3)] for i in range(14)},
        unknown=Unknown(0.321, 1.5),
    )  # fmt: skip
    page, text = read(target)
    for expected in (
        "46 of 60 test photos; as many others would give 65 to 86 %", "would be right for 50.0 %", "test photos 60",
        "balanced accuracy 76.7 %", "macro F1 76.7 %", "59 to 88", "area under ROC", "dog 0.912 0.934",
        "logistic, penalty 0.01, used 0.1234 97.5 % 1.2 s", "knn, k 5 0.2000 96.0 % 100 ms", "had not fallen for 5",
        "12 times as many photos", "<i>3 photos</i> are in two classes", "30 photos, most suspicious first, 24 of them",
        "a, rather b ? 7 % sure of a, as are 20 % of the photos like it", "3 pairs. 1 of them is in two parts",
        "cat and dog , 0.980 alike", "train and test ,",
        "(novelty above 0.321) is called unknown: 1.5 % of these", "look most alike",
    ):  # fmt: skip
        assert expected in text, expected
    assert "these very photos" not in text
    # Pairs that do the most harm come first.
    assert text.index("cat and dog , 0.980") < text.index("train and test") < text.index("0.999 alike")
    # Twelve mistakes with three neighbours each, 24 suspects, three pairs.
    assert page.tags.count("img") == 12 * 4 + 24 + 6 and page.tags.count("svg") == 5
    assert target.stat().st_size < 2_000_000
    with open(target.with_name("suspects.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == names[:30]
    assert rows[0] == {
        "path": names[0], "label": "a", "proposed": "b", "probability_of_label": "0.070000", "agreement": "0.2000",
    }  # fmt: skip


def test_photos_are_shown_as_the_run_reads_them(write: Write, tmp_path: Path) -> None:
    """The second page, its 16 bits as bytes, turned upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.full((30, 50), 128 * 257, np.uint16)
    other = Image.fromarray(np.zeros_like(values))
    other.save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(values)], exif=exif)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.tif").read_bytes())
    paths = [str(tmp_path / "a.jpg")] * 60
    page, _ = read(write(["cat", "dog"], read={"scale": "full", "page": 1, "exif": True}, paths=paths))
    data = base64.b64decode(page.addresses[0].partition(",")[2])
    with Image.open(io.BytesIO(data)) as shown:
        assert shown.size == (30, 50) and shown.convert("L").getextrema() == (128, 128)


def test_mistakes_are_sorted_by_how_sure_it_was(write: Write) -> None:
    target = write([f"class {i}" for i in range(7)], number=200, wrong=60)
    with open(target.with_name("mistakes.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    sure = [float(row["probability"]) for row in rows]
    # The first 60, and what chance made wrong: every one, the surest first, which is not the order of the losses.
    assert {Path(row["path"]).name for row in rows} >= {f"photo <{i}>.png" for i in range(60)}
    assert sure == sorted(sure, reverse=True)
    assert [float(row["loss"]) for row in rows] != sorted((float(row["loss"]) for row in rows), reverse=True)
    assert all(row["label"] != row["predicted"] for row in rows)
    _, text = read(target)
    shown = [float(found) for found in re.findall(r"([\d.]+)&nbsp;%&nbsp;sure", target.read_text())]
    assert shown == pytest.approx([100 * value for value in sure[:12]], abs=0.051)
    assert f"All {len(rows)} as a table" in text and rows[-1]["path"] in text


def test_tables_have_names_as_they_are(write: Write, tmp_path: Path) -> None:
    target = write(['a,"b"', "c\nd", "\udcff"], wrong=3)
    with open(target.with_name("mistakes.csv"), newline="", encoding="utf-8", errors="surrogateescape") as file:
        names = {row["label"] for row in csv.DictReader(file)}
    assert names == {'a,"b"', "c\nd", "\udcff"}


@pytest.mark.parametrize(
    ("wrong", "number", "expected"),
    [
        (0, 60, []),
        (30, 60, ["No better than always saying cat, which is right for 50.0 %: nothing was learned."]),
        (2, 6, ["May be no better than always saying cat, which is right for 50.0 %"]),
        (60, 60, ["No better than", "2 classes are missed: not one photo of cat, dog is recognised."]),
    ],
)
def test_a_bad_result_does_not_look_like_a_good_one(wrong: int, number: int, expected: list[str], write: Write) -> None:
    target = write(["cat", "dog"], number=number, wrong=wrong)
    found = re.findall(r'<p class="alarm">(.*?)</p>', target.read_text())
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found
    assert ('class="result alarming"' in target.read_text()) == bool(expected)


@pytest.mark.parametrize(("right", "total"), [(46, 60), (0, 9), (9, 9), (1, 1), (99_000, 100_000)])
def test_interval_is_wilsons(right: int, total: int) -> None:
    """Both ends are shares from which the measured one is 1.96 standard deviations away, or the end of the scale."""
    low, high = (end / 100 for end in wilson(right, total))
    for end in (low, high):
        away = abs(right / total - end) / math.sqrt(max(end * (1 - end), 1e-300) / total)
        assert away == pytest.approx(1.959964) or end in (pytest.approx(0, abs=1e-9), pytest.approx(1))
    assert low <= right / total <= high


def test_a_head_without_epochs(write: Write) -> None:
    _, text = read(write(["cat", "dog"], epochs=0, why_stopped=""))
    assert "best epoch" not in text and "loss per photo" not in text


HOSTILE = ["<script>alert(1)</script>", """a & b's "c\"""", "\x1b[2J\n", "\udcff.jpg"]


@pytest.mark.parametrize("number", [0, MATRIX_CLASSES])
def test_names_are_only_ever_text(write: Write, number: int) -> None:
    """In tables, lists and attributes, drawn and listed, and of files that were left out."""
    skipped = [(name, f"{name} is empty") for name in HOSTILE]
    target = write([*HOSTILE, *(f"class {i}" for i in range(number))], skipped=skipped)
    page, text = read(target)
    assert "script" not in page.tags and page.tags.count("svg") == 3
    assert not [name for name in page.attributes if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9:-]*", name)]
    for expected in ("<script>alert(1)</script>", """a & b's "c\"""", "\\udcff.jpg is empty"):
        assert expected in text
    assert "<script" not in target.read_text()


def test_perfect_classifier(write: Write) -> None:
    page, text = read(write(["cat", "dog"], wrong=0))
    assert "100.00 % right" in text and "None: every one of these photos is recognised" in text
    assert "img" not in page.tags


def test_many_classes_are_listed_not_drawn(write: Write) -> None:
    page, text = read(write([f"class{i:02}" for i in range(40)], number=120, wrong=20))
    assert "class00 taken for class01" in text
    # The classes and the mistakes.
    assert page.tags.count("table") == 2


def test_one_epoch_and_lost_photos(write: Write, tmp_path: Path) -> None:
    target = write(["cat", "dog"], epochs=1)
    for photo in tmp_path.glob("*.png"):
        photo.unlink()
    page, text = read(target)
    assert "best epoch 1 of 1" in text
    # The page holds its own thumbnails.
    assert page.tags.count("img") == 12


def test_photos_that_were_left_out(write: Write) -> None:
    _, text = read(write(["cat", "dog"], skipped=[("a.jpg", "the file is empty")] * 70))
    assert "a.jpg: the file is empty" in text and "and 20 more" in text


def test_rates_of_anything() -> None:
    many = [i / 9999 for i in range(10_000)]
    curves = [
        Curve("<b>", many, many, 0.5, (0.5, 0.5)),
        Curve("none", [], [], math.nan),
        Curve("x", [math.nan], [1], 1),
    ]
    svg = rates("ROC", "across", "up", curves, (0.0, 1.0))
    numbers = [float(number) for number in re.findall(r"[ML](-?[\d.]+) ", svg)]
    assert numbers and all(0 <= number <= 260 for number in numbers)
    # Not ten thousand points, but the last.
    assert 100 < len(numbers) < 300 and svg.count("L246.0 14.0") == 2
    assert "<b>" not in svg and "NaN" not in svg


@pytest.mark.parametrize("values", [[math.nan] * 3, [0.0], [0.0, 0.0], [1e-12, 1e9], [math.inf, 0.5, -math.inf], []])
def test_curves_of_anything(values: list[float]) -> None:
    svg = curves("loss", "loss", [("training", "train", values)], 0, 0.0, None)
    numbers = [float(number) for number in re.findall(r'[xy][12]?="(-?[\d.]+)"', svg)]
    assert numbers and all(-1 <= number <= 361 for number in numbers)
    assert "nan" not in svg and "inf" not in svg


def test_ticks_are_labelled_with_their_value() -> None:
    svg = curves("loss", "loss", [("training", "train", [0.9, 0.1])], 0, 0.0, None)
    assert re.findall(r'text-anchor="end">([^<]*)<', svg) == ["0.00", "0.25", "0.50", "0.75", "1.00"]


def test_reliability_of_nothing() -> None:
    assert "circle" not in reliability(cnnrs.training.metrics.Calibration([], 0.0))


def chromium(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    assert CHROMIUM is not None
    fixed = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    return subprocess.run([CHROMIUM, *fixed, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot(scheme: str, write: Write, tmp_path: Path) -> None:
    """What is there to look at: CNNRS_SCREENSHOTS=folder keeps the pictures."""
    page = write(["猫", "a rather long name (with more in brackets)", *(f"class {i}" for i in range(9))])
    shot = Path(os.environ.get("CNNRS_SCREENSHOTS", tmp_path)) / f"report-{scheme}.png"
    setting = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    done = chromium(tmp_path, setting, "--window-size=1100,5000", f"--screenshot={shot}", page.as_uri())
    with Image.open(shot) as file:
        picture = file.convert("RGB")
    assert picture.size == (1100, 5000), done.stderr[-500:]
    # The corner is paper: white or black by scheme; the curves' two colours are somewhere.
    assert (sum(picture.getpixel((2, 2))) > 600) == (scheme == "light")
    colors = {color for _, color in picture.getcolors(1 << 24)}
    lines = {"light": {(0x2B, 0x6C, 0xB0), (0xC2, 0x57, 0x0C)}, "dark": {(0x6E, 0xA8, 0xE6), (0xF0, 0x96, 0x4A)}}
    assert lines[scheme] <= colors


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize(("name", "width"), [("phone", 390), ("desktop", 1280)])
def test_browser(name: str, width: int, write: Write, tmp_path: Path) -> None:
    """Nothing is wider than the screen or its tile, charts have a height, a phone sees less: asked of the browser."""
    page = write(
        ["cat", "dog", "rabbit with a very long name indeed", "Averylongsinglewordwithoutanybreakopportunity"],
        seconds=59 * 60 + 50, parts={"training": 17_500, "validation": 3_750, "test": 3_750},
    )  # fmt: skip
    probe = (
        "<script>addEventListener('load',()=>{const d=document.documentElement;"
        "const seen=[...document.querySelectorAll('details.part > :not(summary)')].filter(e=>e.checkVisibility("
        "{contentVisibilityAuto:true})).length>20;"
        "document.querySelectorAll('details').forEach(e=>e.open=true);"
        "const low=[...document.querySelectorAll('svg,img')].filter(e=>e.getBoundingClientRect().height<80).length;"
        "const over=[...document.querySelectorAll('.tiles dd')].filter(e=>e.scrollWidth>e.clientWidth).length;"
        "d.dataset.probe=`${d.scrollWidth<=innerWidth} ${low} ${over} ${seen}`})</script>"
    )
    source = page.read_text()
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source).replace(
        "</body>", f"{probe}</body>"
    )
    (tmp_path / "probe.html").write_text(source)
    # A frame of the phone's width: headless windows are at least 500 wide.
    frame = f'<iframe id="f" src="probe.html" style="width:{width}px;height:4000px;border:0"></iframe>'
    copy = (
        "<script>addEventListener('load',()=>setTimeout(()=>{document.documentElement.dataset.probe="
        "document.getElementById('f').contentDocument.documentElement.dataset.probe},300))</script>"
    )
    (tmp_path / "frame.html").write_text(f"<!doctype html><body style='margin:0'>{frame}{copy}</body>")
    done = chromium(
        tmp_path, "--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom",
        (tmp_path / "frame.html").as_uri(),
    )  # fmt: skip
    # On a phone most parts are closed until they are wanted.
    assert f'data-probe="true 0 0 {str(name == "desktop").lower()}"' in done.stdout, (
        re.findall(r"data-probe=\S+ \S+ \S+ \S+", done.stdout) or done.stderr[-500:]
    )


def test_several_labels(write: Write, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(60, 3, generator=generator) < torch.tensor([0.5, 0.3, 0.1])).float()
    scores = 4 * labels - 2 + 2 * torch.randn(60, 3, generator=generator)
    classes = ["sea", "sky <1>", "boat"]
    found = several_labels(scores, labels, classes)
    target = write(classes, scores=scores, labels=labels, several=found, measured="test photos", untouched=True)
    _, text = read(target)
    assert f"{found.mean_average_precision:.2f} % mean average precision" in text
    assert "Of 60 test photos, which may have several labels each" in text and "sky <1>" in text
    with open(target.with_name("mistakes.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = (scores.sigmoid() >= 0.5) != (labels > 0)
    assert len(rows) == int(wrong.sum()) and f"{len(rows)} labels are wrong" in text
    far = [abs(float(row["probability"]) - 0.5) for row in rows]
    assert far == sorted(far, reverse=True)
