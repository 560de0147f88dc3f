"""What a backbone wants its images prepared with, against what the loader does."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from cnnrs.image.lowering import lower
from cnnrs.image.spec import kept_ops
from cnnrs.model.backbone import Backbone


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
