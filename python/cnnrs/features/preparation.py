"""What a backbone wants its images prepared with, against what the loader does."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from cnnrs.data.loader import DataLoader
from cnnrs.features.samples import Data
from cnnrs.image.lowering import lower
from cnnrs.image.spec import kept_ops
from cnnrs.model.backbone import Backbone
from cnnrs.model.modes import device_of


def source_of(
    data: Iterable[Any] | Dataset[Any],
    body: nn.Module,
    batch_size: int | None,
    num_workers: int | None,
    any_transform: bool,
) -> Data:
    """The images, with the transform that the weights want where they have none.

    ``batch_size`` None: as many at a time as the device of ``body`` is fast with.

    Raises:
        ValueError: they have another one, and `any_transform` is not set.
    """
    loader: Any = data
    if isinstance(data, Dataset):
        if batch_size is None:
            batch_size = 256 if device_of(body).type == "cuda" else 32
        wanted = body.transform if isinstance(body, Backbone) else None
        loader = DataLoader(with_transform(data, wanted), batch_size=batch_size, num_workers=num_workers)
    source = Data(loader)
    transforms = transforms_of(getattr(loader, "dataset", None))
    if isinstance(body, Backbone) and not any_transform:
        for transform in transforms:
            check_transform(transform, body)
    if None in transforms and _are_pictures(loader):
        advice = "give preconv the data set itself, then it gets the one the weights want, or"
        known = isinstance(body, Backbone) and body.transform is not None and not isinstance(data, Dataset)
        raise ValueError(
            f"the images have no transform that makes tensors of them: {advice if known else ''} "
            "give the data set a transform, such as transforms.Compose([transforms.Resize((224, 224)), "
            "transforms.ToTensor()])".replace("  ", " ")
        )
    return source


def _are_pictures(loader: Any) -> bool:
    """Whether the first sample is a picture that nobody has made a tensor of, and the loader does not either."""
    from PIL import Image

    if not isinstance(loader, torch.utils.data.DataLoader) or loader.collate_fn is not default_collate:
        return False
    try:
        image, _ = loader.dataset[0]
    except Exception:
        # The loader meets the fault too, and says what its on_error wants.
        return False
    return isinstance(image, Image.Image)


def with_transform(dataset: Dataset[Any], transform: Any) -> Dataset[Any]:
    """A view of an image data set that has no transform, with one; anything else as it is.

    Parts of a data set and several in a row are looked into.
    """
    if type(dataset) is Subset:
        inner = with_transform(dataset.dataset, transform)
        return dataset if inner is dataset.dataset else Subset(inner, dataset.indices)
    if type(dataset) is ConcatDataset:
        return ConcatDataset([with_transform(one, transform) for one in dataset.datasets])
    if transform is None or getattr(dataset, "transform", transform) is not None or not hasattr(dataset, "samples"):
        return dataset
    changed: Any = copy.copy(dataset)
    changed.transform = transform
    if hasattr(changed, "_join_transforms"):
        changed._join_transforms()
    return changed  # type: ignore[no-any-return]


def transforms_of(dataset: Any) -> list[Any]:
    """The transforms of a data set, of all its parts, None for those without."""
    if type(dataset) is Subset:
        return transforms_of(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return [transform for one in dataset.datasets for transform in transforms_of(one)]
    return [getattr(dataset, "transform", None)]


def check_transform(transform: Any, body: Backbone) -> None:
    """That images are prepared as the weights want them, judged by what becomes of a picture.

    Random transforms are free in what they cut and turn; size and normalisation must be right.

    The numbers may differ a little: resizing tensors and resizing pictures is not the same.

    Raises:
        ValueError: they are not; shows both transforms.
    """
    if body.transform is None or transform is None:
        return
    ours, theirs = lower(body.transform, 3), lower(transform, 3)
    wanted, found = body.transform(_picture()), transform(_picture())
    is_random = kept_ops(theirs.first.ops) < len(theirs.first.ops) or _varies(transform, found)
    if isinstance(found, torch.Tensor) and found.shape == wanted.shape and found.dtype == wanted.dtype:
        if is_random and theirs.first.finish is not None and ours.first.finish == theirs.first.finish:
            return
        if is_random and theirs.first.finish is None and _same_levels(body.transform, transform):
            return
        # Resizing tensors and resizing pictures differ by up to 2 of 255 levels, divided by a deviation above 0.2.
        if not is_random and float((wanted - found).abs().max()) <= 2 / 255 / 0.2:
            return
    raise ValueError(
        f"the images are not prepared as the weights of {body.name} want them:\n"
        f"  the data:    {_one_line(transform)}\n"
        f"  the weights: {_one_line(body.transform)}\n"
        "Give the data set no transform (then the weights' own is used) or cnnrs.backbone(...).transform, or pass "
        "any_transform=True to go on all the same"
    )


def _varies(transform: Callable[[Any], Any], once: Any) -> bool:
    """Whether a transform makes something else of the same picture now and then."""
    if not isinstance(once, torch.Tensor):
        return False
    python = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return not all(torch.equal(once, transform(_picture())) for _ in range(8))
    finally:
        random.setstate(python)


def _same_levels(ours: Callable[[Any], Any], theirs: Callable[[Any], Any]) -> bool:
    """Whether black and white become the same numbers, for steps whose normalisation cannot be read."""
    from PIL import Image

    python = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for level in (0, 255):
                picture = Image.new("RGB", (400, 300), (level,) * 3)
                # Most pixels, most of the time: augmentation draws edges, inverts and erases now and then.
                made = torch.stack([theirs(picture).flatten(1).median(dim=1).values for _ in range(15)])
                wanted = ours(picture).flatten(1).median(dim=1).values
                if float((made.median(dim=0).values - wanted).abs().max()) > 2 / 255 / 0.2:
                    return False
    finally:
        random.setstate(python)
    return True


def _picture() -> Any:
    """Waves with an edge and noise: every way of resizing and cutting makes something else of it."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:300, 0:400].astype(np.float64)
    waves = np.stack([128 + 90 * np.sin(x / a + y / b) for a, b in ((9, 31), (23, 7), (14, 17))], axis=-1)
    waves[100:, 200:] *= 0.5
    waves += np.random.default_rng(0).normal(0, 20, waves.shape)
    return Image.fromarray(np.clip(waves, 0, 255).astype(np.uint8))


def _one_line(transform: Any) -> str:
    return " ".join(repr(transform).split())
