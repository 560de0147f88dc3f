"""Both of torchvision's interfaces, each operation with every kind of its parameters: each as its own torchvision."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_image_parity import apply, assert_same, photo
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode as Mode
from torchvision.transforms import v2

from cnnrs.image.lowering import lower

MAPS = [Mode.NEAREST, Mode.BILINEAR, Mode.BICUBIC]
FILTERS = [*MAPS, Mode.NEAREST_EXACT, Mode.BOX, Mode.HAMMING, Mode.LANCZOS]
MODES = ["constant", "edge", "reflect", "symmetric"]
Draw = random.Random


def fill(draw: Draw) -> Any:
    return draw.choice([0, 77, 3.9, (1, 2, 3), [250.5, 0.2, 9.0], (5,), None])


def angle(draw: Draw) -> float:
    return draw.choice([0, 30, 45, 90, 180, 270, -33.5, draw.uniform(-400, 400)])


def center(draw: Draw) -> Any:
    return draw.choice([None, (0, 0), (7, 3), (2.5, -4.0)])


def side(draw: Draw) -> int:
    return draw.choice([1, 2, 7, 16, 31, 40])


# Both versions of one operation, with nothing left to chance.
OPS: dict[str, Callable[[Any, Draw], Any]] = {
    "Resize": lambda v, d: v.Resize((side(d), side(d)), d.choice(FILTERS), antialias=True),
    "Resize of the shorter edge": lambda v, d: v.Resize(side(d), d.choice(FILTERS), d.choice([None, 60])),
    "CenterCrop": lambda v, d: v.CenterCrop(d.choice([side(d), (side(d), side(d))])),
    "Pad": lambda v, d: v.Pad([side(d) for _ in range(d.choice([1, 2, 4]))], fill(d) or 0, d.choice(MODES)),
    # Of the size that is there behind the padding: any window is the whole.
    "RandomCrop": lambda v, d: v.RandomCrop((24, 26), (2, 1, 4, 5), False, fill(d) or 0, d.choice(MODES)),
    "RandomCrop of a whole": lambda v, d: v.RandomCrop((18, 20), None, True, 7),
    "RandomResizedCrop": lambda v, d: v.RandomResizedCrop(side(d), (1, 1), (20 / 18, 20 / 18), d.choice(FILTERS)),
    "RandomResizedCrop that does not fit": lambda v, d: v.RandomResizedCrop(
        side(d), (9, 9), d.choice([(3, 3), (0.2, 0.2)])
    ),
    "RandomHorizontalFlip": lambda v, d: v.RandomHorizontalFlip(d.choice([0, 1])),
    "RandomVerticalFlip": lambda v, d: v.RandomVerticalFlip(d.choice([0, 1])),
    "RandomRotation": lambda v, d: v.RandomRotation(
        (a := angle(d), a), d.choice(MAPS), d.choice([False, True]), center(d), fill(d) or 0
    ),
    "RandomAffine": lambda v, d: v.RandomAffine(
        (a := angle(d), a),
        (0, 0),
        (s := d.choice([1, 0.9, d.uniform(0.2, 3)]), s),
        d.choice([None, (5, 5), (k := d.uniform(-60, 60), k, -9.5, -9.5)]),
        d.choice(MAPS),
        fill(d) or 0,
        center(d),
    ),
    "Grayscale": lambda v, d: v.Grayscale(d.choice([1, 3])),
    "RandomGrayscale": lambda v, d: v.RandomGrayscale(1),
    "ColorJitter": lambda v, d: v.ColorJitter(
        **{d.choice(["brightness", "contrast", "saturation"]): (f := d.choice([0, 0.5, d.uniform(0, 3)]), f)}
    ),
    "ColorJitter of hue": lambda v, d: v.ColorJitter(hue=(f := d.choice([-0.5, 0.5, d.uniform(-0.5, 0.5)]), f)),
    "RandomAdjustSharpness": lambda v, d: v.RandomAdjustSharpness(d.choice([0, 1, 2, d.uniform(0, 9)]), 1),
    "RandomInvert": lambda v, d: v.RandomInvert(1),
    "RandomSolarize": lambda v, d: v.RandomSolarize(d.choice([0, 128, 255.5, d.uniform(0, 256)]), 1),
    "RandomPosterize": lambda v, d: v.RandomPosterize(d.randint(1, 8), 1),
    "RandomEqualize": lambda v, d: v.RandomEqualize(1),
    "RandomAutocontrast": lambda v, d: v.RandomAutocontrast(1),
}


def run(image: Image.Image, step: Any) -> np.ndarray | None:
    """What Rust makes of it; None when the step is left to Python."""
    gray = image.mode == "L"
    lowered = lower(step, 1 if gray else 3)
    if lowered.python:
        return None
    specs = list(lowered.first.ops)
    # One list of operations, so that gray stays gray between them.
    before = [{"kind": "grayscale", "channels": 1}] if gray else []
    return apply(image.convert("RGB"), "random_apply", p=1.0, ops=[*before, *specs])


def steps(name: str, version: Any) -> Iterator[Any]:
    draw = random.Random(name)
    for _ in range(60):
        yield OPS[name](version, draw)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", [v1, v2])
@pytest.mark.parametrize("name", OPS)
def test_each_operation_equals_its_own_torchvision(name: str, version: Any) -> None:
    native = 0
    for i, step in enumerate(steps(name, version)):
        for image in (photo(20, 18, i), photo(20, 18, i).convert("L")):
            ours = run(image, step)
            try:
                theirs = step(image)
            except (TypeError, ValueError):
                # A fill of three channels for a gray picture, and the like.
                assert ours is None, (step, image.mode)
                continue
            if ours is not None:
                native += 1
                assert_same(ours, theirs, (i, step, image.mode))
    assert native >= 55


def test_padding_twice_is_left_to_torchvision_where_it_shows() -> None:
    image = photo(9, 7, 1)
    for version, mode in itertools.product((v1, v2), MODES):
        step = version.RandomCrop((31, 33), 4, True, 0, mode)
        assert (run(image, step) is None) == (version is v2 and mode in ("reflect", "symmetric"))
