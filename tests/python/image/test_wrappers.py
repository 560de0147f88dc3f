"""Objects that only apply other transforms are taken apart, those that do anything else are called."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import datasets, transforms
from torchvision.transforms import functional

from cnnrs._util.intraop import one_thread
from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader
from cnnrs.image.lowering import lower
from cnnrs.image.wrappers import wrapped

RESIZE = transforms.Resize((8, 9))
STEPS = [RESIZE, transforms.ToTensor()]


class Preset:
    """As the presets of torchvision's training references."""

    def __init__(self, steps: Any) -> None:
        self.transforms = steps

    def __call__(self, img: Any) -> Any:
        return self.transforms(img)


class Inherited(Preset):
    pass


class Named(Preset):
    def __call__(self, image: Any) -> Any:
        """With a docstring, and a name."""
        result = self.transforms(image)
        return result


class Each(Preset):
    def __call__(self, img: Any) -> Any:
        for t in self.transforms:
            img = t(img)
        return img


class Module(nn.Module):
    def __init__(self, steps: nn.Module) -> None:
        super().__init__()
        self.pipeline = steps

    def forward(self, x: Any) -> Any:
        return self.pipeline(x)


class OwnCompose(transforms.Compose):
    pass


class Twice(Preset):
    def __call__(self, img: Any) -> Any:
        return self.transforms(self.transforms(img))


class Method:
    transforms = None

    def steps(self, img: Any) -> Any:
        return STEPS[1](STEPS[0](img))

    def __call__(self, img: Any) -> Any:
        return self.steps(img)


class Changing(Preset):
    @property
    def current(self) -> Any:
        return self.transforms

    def __call__(self, img: Any) -> Any:
        return self.current(img)


class More(Preset):
    def __call__(self, img: Any) -> Any:
        img = self.transforms(img)
        return img + 1


class Optional(Preset):
    def __call__(self, img: Any, target: Any = None) -> Any:
        return self.transforms(img)


class Intercepted(Preset):
    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


COMPOSED = transforms.Compose(STEPS)


def test_what_only_applies_its_transforms_is_taken_apart() -> None:
    for step, inner in (
        (Preset(COMPOSED), [COMPOSED]),
        (Inherited(COMPOSED), [COMPOSED]),
        (Named(COMPOSED), [COMPOSED]),
        (Each(STEPS), STEPS),
        (Module(RESIZE), [RESIZE]),
        (OwnCompose(STEPS), STEPS),
    ):
        for _ in range(50):
            # The interpreter rewrites the instructions of what runs often.
            step(Image.new("RGB", (3, 4)))
        assert wrapped(step) == inner, step


def test_what_does_anything_else_is_called() -> None:
    hooked = Module(RESIZE)
    hooked.register_forward_hook(lambda *_: None)
    patched = Module(RESIZE)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    for step in (
        Twice(COMPOSED), Method(), Changing(COMPOSED), More(COMPOSED), Optional(COMPOSED), Intercepted(COMPOSED),
        hooked, patched, COMPOSED.__call__, len, Preset, Each(iter(STEPS)),
    ):  # fmt: skip
        assert wrapped(step) is None, step


@pytest.mark.filterwarnings("error")
def test_presets_run_in_threads(folder: Path) -> None:
    normalize = transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
    finish = [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float), normalize]
    for step in (
        Preset(transforms.Compose([RESIZE, *finish])),
        Each([Preset(RESIZE), *finish]),
        OwnCompose([RESIZE, *finish]),
    ):
        assert lower(step, 3).first.finish is not None
        theirs = list(TorchDataLoader(datasets.ImageFolder(folder, step), 4))
        ours = list(DataLoader(ImageFolder(folder, step), 4, num_workers=2))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(ours, theirs, strict=True))


class MaybeToTensor(transforms.ToTensor):
    def __call__(self, pic: Any) -> Any:
        return pic if isinstance(pic, torch.Tensor) else functional.to_tensor(pic)


class MaybePILToTensor:
    def __call__(self, pic: Any) -> Any:
        return pic if isinstance(pic, torch.Tensor) else functional.pil_to_tensor(pic)


class ToTensor:
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def __call__(self, image: Any) -> Any:
        return functional.pil_to_tensor(image).to(self.dtype)


class ToNumpy:
    def __call__(self, image: Any) -> Any:
        array = np.array(image, dtype=np.uint8)
        return np.rollaxis(array[..., None] if array.ndim < 3 else array, 2)


class RandomResizedCropAndInterpolation:
    def __init__(self, size: int, scale: Any, ratio: Any, interpolation: Any) -> None:
        self.size = (size, size)
        self.interpolation = interpolation
        self.scale, self.ratio = scale, ratio

    def __call__(self, img: Any) -> Any:
        window = transforms.RandomResizedCrop.get_params(img, self.scale, self.ratio)
        several = isinstance(self.interpolation, (tuple, list))
        interpolation = random.choice(self.interpolation) if several else self.interpolation
        return functional.resized_crop(img, *window, self.size, interpolation)


@pytest.fixture
def timm_transforms(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm's adapters as they behave; `make test-extras` uses timm itself (`test_wrappers_extras.py`)."""
    module: Any = ModuleType("timm.data.transforms")
    for kind in (MaybeToTensor, MaybePILToTensor, ToTensor, ToNumpy, RandomResizedCropAndInterpolation):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "timm.data.transforms", module)
    return module


def chains(timm: Any) -> dict[str, list[Any]]:
    normalize = transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
    return {
        "maybe": [RESIZE, timm.MaybeToTensor(), normalize],
        "maybe again": [RESIZE, transforms.ToTensor(), timm.MaybeToTensor(), normalize, timm.MaybePILToTensor()],
        "bytes": [RESIZE, timm.MaybePILToTensor()],
        "bytes to floats": [RESIZE, timm.MaybePILToTensor(), transforms.ConvertImageDtype(torch.float), normalize],
        "not scaled": [RESIZE, timm.ToTensor(), normalize],
        "not scaled bytes": [RESIZE, timm.ToTensor(torch.uint8)],
        "arrays": [RESIZE, timm.ToNumpy()],
    }


def compare_with_torch(timm: Any, folder: Path) -> None:
    for name, steps in chains(timm).items():
        step = transforms.Compose(steps)
        assert lower(step, 3).first.finish is not None, name
        for keywords in ({}, {"collate_fn": list}, {"batch_size": None}):
            theirs = list(TorchDataLoader(datasets.ImageFolder(folder, step), **keywords))  # type: ignore[arg-type]
            ours = list(DataLoader(ImageFolder(folder, step), num_workers=2, **keywords))  # type: ignore[arg-type]
            for a, b in zip(ours, theirs, strict=True):
                x, y = (pair[0][0] if "collate_fn" in keywords else pair[0] for pair in (a, b))
                assert type(x) is type(y) and x.dtype == y.dtype and x.shape == y.shape, name
                assert (np.array_equal if isinstance(x, np.ndarray) else torch.equal)(x, y), name


@pytest.mark.filterwarnings("error:cnnrs.DataLoader")
def test_timms_adapters_run_in_threads(timm_transforms: Any, folder: Path) -> None:
    compare_with_torch(timm_transforms, folder)


def test_arrays_end_what_is_known(timm_transforms: Any) -> None:
    for behind in (transforms.ToTensor(), timm_transforms.ToNumpy(), timm_transforms.MaybeToTensor()):
        lowered = lower(transforms.Compose([RESIZE, timm_transforms.ToNumpy(), behind]), 3)
        assert behind in (*lowered.python, *lowered.rest)


class Threads:
    """A step that notes how many threads torch would take."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, image: Any) -> Any:
        self.seen.add(torch.get_num_threads())
        return image


def test_steps_in_python_run_on_one_thread(folder: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        step = Threads()
        for chain in ([RESIZE, step, transforms.ToTensor()], [RESIZE, transforms.ToTensor(), step]):
            for _ in DataLoader(ImageFolder(folder, transforms.Compose(chain)), 4, num_workers=2):
                assert torch.get_num_threads() == 3
        assert step.seen == {1}
        # As by torch: its workers have one thread, the process itself all.
        for num_workers, threads in ((2, 1), (0, 3), (None, 3)):
            called = Threads()
            list(DataLoader([1.0, 2.0], collate_fn=called, num_workers=num_workers))  # type: ignore[arg-type]
            assert called.seen == {threads}
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 3
        with one_thread():
            torch.set_num_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:cnnrs.DataLoader.* in Python")
def test_timms_crop_runs_in_threads(timm_transforms: Any, folder: Path) -> None:
    """With one scale and ratio nothing is drawn of a square image: the crop is all of it, resized."""
    bilinear, bicubic = transforms.InterpolationMode.BILINEAR, transforms.InterpolationMode.BICUBIC
    for interpolation, filters in ((bilinear, ["bilinear"]), ((bilinear, bicubic), ["bilinear", "bicubic"])):
        crop = timm_transforms.RandomResizedCropAndInterpolation(12, (1.0, 1.0), (1.0, 1.0), interpolation)
        step = transforms.Compose([transforms.CenterCrop(18), crop, transforms.ToTensor()])
        lowered = lower(step, 3)
        assert lowered.first.finish is not None and not lowered.python
        found = torch.cat([images for images, _ in DataLoader(ImageFolder(folder, step), 5)])
        expected = []
        for name in filters:
            resize = transforms.Resize((12, 12), transforms.InterpolationMode(name))
            step = transforms.Compose([transforms.CenterCrop(18), resize, transforms.ToTensor()])
            expected.append([image for image, _ in datasets.ImageFolder(folder, step)])
        used = [[torch.equal(image, one) for one in ones] for image, *ones in zip(found, *expected, strict=True)]
        assert all(map(any, used)) and all(any(one) for one in zip(*used, strict=True))
    # A name is an error in timm's call, and stays one.
    named = timm_transforms.RandomResizedCropAndInterpolation(12, (1.0, 1.0), (1.0, 1.0), "bilinear")
    assert lower(transforms.Compose([named, transforms.ToTensor()]), 3).first.finish is None
