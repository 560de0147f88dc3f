"""Augmentation: with the same parameters the bytes of torchvision on PIL images, and parameters drawn as it draws."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_parity import apply, assert_same, photo
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode as Mode
from torchvision.transforms import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F2

from cnnrs._util.notes import forget_notes
from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader
from cnnrs.image.lowering import lower
from image_doors import apply_op

# Chance that a right implementation fails one statistical test; the seeds are fixed, so it fails always or never.
FALSE_ALARM = 1e-6


def pictures(count: int = 24) -> Iterable[Image.Image]:
    """Noise, smooth colours, one colour, and single lines."""
    for i in range(count):
        height, width = [(1, 1), (1, 9), (8, 1), (2, 2), (3, 3), (40, 31), (64, 64), (17, 50)][i % 8]
        if i % 3 == 0:
            yield photo(width, height, i)
        elif i % 3 == 1:
            y, x = np.mgrid[0:height, 0:width]
            yield Image.fromarray(np.stack([x * 3 % 256, y * 5 % 256, (x + y) % 256], -1).astype(np.uint8))
        else:
            yield Image.new("RGB", (width, height), (i * 9, 255 - i * 7, 128))


def both(spec: dict[str, Any], expected: Callable[[Image.Image], Image.Image], image: Image.Image) -> None:
    """The same on colour and on gray."""
    assert_same(apply(image, **spec), expected(image), (spec, image.size))
    gray = image.convert("L")
    ours = apply(image, "random_apply", p=1.0, ops=[{"kind": "grayscale", "channels": 1}, spec])
    assert_same(ours, expected(gray), (spec, "gray", image.size))


def adjust(kind: str, factor: float) -> dict[str, Any]:
    """By exactly that factor."""
    return {"kind": kind, "low": factor, "high": factor}


FACTORS = [0.0, 1.0, 0.3, 0.77, 1.5, 2.4, 7.0]
ADJUST: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
}


@pytest.mark.parametrize("name", ADJUST)
def test_factors_equal_torchvision(name: str) -> None:
    draw = random.Random(name)
    for image in pictures():
        for factor in [*FACTORS, draw.uniform(0, 2)]:
            factor = float(np.float32(factor))
            both(adjust(name, factor), lambda image, factor=factor: ADJUST[name](image, factor), image)  # type: ignore[misc]


def test_hue_equals_torchvision() -> None:
    draw = random.Random(0)
    # Every 8-bit colour is too many; a grid of 33^3 and noise meets all branches.
    grid = np.stack(np.meshgrid(*[np.arange(0, 257, 8).clip(0, 255)] * 3), -1).reshape(33, -1, 3).astype(np.uint8)
    for image in [Image.fromarray(grid), *pictures()]:
        for factor in [-0.5, -0.25, -1 / 255, 0.0, 1 / 256, 0.1, 0.5, draw.uniform(-0.5, 0.5)]:
            factor = float(np.float32(factor))
            both(adjust("hue", factor), lambda image, factor=factor: F.adjust_hue(image, factor), image)  # type: ignore[misc]


def test_point_operations_equal_torchvision() -> None:
    for image in pictures():
        both({"kind": "invert"}, F.invert, image)
        both({"kind": "equalize"}, F.equalize, image)
        both({"kind": "autocontrast"}, F.autocontrast, image)
        for bits in range(1, 9):
            spec = {"kind": "posterize", "bits": bits}
            both(spec, lambda image, bits=bits: F.posterize(image, bits), image)  # type: ignore[misc]
        for threshold in (0, 1, 127.5, 128, 255, 256):
            spec = {"kind": "solarize", "threshold": float(threshold)}
            both(spec, lambda image, t=threshold: F.solarize(image, t), image)  # type: ignore[misc]
        for factor in FACTORS:
            spec = {"kind": "sharpness", "factor": factor}
            both(spec, lambda image, f=factor: F.adjust_sharpness(image, f), image)  # type: ignore[misc]


def test_equalize_and_autocontrast_of_photos(photos: Path) -> None:
    for path in sorted(photos.rglob("*.jpg"))[::60]:
        image = Image.open(path).convert("RGB")
        both({"kind": "equalize"}, F.equalize, image)
        both({"kind": "autocontrast"}, F.autocontrast, image)


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
def test_padding_equals_torchvision(mode: str) -> None:
    draw = random.Random(mode)
    for image in pictures(48):
        # Borders wider than the image are mirrored again and again.
        border = [draw.choice([0, 1, 5, 23]) for _ in range(4)]
        fill = tuple(draw.randint(0, 255) for _ in range(3))
        expected = F.pad(image, border, fill, mode)
        assert_same(apply(image, "pad", border=border, fill=fill, mode=mode), expected, (image.size, border, mode))


def affine_ranges(degrees: Any, translate: Any, scale: Any, shear: Any) -> dict[str, Any]:
    """The drawn part of an affine map."""
    return {"kind": "affine", "degrees": degrees, "translate": translate, "scale": scale, "shear": shear}


@pytest.mark.parametrize("version", [F, F2])
@pytest.mark.parametrize("filter", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("center", [None, (3.0, 11.5), (-2.0, 0.0)])
def test_affine_equals_torchvision(version: Any, filter: str, center: tuple[float, float] | None) -> None:
    draw = random.Random(filter)
    for i in range(50):
        image = photo(draw.randint(1, 60), draw.randint(1, 60), i)
        angle = draw.choice([0.0, 90.0, 180.0, draw.uniform(-180, 180)])
        scale = draw.choice([1.0, draw.uniform(0.3, 3)])
        shear = [draw.choice([0.0, draw.uniform(-60, 60)]) for _ in range(2)]
        angle, scale, shear[0], shear[1] = (float(np.float32(v)) for v in (angle, scale, *shear))
        fill = [draw.randint(0, 255) for _ in range(3)]
        ranges = affine_ranges((angle, angle), (0.0, 0.0), (scale, scale), [(v, v) for v in shear])
        expected = version.affine(image, angle, [0, 0], scale, shear, Mode(filter), fill, center)
        spec = {**ranges, "filter": filter, "center": center, "fill": fill, "form": "v2" if version is F2 else "v1"}
        assert_same(apply(image, **spec), expected, (image.size, spec))


@pytest.mark.parametrize("version", [F, F2])
def test_translation_is_one_of_torchvisions(version: Any) -> None:
    image = photo(20, 15, 1)
    shifts = itertools.product(range(-4, 5), range(-3, 4))
    possible = [version.affine(image, 33.0, [x, y], 0.75, [5.0, 0.0], Mode.BILINEAR) for x, y in shifts]
    seen = set()
    for i in range(400):
        ranges = affine_ranges((33.0, 33.0), (0.2, 0.2), (0.75, 0.75), [(5.0, 5.0), (0.0, 0.0)])
        form = "v2" if version is F2 else "v1"
        spec: Any = {**ranges, "filter": "bilinear", "center": None, "fill": [0, 0, 0], "form": form}
        data = apply_op(image.tobytes(), 15, 20, spec, "pillow13", (7, i, 0))[2]
        seen.add(next(k for k, other in enumerate(possible) if other.tobytes() == data))
    assert len(seen) > 60


@pytest.mark.parametrize("expand", [False, True])
def test_bicubic_rotation_equals_torchvision(expand: bool) -> None:
    draw = random.Random(8)
    for i in range(40):
        image = photo(draw.randint(1, 50), draw.randint(1, 50), i)
        angle = float(np.float32(draw.uniform(-180, 180)))
        expected = F.rotate(image, angle, Mode.BICUBIC, expand, None, [1, 2, 3])
        ours = apply(
            image, "rotation", low=angle, high=angle, filter="bicubic", expand=expand, center=None, fill=[1, 2, 3]
        )
        assert_same(ours, expected, angle)


def test_color_jitter_runs_its_four_in_every_order() -> None:
    image = photo(30, 20, 2)
    factors = {"brightness": 1.5, "contrast": 0.5, "saturation": 1.75, "hue": 0.125}
    steps: dict[str, Callable[[Any, float], Any]] = {**ADJUST, "hue": F.adjust_hue}
    possible = {}
    for order in itertools.permutations(factors):
        result = image
        for name in order:
            result = steps[name](result, factors[name])
        possible.setdefault(result.tobytes(), []).append(order)
    transform = v1.ColorJitter(**{name: (v, v) for name, v in factors.items()})
    (spec,) = lower(transform, 3).first.ops
    assert spec["kind"] == "random_order"
    orders = [possible[apply_op(image.tobytes(), 20, 30, spec, "pillow13", (3, i, 0))[2]] for i in range(600)]
    assert len({order[0] for order in orders}) == len(possible) > 12


# -- draws -------------------------------------------------------------------------------------------------------------


def drawn(image: Image.Image, spec: Any, count: int) -> list[np.ndarray]:
    """(H, W, 3) or (H, W) uint8 for `count` samples of one seed."""
    arrays = []
    for i in range(count):
        height, width, data = apply_op(image.tobytes(), image.height, image.width, spec, "pillow13", (5, i, 1))
        arrays.append(np.frombuffer(data, np.uint8).reshape(height, width, -1))
    return arrays


def assert_same_distribution(ours: Iterable[float], theirs: Iterable[float]) -> None:
    """Kolmogorov and Smirnov's test of two samples; ties make it milder, never stricter."""
    a, b = np.sort(list(ours)), np.sort(list(theirs))
    points = np.concatenate([a, b])
    steps = [np.searchsorted(sample, points, "right") / len(sample) for sample in (a, b)]
    distance = float(np.abs(steps[0] - steps[1]).max())
    bound = math.sqrt(-math.log(FALSE_ALARM / 2) / 2 * (len(a) + len(b)) / (len(a) * len(b)))
    assert distance < bound, (distance, bound)


def places(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


RATIOS = [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.5), (1.0, 1.0)), ((0.3, 1.0), (0.2, 0.4)), ((0.9, 1.0), (3.0, 4.0))]


@pytest.mark.parametrize(("scale", "ratio"), RATIOS)
@pytest.mark.parametrize("size", [(200, 120), (64, 220)])
def test_resized_windows_are_drawn_as_torchvision_draws_them(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    image, count = places(*size), 1500
    (spec,) = lower(v1.RandomResizedCrop(256, scale, ratio, Mode.NEAREST), 3).first.ops
    ours = []
    for array in drawn(image, spec, count):
        # Enlarged without mixing, the corners still say where they come from.
        (left, top), (right, bottom) = array[0, 0, :2].tolist(), array[-1, -1, :2].tolist()
        ours.append((top, left, bottom - top + 1, right - left + 1))
    torch.manual_seed(0)
    theirs = [v1.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]  # type: ignore[arg-type]
    for quantity in (lambda t, y, h, w: t, lambda t, y, h, w: y, lambda t, y, h, w: h * w, lambda t, y, h, w: h / w):
        assert_same_distribution([quantity(*p) for p in ours], [quantity(*p) for p in theirs])


def test_crops_are_drawn_as_torchvision_draws_them() -> None:
    image, count = places(40, 30), 3000
    (spec,) = lower(v2.RandomCrop((28, 33)), 3).first.ops
    seen = np.zeros((3, 8))
    for array in drawn(image, spec, count):
        seen[array[0, 0, 1], array[0, 0, 0]] += 1
    expected = count / seen.size
    # 23 degrees of freedom: 84.5 is passed with probability 6e-9.
    assert ((seen - expected) ** 2 / expected).sum() < 84.5


def test_factors_are_drawn_as_torchvision_draws_them() -> None:
    image = Image.new("RGB", (1, 1), (200, 200, 200))
    (spec,) = lower(v1.ColorJitter(brightness=0.5), 3).first.ops
    ours = [int(array[0, 0, 0]) for array in drawn(image, spec, 3000)]
    torch.manual_seed(0)
    jitter = v1.ColorJitter(brightness=0.5)
    assert_same_distribution(ours, [jitter(image).getpixel((0, 0))[0] for _ in range(3000)])


def test_choices_and_applications_are_drawn_with_their_weights() -> None:
    image = Image.new("RGB", (1, 1), (10, 0, 0))
    transform = v2.RandomChoice([v1.RandomInvert(1.0), v1.RandomSolarize(0, 1.0), v2.Identity()], p=[1, 2, 5])
    (choice,) = lower(transform, 3).first.ops
    assert choice["kind"] == "random_choice"
    assert (len(choice["branches"]), choice["branches"][2]) == (3, ())
    branches = [[adjust("brightness", 2.0)], [adjust("brightness", 3.0)], []]
    ours = [int(array[0, 0, 0]) // 10 for array in drawn(image, {**choice, "branches": branches}, 4000)]
    for value, share in ((2, 1 / 8), (3, 2 / 8), (1, 5 / 8)):
        # Binomial: five standard deviations are passed with probability 6e-7.
        assert abs(ours.count(value) - 4000 * share) < 5 * math.sqrt(4000 * share * (1 - share))
    (spec,) = lower(v1.RandomGrayscale(0.3), 3).first.ops
    gray = sum(array[0, 0, 1] > 0 for array in drawn(image, spec, 4000))
    assert abs(gray - 1200) < 5 * math.sqrt(4000 * 0.3 * 0.7)


# -- erasing -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def white(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 white images of 40 x 30."""
    root = tmp_path_factory.mktemp("white")
    (root / "class").mkdir()
    for i in range(600):
        Image.new("RGB", (40, 30), (255, 255, 255)).save(root / "class" / f"{i}.png")
    return root


@pytest.mark.parametrize("spelling", [v1, v2])
def test_erased_rectangles_are_drawn_as_torchvision_draws_them(white: Path, spelling: Any) -> None:
    erasing = spelling.RandomErasing(p=0.7, scale=(0.05, 0.6), ratio=(0.5, 3.0), value=(-1.0, -2.0, -3.0))
    transform = v1.Compose([v1.ToTensor(), erasing])
    assert not lower(transform, 3).python
    torch.manual_seed(1)
    windows = []
    for images, _ in DataLoader(ImageFolder(white, transform), 100, num_workers=2):
        for image in images:
            erased = (image < 0).all(0)
            rows, columns = erased.any(1).nonzero().flatten(), erased.any(0).nonzero().flatten()
            if len(rows):
                values = image[:, rows[0], columns[0]].tolist()
                assert values == [-1.0, -2.0, -3.0] and erased.sum() == len(rows) * len(columns)
                windows.append((int(rows[0]), int(columns[0]), len(rows), len(columns)))
            else:
                assert bool((image == 1).all())
    assert abs(len(windows) - 420) < 5 * math.sqrt(600 * 0.7 * 0.3)
    torch.manual_seed(2)
    blank = torch.ones(3, 30, 40)
    theirs = [v1.RandomErasing.get_params(blank, (0.05, 0.6), (0.5, 3.0), [0.0])[:4] for _ in range(2000)]
    for i in range(4):
        assert_same_distribution([w[i] for w in windows], [t[i] for t in theirs])


def test_erasing_with_noise_bytes_and_behind_normalisation(white: Path) -> None:
    torch.manual_seed(3)
    transform = v1.Compose([v1.ToTensor(), v1.Normalize([0.5] * 3, [0.5] * 3), v1.RandomErasing(1.0, value="random")])
    assert not lower(transform, 3).python
    noise = torch.cat([images[images != 1] for images, _ in DataLoader(ImageFolder(white, transform), 100)])
    theirs = torch.randn(20_000)
    assert_same_distribution(noise[:20_000].tolist(), theirs.tolist())
    bytes_ = v1.Compose([v1.PILToTensor(), v1.RandomErasing(1.0, value=7)])
    assert not lower(bytes_, 3).python
    images, _ = next(iter(DataLoader(ImageFolder(white, bytes_), 10)))
    assert images.dtype == torch.uint8 and set(images.unique().tolist()) == {7, 255}
    table = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.RandomErasing(1.0, value=0.5)])
    assert not lower(table, 3).python and lower(table, 3).first.finish["kind"] == "table"  # type: ignore[index]
    images, _ = next(iter(DataLoader(ImageFolder(white, table), 10)))
    assert set(images.unique().tolist()) == {0.5, 1.0}


def test_what_follows_erasing_stays_in_python() -> None:
    for follower in (v1.RandomHorizontalFlip(), v1.Normalize([0.5] * 3, [0.5] * 3), v1.RandomErasing()):
        transform = v1.Compose([v1.ToTensor(), v1.RandomErasing(), follower])
        forget_notes()
        with pytest.warns(UserWarning, match="in Python"):
            assert lower(transform, 3).python == (follower,)


# -- keys --------------------------------------------------------------------------------------------------------------


def everything(spelling: Any) -> Any:
    """Every random operation at once, ending in 24 x 20."""
    jitter = spelling.ColorJitter(0.4, 0.4, 0.4, 0.1)
    shake = spelling.RandomAffine(20, (0.1, 0.2), (0.8, 1.2), (-5, 5, -3, 3), Mode.BILINEAR, fill=3)
    return v1.Compose(
        [
            spelling.RandomApply([spelling.RandomRotation(30, Mode.BICUBIC), jitter], p=0.8),
            spelling.RandomChoice([spelling.RandomEqualize(), spelling.RandomAutocontrast(), spelling.RandomInvert()]),
            spelling.RandomOrder([spelling.RandomPosterize(3), spelling.RandomSolarize(100), shake]),
            spelling.RandomCrop(24, padding=(1, 2), pad_if_needed=True, padding_mode="edge"),
            spelling.RandomResizedCrop((24, 20)),
            spelling.RandomAdjustSharpness(2.0),
            spelling.RandomGrayscale(),
            spelling.RandomHorizontalFlip(),
            spelling.RandomVerticalFlip(),
            v1.ToTensor(),
            spelling.RandomErasing(value="random"),
        ]
    )


@pytest.mark.parametrize("spelling", [v1, v2])
def test_threads_change_nothing_and_epochs_do(spelling: Any, folder: Path) -> None:
    transform = everything(spelling)
    lowered = lower(transform, 3)
    assert not lowered.python and lowered.first.finish == {"kind": "float"}

    def epochs(num_workers: int, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        loader = DataLoader(ImageFolder(folder, transform), 5, num_workers=num_workers)
        return [torch.cat([images for images, _ in loader]) for _ in range(2)]

    inline = epochs(0, 4)
    for num_workers in (1, 3):
        assert all(torch.equal(a, b) for a, b in zip(inline, epochs(num_workers, 4), strict=True))
    assert not torch.equal(inline[0], inline[1])
    assert not torch.equal(inline[0], epochs(0, 5)[0])


def test_an_erased_rectangle_behind_a_resize_is_where_it_is_without_one(white: Path) -> None:
    # A resize in the last place writes into the batch while it runs, unless something is to be erased afterwards.
    erasing = v1.RandomErasing(p=0.7, value=(-1.0, -2.0, -3.0))
    found = []
    for resize in ([], [v1.Resize((30, 40))], [v1.Resize((15, 20)), v1.Resize((30, 40))]):
        torch.manual_seed(1)
        dataset = ImageFolder(white, v1.Compose([*resize, v1.ToTensor(), erasing]))
        found.append(torch.cat([images for images, _ in DataLoader(dataset, 100, num_workers=2)]))
    assert (found[0] < 0).any() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
