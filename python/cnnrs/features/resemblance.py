"""Which rows resemble which: cosines, a few of the largest at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cnnrs.data.image_list import ImageList
from cnnrs.data.loader import DataLoader
from cnnrs.data.pictures import is_picture, pictures
from cnnrs.model.modes import device_of, frozen

# Rows that are compared at a time: bounds the memory of a search, whatever the size of the store.
_CHUNK = 2048


def most_similar(
    features: Tensor, images: list[int], queries: Tensor, k: int, leave_out: Tensor | bool | None
) -> tuple[Tensor, Tensor]:
    """(M, k) cosines of (M, ...) queries and their ``k`` most similar rows, and the numbers of these rows.

    Args:
        features: (N, ...) rows to be found.
        images: of every row the number of its image.
        queries: of the shape of the rows.
        k: how many.
        leave_out: numbers of images that are not to be found; True: each query is a row, and its own is not.

    Raises:
        ValueError: the shapes differ, ``k`` is below 1 or there are not so many rows.
    """
    if queries.shape[1:] != features.shape[1:]:
        raise ValueError(f"features have shape {tuple(features.shape[1:])}, the queries {tuple(queries.shape[1:])}")
    device = features.device
    numbers = torch.tensor(images, device=device)
    others = len(features)
    if isinstance(leave_out, Tensor):
        others -= int((numbers == leave_out.to(device)).sum())
    elif leave_out:
        others -= int(numbers.bincount().max()) if len(numbers) else 0
    kind = "rows" if leave_out is None else "rows of other images"
    if not 1 <= k <= others:
        raise ValueError(f"k must be between 1 and the {others} {kind} there are, got {k}")
    own = None
    if isinstance(leave_out, Tensor):
        own = leave_out.to(device).expand(len(queries)), numbers
    elif leave_out:
        own = numbers, numbers
    return nearest(queries.to(device), features, k, own, unit=_unit)


def nearest(
    queries: Tensor, rows: Tensor, k: int, own: tuple[Tensor, Tensor] | None = None,
    unit: Callable[[Tensor], Tensor] = Tensor.float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(M, k) cosines and row numbers of the most similar rows, the most similar first; memory is bounded.

    Args:
        queries: (M, ...), any float dtype.
        rows: (N, ...), any float dtype.
        k: at most N.
        own: (M,) and (N,) numbers of groups: rows of a query's own group come last, with cosine minus infinity.
        unit: makes (n, D) float32 of length 1 of some of either; as they come where they have that length.
    """
    values = [torch.zeros((0, k), device=rows.device)]
    places = [torch.zeros((0, k), dtype=torch.int64, device=rows.device)]
    for begin in range(0, len(queries), _CHUNK):
        some = unit(queries[begin : begin + _CHUNK])
        best = torch.full((len(some), k), -torch.inf, device=rows.device)
        where = torch.zeros((len(some), k), dtype=torch.int64, device=rows.device)
        for start in range(0, len(rows), _CHUNK):
            cosines = some @ unit(rows[start : start + _CHUNK]).T
            if own is not None:
                mine = own[0][begin : begin + len(some), None] == own[1][start : start + cosines.shape[1]]
                cosines.masked_fill_(mine, -torch.inf)
            top, order = cosines.topk(min(k, cosines.shape[1]), dim=1)
            best, which = torch.cat([best, top], dim=1).topk(k, dim=1)
            where = torch.cat([where, order + start], dim=1).gather(1, which)
        values.append(best)
        places.append(where)
    return torch.cat(values), torch.cat(places)


def most_frequent(votes: Tensor) -> Tensor:
    """(M,) of (M, k) labels, the most similar row's first, the one that occurs most; ties go to the most similar."""
    same = votes.unsqueeze(2) == votes.unsqueeze(1)
    # The earlier a row, the more similar: it breaks ties without outvoting anybody.
    order = torch.linspace(0.5, 0, votes.shape[1], device=votes.device)
    best = (same.sum(dim=2) + order).argmax(dim=1, keepdim=True)
    return votes.gather(1, best).squeeze(1)


def computed(
    image: Any, body: nn.Module | None, transform: Callable[[Any], Any] | None, read: Mapping[str, Any]
) -> Tensor:
    """(...) features of one photo: a file or an image in memory.

    Args:
        image: a path, a PIL image or an array.
        body: what computes features.
        transform: what prepares the photo; None: the body's own.
        read: how files are read, as arguments of a loader.

    Raises:
        ValueError: there is no body, or no transform.
    """
    transform = transform if transform is not None else getattr(body, "transform", None)
    if body is None or transform is None:
        raise ValueError(
            "these features do not know what computed them: pass it, features.nearest(photo, "
            "body=cnnrs.backbone(...)), whose transform prepares the photo"
        )
    if is_picture(image):
        inputs = torch.stack(
            [transform(one) for one in pictures(image, read.get("exif", False), read.get("scale", "none"))]
        )
    else:
        # A generator of its own: looking at a photo draws no random numbers of the user's.
        loader = DataLoader(ImageList([image], transform), generator=torch.Generator(), **read)
        inputs, _ = next(iter(loader))
    with frozen(body), torch.no_grad():
        # They may have been decoded on a GPU.
        made: Tensor = body(inputs.to(device_of(body)))
    return made[0]


def _unit(rows: Tensor) -> Tensor:
    """(n, d) float32 rows of length 1."""
    return nn.functional.normalize(rows.flatten(1).float(), dim=1)
