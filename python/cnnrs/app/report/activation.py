"""What a network looks at: the parts of a photo that speak for a class, as a picture."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import cnnrs
from cnnrs._util.plots import denormalised

if TYPE_CHECKING:
    from cnnrs.classifier.run_folder import Run

_BATCH = 8
_SIDE = 180
# Where a map is weak the photo is seen, where it is strong this colour, from the first to the second.
_WEAK, _STRONG = (255, 214, 64), (214, 32, 32)
_COVER = 0.6


def activation_maps(run: Run, wanted: Sequence[tuple[str, int]], seconds: float = 20.0) -> dict[str, bytes]:
    """Photos, as the network gets them, with what speaks for a class laid over them.

    Grad-CAM on the last feature map; behind global average pooling and one linear layer that is the class activation
    map: the feature map times the weights of the class.

    Args:
        run: the classifier.
        wanted: (path, class number) of the photos.
        seconds: after so many no further batch is begun.

    Returns:
        JPEGs by path, of the photos that can be read; nothing for a network without a feature map, or whose head does
        not say which way its scores go.
    """
    found: dict[str, bytes] = {}
    if not wanted:
        return found
    start = time.perf_counter()
    numbers = dict(wanted)
    model, transform = run.model.eval(), run.transform
    layer: tuple[nn.Module, int] | None = None
    for images, paths in _batches(list(numbers), transform, run.read):
        if layer is None:
            layer = last_map(model, images[:1])
        if layer is None or time.perf_counter() - start > seconds:
            break
        heat = grad_cam(model, layer, images, torch.tensor([numbers[path] for path in paths]))
        if heat is None:
            break
        photos = denormalised(images, transform)
        found.update((path, _laid_over(*pair)) for path, *pair in zip(paths, photos, heat, strict=True))
    return found


def last_map(model: nn.Module, images: Tensor) -> tuple[nn.Module, int] | None:
    """The module whose output is the last feature map, and which of its calls it is; None where there is none.

    Args:
        model: in eval mode.
        images: (N, 3, H, W).
    """
    calls: dict[nn.Module, int] = {}
    last: list[tuple[nn.Module, int] | None] = [None]

    def after(module: nn.Module, _: Any, output: Any) -> None:
        calls[module] = calls.get(module, -1) + 1
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if output.dim() == 4 and min(output.shape[2:]) > 1:
            last[0] = (module, calls[module])
        elif output.dim() == 3:
            # What follows are tokens, which have lost their places.
            last[0] = None

    with torch.no_grad(), _hooked(model.modules(), after):
        model(images)
    return last[0]


def grad_cam(model: nn.Module, layer: tuple[nn.Module, int], images: Tensor, classes: Tensor) -> Tensor | None:
    """What speaks for a class in each image.

    Args:
        model: (N, 3, H, W) to (N, C) scores, in eval mode.
        layer: as ``last_map`` says.
        images: (N, 3, H, W).
        classes: (N,) class numbers.

    Returns:
        (N, h, w), not negative, of the feature map's size; None where the scores do not depend on it smoothly.
    """
    module, call = layer
    calls, leaves = [-1], list[Tensor]()

    def after(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        calls[0] += 1
        if calls[0] != call:
            return None
        # Only what follows is recorded: memory is that of the end of the network.
        torch.set_grad_enabled(True)
        leaves.append(output.detach().requires_grad_())
        # Not the leaf itself, which nobody may change in place.
        return leaves[0].clone()

    with torch.no_grad(), _hooked([module], after):
        scores = model(images)
        if scores.dim() != 2 or not scores.requires_grad:
            return None
        chosen = scores.gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, leaves)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * leaves[0].detach()).sum(dim=1).relu()


@contextmanager
def _hooked(modules: Any, after: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(after) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(paths: list[str], transform: Any, read: Mapping[str, Any]) -> Iterator[tuple[Tensor, list[str]]]:
    """Images of the files that can be read, with their paths."""
    for first in range(0, len(paths), _BATCH):
        some = paths[first : first + _BATCH]
        loader = cnnrs.DataLoader(cnnrs.ImageList(some, transform), batch_size=_BATCH, on_error="skip", **read)
        images = [batch[0] for batch in loader]
        bad = {path for path, _ in loader.errors}
        good = [path for path in some if path not in bad]
        if good:
            yield torch.cat(images), good


def _laid_over(photo: Tensor, heat: Tensor) -> bytes:
    """A JPEG of a (3, H, W) photo, 0 to 1, under a (h, w) map."""
    from PIL import Image

    strength = nn.functional.interpolate(heat[None, None], photo.shape[1:], mode="bilinear", align_corners=False)[0]
    strength = strength / strength.max().clamp(min=1e-12)
    weak, strong = (torch.tensor(color).view(3, 1, 1) / 255 for color in (_WEAK, _STRONG))
    color = weak + (strong - weak) * strength
    cover = _COVER * strength
    mixed = (255 * (photo * (1 - cover) + color * cover)).round().clamp(0, 255).byte()
    image = Image.fromarray(mixed.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return buffer.getvalue()
