"""Lowering: what Rust runs equals what torchvision runs, and everything else stays in Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import datasets, models, tv_tensors
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode as Mode
from torchvision.transforms import v2

from cnnrs._util.notes import forget_notes
from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader
from cnnrs.image import lowering as lowering
from cnnrs.image.lowering import lower

pytestmark = pytest.mark.filterwarnings("ignore:cnnrs.DataLoader.* in Python")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

NATIVE: dict[str, Any] = {
    "tutorial": v1.Compose([v1.Resize((24, 20)), v1.ToTensor(), v1.Normalize(MEAN, STD)]),
    "float": v1.Compose([v1.Resize((24, 20)), v1.ToTensor()]),
    "uint8": v1.Compose([v1.Resize([24, 20]), v1.PILToTensor()]),
    "imagenet": v1.Compose([v1.Resize(40), v1.CenterCrop(32), v1.ToTensor(), v1.Normalize(MEAN, STD)]),
    "crop larger than the image": v1.Compose([v1.CenterCrop((90, 30)), v1.ToTensor()]),
    "nested": v1.Compose([v1.Compose([v1.Resize((24, 20))]), v1.Compose([v1.Compose([v1.ToTensor()])])]),
    "sequential": v1.Compose([torch.nn.Sequential(v1.Resize((24, 20)), torch.nn.Identity()), v1.ToTensor()]),
    "max_size": v1.Compose([v1.Resize(30, max_size=31), v1.CenterCrop(20), v1.ToTensor()]),
    **{
        f"filter {mode.value}": v1.Compose([v1.Resize((24, 20), mode), v1.ToTensor()])
        for mode in (
            Mode.NEAREST,
            Mode.NEAREST_EXACT,
            Mode.BILINEAR,
            Mode.BICUBIC,
            Mode.BOX,
            Mode.HAMMING,
            Mode.LANCZOS,
        )
    },
    "Pillow's number": v1.Compose([v1.Resize((24, 20), 3), v1.ToTensor()]),
    "gray": v1.Compose([v1.Grayscale(), v1.Resize((24, 20)), v1.ToTensor(), v1.Normalize((0.1307,), (0.3081,))]),
    "gray, three channels": v1.Compose([v1.Resize((24, 20)), v1.Grayscale(3), v1.ToTensor()]),
    "gray and back": v1.Compose([v1.Grayscale(), v1.Grayscale(3), v1.Resize((24, 20)), v1.ToTensor()]),
    "one mean for all": v1.Compose([v1.Resize((24, 20)), v1.ToTensor(), v1.Normalize(0.5, 0.25)]),
    "mean as tensor": v1.Compose([v1.Resize((24, 20)), v1.ToTensor(), v1.Normalize(torch.tensor(MEAN), STD, True)]),
    "normalised twice": v1.Compose(
        [v1.Resize((24, 20)), v1.ToTensor(), v1.Normalize(MEAN, STD), v1.Normalize(STD, MEAN)]
    ),
    "convert": v1.Compose([v1.Resize((24, 20)), v1.PILToTensor(), v1.ConvertImageDtype(torch.float32)]),
    "certain flips": v1.Compose(
        [v1.Resize((24, 20)), v1.RandomHorizontalFlip(1), v1.RandomVerticalFlip(1), v1.ToTensor()]
    ),
    "flip of the tensor": v1.Compose(
        [v1.Resize((24, 20)), v1.ToTensor(), v1.RandomHorizontalFlip(1), v1.Normalize(MEAN, STD)]
    ),
    "impossible flips": v1.Compose(
        [v1.Resize((24, 20)), v1.RandomHorizontalFlip(0), v1.RandomVerticalFlip(0), v1.ToTensor()]
    ),
    "certain angle": v1.Compose([v1.Resize((24, 20)), v1.RandomRotation((30, 30)), v1.ToTensor()]),
    "certain angle, all options": v1.Compose(
        [
            v1.Resize((24, 20)),
            v1.RandomRotation((-20, -20), Mode.BILINEAR, center=(3, 4), fill=(9, 200, 30)),
            v1.ToTensor(),
        ]
    ),
    "right angle, expanded": v1.Compose([v1.Resize((24, 20)), v1.RandomRotation((90, 90), expand=True), v1.ToTensor()]),
    "v2": v2.Compose(
        [v2.Resize((24, 20)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    ),
    "v2 pure": v2.Compose(
        [v2.Resize(30), v2.CenterCrop(20), v2.ToImage(), v2.ToDtype(torch.float32, True), v2.ToPureTensor()]
    ),
    "v2 uint8": v2.Compose([v2.Resize((24, 20), Mode.BICUBIC), v2.ToImage()]),
    "v2 not scaled": v2.Compose([v2.Resize((24, 20), 2), v2.PILToTensor(), v2.ToDtype(torch.float32)]),
    "v2 mixed": v1.Compose(
        [
            v2.Grayscale(3),
            v1.Resize((24, 20)),
            v2.RandomHorizontalFlip(1.0),
            v2.RandomRotation((5, 5), fill=7),
            v1.ToTensor(),
        ]
    ),
    "padding": v1.Compose(
        [v1.Resize((24, 20)), v1.Pad((1, 2), (9, 8, 7)), v1.Pad(3, padding_mode="edge"), v1.ToTensor()]
    ),
    "v2 padding": v2.Compose([v2.Resize((24, 20)), v2.Pad([1, 2, 3, 4], padding_mode="reflect"), v2.ToImage()]),
    "crop without choice": v1.Compose(
        [
            v1.Resize((24, 20)),
            v1.RandomCrop((28, 22), padding=(1, 2), fill=5),
            v1.RandomResizedCrop(9, (1, 1), (1, 1)),
            v1.ToTensor(),
        ]
    ),
    "v2 crop without choice": v2.Compose([v2.Resize((24, 20)), v2.RandomCrop((28, 22), (1, 2), fill=5), v2.ToImage()]),
    "certain map": v1.Compose(
        [
            v1.Resize((24, 20)),
            v1.RandomAffine((9, 9), None, (0.5, 0.5), (3, 3, 7, 7), Mode.BICUBIC, (1, 2, 3), (4, 5)),
            v1.ToTensor(),
        ]
    ),
    "v2 certain map": v2.Compose([v2.Resize((24, 20)), v2.RandomAffine((9, 9), shear=(3, 3), fill=[7]), v2.ToImage()]),
    "one certain adjustment": v1.Compose([v1.Resize((24, 20)), v1.ColorJitter(hue=(0.2, 0.2)), v1.ToTensor()]),
    "v2 certain adjustment": v2.Compose([v2.Resize((24, 20)), v2.ColorJitter(saturation=(1.5, 1.5)), v2.ToImage()]),
    "adjustments of gray": v1.Compose(
        [v1.Grayscale(), v1.Resize((24, 20)), v1.ColorJitter(contrast=(0.5, 0.5)), v1.RandomEqualize(1), v1.ToTensor()]
    ),
    "points": v1.Compose(
        [
            v1.Resize((24, 20)),
            v1.RandomInvert(1),
            v1.RandomSolarize(99, 1),
            v1.RandomPosterize(5, 1),
            v1.RandomAutocontrast(1),
            v1.RandomAdjustSharpness(3, 1),
            v1.RandomEqualize(1),
            v1.RandomGrayscale(1),
            v1.ToTensor(),
        ]
    ),
    "v2 points": v2.Compose(
        [
            v2.Resize((24, 20)),
            v2.RandomInvert(1),
            v2.RandomSolarize(99, 1),
            v2.RandomPosterize(5, 1),
            v2.RandomAutocontrast(1),
            v2.RandomAdjustSharpness(3, 1),
            v2.RandomEqualize(1),
            v2.RandomGrayscale(1),
            v2.ToImage(),
        ]
    ),
    "groups without choice": v1.Compose(
        [
            v1.Resize((24, 20)),
            v1.RandomApply([v1.Compose([v1.Pad(2), v1.RandomInvert(1)])], p=1.0),
            v1.RandomApply(torch.nn.ModuleList([v1.Pad(9)]), p=-1.0),
            v1.RandomChoice([v1.CenterCrop((20, 18)), v1.Pad(3)], p=[1, 0]),
            v1.RandomOrder([v1.RandomSolarize(77, 1)]),
            v1.ToTensor(),
        ]
    ),
    "v2 groups without choice": v2.Compose(
        [
            v2.Resize((24, 20)),
            v2.RandomApply([v2.Pad(2), v2.RandomInvert(1)], p=1.0),
            v2.RandomChoice([v2.CenterCrop((20, 18)), v2.Pad(3)], p=[1, 0]),
            v2.RandomOrder([v2.RandomSolarize(77, 1)]),
            v2.RGB(),
            v2.ToImage(),
        ]
    ),
    "gray and back, v2": v2.Compose([v2.Grayscale(), v2.Resize((24, 20)), v2.RGB(), v2.ToImage()]),
    "nothing erased": v1.Compose([v1.Resize((24, 20)), v1.ToTensor(), v1.RandomErasing(0), torch.nn.Identity()]),
    "preset": models.VGG16_Weights.IMAGENET1K_V1.transforms(crop_size=20, resize_size=24),
    "preset bicubic": models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.transforms(crop_size=20, resize_size=24),
}


@pytest.mark.parametrize("name", NATIVE)
def test_native_chains_equal_torchvision(name: str, folder: Path, assert_equal: Callable[..., None]) -> None:
    transform = NATIVE[name]
    lowered = lower(transform, 3)
    assert lowered.python == () and lowered.first.finish is not None
    theirs = list(TorchDataLoader(datasets.ImageFolder(folder, transform), 7))
    assert_equal(list(DataLoader(ImageFolder(folder, transform), 7, num_workers=2)), theirs)


@pytest.mark.parametrize("name", ["tutorial", "imagenet", "v2", "preset", "gray", "filter lanczos"])
def test_native_chains_equal_torchvision_on_photos(name: str, photos: Path, assert_equal: Callable[..., None]) -> None:
    root = photos / "valid"
    theirs = list(TorchDataLoader(datasets.ImageFolder(root, NATIVE[name]), 32))
    assert_equal(list(DataLoader(ImageFolder(root, NATIVE[name]), 32)), theirs)


def test_the_road_of_each_finish() -> None:
    def finish(name: str) -> str:
        spec = lower(NATIVE[name], 3).first.finish
        assert spec is not None
        return spec["kind"]

    for name in ("tutorial", "preset", "mean as tensor", "gray", "flip of the tensor"):
        assert finish(name) == "normalize", name
    assert finish("float") == finish("convert") == "float"
    assert finish("uint8") == finish("v2 uint8") == "uint8"
    # v2 multiplies by 1/255 where v1 divides by 255: other bits, so not the same road.
    assert finish("v2") == finish("v2 not scaled") == finish("normalised twice") == "table"


def classification_weights() -> list[Any]:
    names = models.list_models(module=models)
    return [weights for name in names for weights in models.get_model_weights(name)]


def test_every_classification_preset_of_torchvision_is_native(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    # As large as photos are, with edges that no preset's sizes divide.
    for i, (height, width) in enumerate([(431, 597), (613, 389)]):
        picture(height, width, i).save(tmp_path / "class" / f"{i}.png")
    seen: dict[str, str] = {}
    for weights in classification_weights():
        transform = weights.transforms()
        seen.setdefault(repr(transform), str(weights))
    assert len(classification_weights()) > 100 and len(seen) > 20
    for name in seen.values():
        transform = models.get_weight(name).transforms()
        lowered = lower(transform, 3)
        assert lowered.python == () and lowered.first.finish is not None, name
        ours, _ = next(iter(DataLoader(ImageFolder(tmp_path, transform), 2)))
        theirs = [transform(image) for image, _ in datasets.ImageFolder(tmp_path)]
        assert torch.equal(ours, torch.stack(theirs)), name


REFUSED: dict[str, Any] = {
    "negative padding crops": v1.Pad(-1),
    "fill per type": v2.Pad(1, fill={tv_tensors.Image: 3, "others": 5}),
    "fill for another number of channels": v1.RandomAffine(5, fill=(1, 2)),
    "Pillow has no such filter for maps": v1.RandomAffine(5, interpolation=Mode.LANCZOS),
    "channels by chance": v1.RandomApply([v1.Grayscale()], 0.5),
    "an unknown step inside": v1.RandomChoice([v1.RandomInvert(), v1.GaussianBlur(3)]),
    "a function inside": v2.RandomOrder([v2.RandomInvert(), lambda image: image]),
    "ranges the wrong way round": v1.RandomResizedCrop(8, (0.5, 0.2)),
    "no bits": v1.RandomPosterize(0),
    "mirrored borders for two reasons": v2.RandomCrop((24, 20), 3, True, padding_mode="reflect"),
    "a filter's name in v1": v1.Resize(24, "bilinear"),
    "perspective": v1.RandomPerspective(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_the_same_stays_in_python(name: str) -> None:
    lowered = lower(v1.Compose([v1.Resize((24, 20)), REFUSED[name], v1.ToTensor()]), 3)
    assert lowered.python == (REFUSED[name],)


def test_erasing_that_torchvision_would_refuse_stays_in_python() -> None:
    forget_notes()
    with pytest.warns(UserWarning, match="RandomErasing"):
        assert len(lower(v1.Compose([v1.ToTensor(), v1.RandomErasing(value=(1, 2))]), 3).python) == 1
    # Bytes that wrap around are torch's business.
    assert len(lower(v1.Compose([v1.PILToTensor(), v1.RandomErasing(value=-1)]), 3).python) == 1


class OwnResize(v1.Resize):
    """A subclass may do anything."""


def darken(image: Any) -> Any:
    return image.point(lambda v: v // 2)


PARTLY: dict[str, tuple[Any, list[str], int]] = {
    # transform, names of the Python steps, how many steps behind them
    "in the middle": (
        v1.Compose([v1.Resize((24, 20)), v1.Lambda(darken), v1.ToTensor(), v1.Normalize(MEAN, STD)]),
        ["Lambda"],
        2,
    ),
    "first and last of the unknown": (
        v1.Compose([darken, v1.Resize((24, 20)), darken, v1.CenterCrop(16), v1.PILToTensor()]),
        ["darken", "Resize", "darken"],
        2,
    ),
    "a subclass": (v1.Compose([OwnResize((24, 20)), v1.ToTensor()]), ["OwnResize"], 1),
    "on the tensor": (
        v1.Compose([v1.Resize((24, 20)), v1.ToTensor(), v1.Lambda(lambda x: x * 2), v1.Normalize(MEAN, STD)]),
        ["Lambda", "Normalize"],
        0,
    ),
    "resize of the tensor": (
        v1.Compose([v1.ToTensor(), v1.Resize((24, 20), antialias=True)]),
        ["Resize"],
        0,
    ),
    "gray of the tensor": (v2.Compose([v2.Resize((24, 20)), v2.ToImage(), v2.Grayscale()]), ["Grayscale"], 0),
    "last": (v1.Compose([v1.Resize((24, 20)), v1.ToTensor(), torch.nn.Flatten()]), ["Flatten"], 0),
    "Python makes it gray": (
        v1.Compose([v1.Resize((24, 20)), lambda image: image.convert("L"), v1.CenterCrop(16), v1.ToTensor()]),
        ["<lambda>"],
        2,
    ),
    "Python makes it another mode": (
        v1.Compose([v1.Resize((24, 20)), lambda image: image.convert("HSV"), v1.ToTensor()]),
        ["<lambda>"],
        1,
    ),
    "Python makes a tensor": (
        v1.Compose([v1.Resize((24, 20)), v1.functional.to_tensor, v1.RandomHorizontalFlip(1)]),
        ["to_tensor", "RandomHorizontalFlip"],
        0,
    ),
    "a function": (lambda image: v1.functional.to_tensor(image.resize((9, 9))), ["<lambda>"], 0),
}


@pytest.mark.parametrize("name", PARTLY)
def test_unknown_steps_run_in_python(name: str, folder: Path, assert_equal: Callable[..., None]) -> None:
    transform, steps, behind = PARTLY[name]
    forget_notes()
    with pytest.warns(UserWarning, match="in Python"):
        lowered = lower(transform, 3)
    assert [lowering._name(step).split(".")[-1] for step in lowered.python] == steps
    assert len(lowered.rest) == behind
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower(transform, 3)
    theirs = list(TorchDataLoader(datasets.ImageFolder(folder, transform), 7))
    for num_workers in (0, 2):
        assert_equal(list(DataLoader(ImageFolder(folder, transform), 7, num_workers=num_workers)), theirs)


def test_python_steps_draw_from_torchs_generator_in_torchs_order(
    folder: Path, assert_equal: Callable[..., None]
) -> None:
    transform = v1.Compose([v1.Resize((24, 20)), v1.RandomPerspective(p=0.7), v1.GaussianBlur(3), v1.ToTensor()])
    torch.manual_seed(11)
    theirs = list(TorchDataLoader(datasets.ImageFolder(folder, transform), 5, shuffle=True))
    state = torch.get_rng_state()
    for num_workers in (0, 2):
        torch.manual_seed(11)
        assert_equal(list(DataLoader(ImageFolder(folder, transform), 5, True, num_workers=num_workers)), theirs)
        assert torch.equal(torch.get_rng_state(), state)


def test_the_warning_names_the_step_once(folder: Path) -> None:
    forget_notes()
    transform = v1.Compose([v1.GaussianBlur(3), v1.Resize((8, 8)), v1.ToTensor()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            list(DataLoader(ImageFolder(folder, transform), 7))
    assert [str(one.message).split()[1] for one in caught] == ["GaussianBlur"]


def test_python_steps_see_the_metadata(tmp_path: Path) -> None:
    from PIL import Image, ImageOps

    (tmp_path / "class").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(30, 20, 0).save(tmp_path / "class" / "turned.jpg", exif=exif)
    transform = v1.Compose([ImageOps.exif_transpose, v1.ToTensor()])
    ((batch, _),) = DataLoader(ImageFolder(tmp_path, transform))
    assert batch.shape == (1, 3, 20, 30)
    assert torch.equal(batch[0], datasets.ImageFolder(tmp_path, transform)[0][0])


def test_the_users_mistakes_are_torchvisions_errors(folder: Path) -> None:
    mistakes = [
        v1.Compose([v1.Resize((24, 20)), v1.Normalize(MEAN, STD)]),
        v1.Compose([v1.Resize((24, 20)), v1.PILToTensor(), v1.Normalize(MEAN, STD)]),
        v1.Compose([v1.Resize((24, 20)), v1.ToTensor(), v1.Normalize(MEAN, [1, 0, 1])]),
        v1.Compose([v1.Resize((24, 20)), v1.ToTensor(), v1.Normalize([0.5, 0.5], [1, 1])]),
        v1.Compose([v1.Resize(24, max_size=20), v1.ToTensor()]),
        v1.Compose([v1.Resize((24, 20)), v1.RandomRotation((5, 5), fill=(1, 2)), v1.ToTensor()]),
        v1.Compose([v1.Resize((0, 20)), v1.ToTensor()]),
        v1.Compose([v1.Resize((24, 20)), v1.Lambda(lambda image: 1 / 0)]),
    ]
    for transform in mistakes:
        with pytest.raises(Exception) as theirs:
            next(iter(TorchDataLoader(datasets.ImageFolder(folder, transform))))
        with pytest.raises(Exception) as ours:
            next(iter(DataLoader(ImageFolder(folder, transform))))
        assert type(ours.value) is type(theirs.value)
        assert str(ours.value) == str(theirs.value)


def test_a_double_default_dtype_stays_torchvisions(folder: Path, assert_equal: Callable[..., None]) -> None:
    transform = v1.Compose([v1.Resize((24, 20)), v1.ToTensor()])
    torch.set_default_dtype(torch.float64)
    try:
        theirs = list(TorchDataLoader(datasets.ImageFolder(folder, transform), 7))
        assert_equal(list(DataLoader(ImageFolder(folder, transform), 7)), theirs)
        assert theirs[0][0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_hook_keeps_a_transform_in_python() -> None:
    resize = v1.Resize((24, 20))
    assert lower(resize, 3).first.ops
    resize.register_forward_hook(lambda module, inputs, output: output)
    assert not lower(resize, 3).first.ops


def test_samples_of_v2_are_images_of_v2(folder: Path) -> None:
    transform = v2.Compose([v2.Resize((24, 20)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    for dataset in (ImageFolder(folder, transform), datasets.ImageFolder(folder, transform)):
        (items,) = DataLoader(dataset, 26, collate_fn=lambda items: items)
        assert all(type(image) is tv_tensors.Image for image, _ in items)
        assert torch.equal(items[3][0], dataset[3][0])


def test_random_operations_keep_torchvisions_distribution(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    for i in range(400):
        picture(6, 7, i % 5).save(tmp_path / "class" / f"{i}.png")
    plain = torch.cat([x for x, _ in DataLoader(ImageFolder(tmp_path, v1.ToTensor()), 100)])
    torch.manual_seed(0)
    transform = v1.Compose([v1.RandomHorizontalFlip(0.25), v1.ToTensor()])
    assert not lower(transform, 3).python
    loader = DataLoader(ImageFolder(tmp_path, transform), 100, num_workers=2)
    epochs = [torch.cat([x for x, _ in loader]) for _ in range(3)]
    flipped = [torch.tensor([bool(torch.equal(a, b.flip(2))) for a, b in zip(x, plain, strict=True)]) for x in epochs]
    same = [torch.tensor([bool(torch.equal(a, b)) for a, b in zip(x, plain, strict=True)]) for x in epochs]
    assert all(bool((f ^ s).all()) for f, s in zip(flipped, same, strict=True))
    # Binomial(1200, 0.25): mean 300, standard deviation 15; 5 of them never happen by chance.
    assert abs(int(sum(f.sum() for f in flipped)) - 300) < 75
    assert not torch.equal(flipped[0], flipped[1]), "every epoch draws again"
