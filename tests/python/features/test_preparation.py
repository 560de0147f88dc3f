"""Images get the transform that the weights want, and another one is an error that shows both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models, transforms
from torchvision.transforms import v2

import cnnrs
from cnnrs.features.preparation import check_transform

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_images_without_a_transform_get_the_weights_own(torch_cache: Path, folder: Path) -> None:
    features = cnnrs.preconv(cnnrs.ImageFolder(folder), "resnet18")
    own = models.ResNet18_Weights.DEFAULT.transforms()
    expected = cnnrs.preconv(cnnrs.ImageFolder(folder, own), cnnrs.backbone("resnet18"))
    assert features.features.shape == (26, 512) and torch.equal(features.features, expected.features)


def test_parts_of_a_data_set_get_the_weights_own_too(torch_cache: Path, folder: Path) -> None:
    data = cnnrs.ImageFolder(folder)
    whole = cnnrs.preconv(data, "resnet18", verbose=False).features
    part = torch.utils.data.Subset(data, [3, 1, 20])
    # Batches of another size sum in another order.
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(cnnrs.preconv(part, "resnet18", verbose=False).features, whole[[3, 1, 20]], **close)
    both = torch.utils.data.ConcatDataset([part, data])
    torch.testing.assert_close(cnnrs.preconv(both, "resnet18", verbose=False).features[3:], whole, **close)
    assert data.transform is None
    plain = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()])
    with pytest.raises(ValueError, match="not prepared as the weights of resnet18"):
        cnnrs.preconv(torch.utils.data.ConcatDataset([part, cnnrs.ImageFolder(folder, plain)]), "resnet18")
    with pytest.raises(
        ValueError, match="no transform that makes tensors of them: give preconv the data set itself, then"
    ):
        cnnrs.preconv(cnnrs.DataLoader(data), "resnet18")
    with pytest.raises(
        ValueError, match=r"tensors of them: give the data set a transform, such as transforms\.Compose"
    ):
        cnnrs.preconv(data, cnnrs.models.SimpleCNN())


def _flip_and_scale(picture: Any) -> torch.Tensor:
    tensor = transforms.functional.to_tensor(picture.resize((224, 224)))
    return tensor.flip(2) if torch.rand(()) < 0.5 else tensor


NORMALISED = [transforms.ToTensor(), transforms.Normalize(*IMAGENET)]


@pytest.mark.parametrize(
    ("transform", "same"),
    [
        (transforms.Compose([transforms.RandomResizedCrop(224), transforms.TrivialAugmentWide(), *NORMALISED]), True),
        (
            transforms.Compose([transforms.RandomResizedCrop(224), transforms.TrivialAugmentWide(), NORMALISED[0]]),
            False,
        ),
        (lambda picture: NORMALISED[1](_flip_and_scale(picture)), True),
        (_flip_and_scale, False),
    ],
)
def test_random_steps_that_only_python_knows_must_normalise_the_same(
    torch_cache: Path, transform: Any, same: bool
) -> None:
    body = cnnrs.backbone("resnet18")
    if same:
        check_transform(transform, body)
    else:
        with pytest.raises(ValueError, match="not prepared as the weights of resnet18"):
            check_transform(transform, body)


FLOAT = v2.ToDtype(torch.float32, scale=True)
SAME = {
    "the weights' own": models.ResNet18_Weights.DEFAULT.transforms(),
    "spelled out": transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    ),
    "v2": v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*IMAGENET),
        ]
    ),
    "tensors": v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*IMAGENET),
        ]
    ),
    "random": transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET),
        ]
    ),
}
OTHER = {
    "not normalised": transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]),
    "another mean": transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    ),
    "another size": transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(192), transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    ),
    "squeezed": transforms.Compose(
        [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    ),
    "nearest": transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.NEAREST),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET),
        ]
    ),
    "bytes": transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()]),
    "random, not normalised": transforms.Compose([transforms.RandomResizedCrop(224), transforms.ToTensor()]),
    "random, another size": transforms.Compose(
        [transforms.RandomCrop(96, pad_if_needed=True), transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_transforms_that_say_the_same(torch_cache: Path, kind: str) -> None:
    check_transform(SAME[kind], cnnrs.backbone("resnet18"))


@pytest.mark.parametrize("kind", OTHER)
def test_a_mismatch_shows_both(torch_cache: Path, folder: Path, kind: str) -> None:
    data = cnnrs.ImageFolder(folder, OTHER[kind])
    with pytest.raises(ValueError, match="not prepared as the weights of resnet18") as caught:
        cnnrs.preconv(data, "resnet18")
    text = str(caught.value)
    assert (
        " ".join(repr(OTHER[kind]).split()) in text and "ImageClassification" in text and "any_transform=True" in text
    )
    if kind in ("squeezed", "another mean"):
        data.samples = data.samples[:2]
        assert len(cnnrs.preconv(data, "resnet18", any_transform=True)) == 2


def test_the_store_knows_layers_and_poolings(torch_cache: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    data = cnnrs.ImageFolder(folder)
    data.samples = data.samples[:3]
    out = tmp_path / "f"
    for options, computes in (
        ({}, True), ({}, False), ({"layer": "layer1"}, True), ({"layer": "layer1", "pool": "avg"}, True),
        ({"layer": "layer1", "pool": "max"}, True), ({"layer": "layer1", "pool": "max"}, False),
    ):  # fmt: skip
        cnnrs.preconv(data, "resnet18", out=out, overwrite=True, **options)  # type: ignore[arg-type]
        text = capsys.readouterr().out
        assert ("nothing to compute" in text) is not computes
