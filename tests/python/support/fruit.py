"""Pictures of two kinds that any features tell apart, and commands that are run on them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cnnrs.app.cli import main


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


def command(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    """The program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cnnrs", *arguments], capture_output=True, text=True, **{"timeout": 120, **options}
    )  # type: ignore[call-overload, no-any-return]
