"""report.html: what it says, that it needs nothing else, and how a browser shows it."""

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
from cnnrs.app.report.charts import curves, reliability
from cnnrs.app.report.page import MATRIX_CLASSES
from cnnrs.classifier.heads import Preprocessing
from cnnrs.classifier.run_folder import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img"}


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

    def make(classes: list[str], number: int = 60, wrong: int = 14, epochs: int = 12, **changes: Any) -> Path:
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
        run = Run(torch.nn.Identity(), classes, shape, "resnet18")
        stages = {"scan": 0.01, "reading": 1.5, "features": 21.0, "training": 3.2, "validation": 0.4}
        evidence = Evidence(history, min(5, epochs - 1), scores, labels, paths, classes)
        target = tmp_path / "report.html"
        write_report(target, facts, evidence, run, stages, changes.get("skipped", ()))
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
    ):  # fmt: skip
        assert expected in text, expected
    assert page.tags.count("img") == 12 and page.tags.count("svg") == 3


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
    assert "100.00 % right" in text and "None: every validation photo is recognised" in text
    assert "img" not in page.tags


def test_many_classes_are_listed_not_drawn(write: Write) -> None:
    page, text = read(write([f"class{i:02}" for i in range(40)], number=120, wrong=20))
    assert "class00 taken for class01" in text
    assert page.tags.count("table") == 1


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
    done = chromium(tmp_path, setting, "--window-size=1100,3200", f"--screenshot={shot}", page.as_uri())
    with Image.open(shot) as file:
        picture = file.convert("RGB")
    assert picture.size == (1100, 3200), done.stderr[-500:]
    # The corner is paper: white or black by scheme; the curves' two colours are somewhere.
    assert (sum(picture.getpixel((2, 2))) > 600) == (scheme == "light")
    colors = {color for _, color in picture.getcolors(1 << 24)}
    lines = {"light": {(0x2B, 0x6C, 0xB0), (0xC2, 0x57, 0x0C)}, "dark": {(0x6E, 0xA8, 0xE6), (0xF0, 0x96, 0x4A)}}
    assert lines[scheme] <= colors


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize(("name", "width"), [("phone", 390), ("desktop", 1100)])
def test_browser(name: str, width: int, write: Write, tmp_path: Path) -> None:
    """Nothing is wider than the screen, and every chart has a height: asked of the browser's own layout."""
    page = write(["cat", "dog", "rabbit with a very long name indeed", "Averylongsinglewordwithoutanybreakopportunity"])
    probe = (
        "<script>addEventListener('load',()=>{const d=document.documentElement;"
        "const low=[...document.querySelectorAll('svg,img')].filter(e=>e.getBoundingClientRect().height<80).length;"
        "const parts=document.querySelectorAll('section').length;"
        "d.dataset.probe=`${d.scrollWidth<=innerWidth} ${low} ${parts}`})</script>"
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
    assert 'data-probe="true 0 7"' in done.stdout, (
        re.findall(r"data-probe=\S+ \S+ \S+", done.stdout) or done.stderr[-500:]
    )
