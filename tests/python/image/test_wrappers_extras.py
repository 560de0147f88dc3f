"""timm's own transforms, where timm is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_wrappers import compare_with_torch
from torchvision import transforms

from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader
from cnnrs.image.lowering import lower

timm_transforms = pytest.importorskip("timm.data.transforms")


@pytest.mark.filterwarnings("error:cnnrs.DataLoader")
def test_timms_adapters_run_in_threads(folder: Path) -> None:
    compare_with_torch(timm_transforms, folder)


@pytest.mark.filterwarnings("error:cnnrs.DataLoader")
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_timms_own_chains_run_in_threads(interpolation: str, folder: Path) -> None:
    from timm.data import create_transform

    for training in (True, False):
        filters = {"interpolation": interpolation} if training else {}
        step = create_transform(20, is_training=training, color_jitter=None, **filters)
        lowered = lower(step, 3)
        assert lowered.first.finish is not None and not lowered.python
        assert next(iter(DataLoader(ImageFolder(folder, step), 4)))[0].shape == (4, 3, 20, 20)


def test_a_crop_of_everything_is_timms(folder: Path) -> None:
    """With one scale and ratio nothing but the position is drawn, and of the whole image not even that."""
    crop = timm_transforms.RandomResizedCropAndInterpolation(12, (1.0, 1.0), (1.0, 1.0), "bilinear")
    square = transforms.CenterCrop(18)
    step = transforms.Compose([square, crop, transforms.ToTensor()])
    dataset = ImageFolder(folder, step)
    found = torch.cat([images for images, _ in DataLoader(dataset, 5)])
    assert all(torch.equal(image, dataset[i][0]) for i, image in enumerate(found))
