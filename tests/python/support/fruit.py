"""Pictures of two kinds that any features tell apart, and commands that are run on them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cnnrs.app.cli import main
from cnnrs.classifier.run_folder import Run


def fruit(root: Path, number: int = 20, seed: int = 0) -> Path:
    """Red and blue pictures: any features tell them apart."""
    rng = np.random.default_rng(seed)
    for name, channel in (("berry", 0), ("plum", 2)):
        (root / name).mkdir(parents=True)
        for i in range(number):
            pixels = rng.integers(0, 60, (40, 50, 3), dtype=np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(root / name / f"{i:02}.jpg")
    return root


def train(place: Path, out: str, *arguments: str) -> int:
    """`cnnrs train` on the fruit of a workplace, without network."""
    fixed = ["--backbone", "resnet18", "--weights", str(place / "weights.pth"), "--out", str(place / out)]
    return main(["train", str(place / "fruit"), *fixed, *arguments])


def plain_answers(run: Run, folder: Path, photo: Path) -> list[tuple[str, float]]:
    """What the recipe that a run prints says about a photo, in a process that knows nothing of cnnrs."""
    _, _, recipe = run.recipe().partition("# without cnnrs\n")
    script = recipe.replace("RUN/", f"{folder}/").replace("photo.jpg", str(photo))
    assert "import cnnrs" not in script
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [(label, float(probability)) for label, probability in map(str.split, done.stdout.splitlines())]


def command(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    """The program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cnnrs", *arguments], capture_output=True, text=True, **{"timeout": 120, **options}
    )  # type: ignore[call-overload, no-any-return]
