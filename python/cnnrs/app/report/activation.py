"""What a network looks at: the parts of a photo that speak for a class, as a picture."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

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
# So many last maps are asked whether they matter: more than a block of a transformer has.
_LAST = 32
# So many tokens stand before those of patches at most.
_BEFORE = 16


class NoMap(Exception):
    """Why a network has no picture of what it looks at, in words."""


class Layer(NamedTuple):
    """A place in a network whose output is a map of the photo.

    Attributes:
        module: that returns it.
        call: which of the module's calls.
        grid: height and width, h and w.
        layout: "NCHW", "NHWC", or "tokens": (N, T, C) where the last h w tokens are the map row by row.
    """

    module: nn.Module
    call: int
    grid: tuple[int, int]
    layout: str

    def as_map(self, values: Tensor) -> Tensor:
        """(N, C, h, w) of an output, or of gradients of it."""
        if self.layout == "NHWC":
            return values.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            return values[:, -math.prod(self.grid) :].transpose(1, 2).reshape(len(values), -1, *self.grid)
        return values


def activation_maps(run: Run, wanted: Sequence[tuple[str, int]], seconds: float = 20.0) -> dict[str, bytes]:
    """Photos, as the network gets them, with what speaks for a class laid over them.

    Grad-CAM on the last feature map; behind global average pooling and one linear layer that is the class activation
    map: the feature map times the weights of the class.

    Args:
        run: the classifier.
        wanted: (path, class number) of the photos.
        seconds: after so many no further batch is begun.

    Returns:
        JPEGs by path, of the photos that can be read.

    Raises:
        NoMap: no layer's output is a map that is understood, or the head does not say which way its scores go.
    """
    found: dict[str, bytes] = {}
    if not wanted:
        return found
    start = time.perf_counter()
    numbers = dict(wanted)
    model, transform = run.model.eval(), run.transform
    layer: Layer | None = None
    for images, paths in _batches(list(numbers), transform, run.read):
        if layer is None:
            layer = last_map(model, images[:1])
        if time.perf_counter() - start > seconds:
            break
        heat = grad_cam(model, layer, images, torch.tensor([numbers[path] for path in paths]))
        photos = denormalised(images, transform)
        found.update((path, _laid_over(*pair)) for path, *pair in zip(paths, photos, heat, strict=True))
    return found


def last_map(model: nn.Module, image: Tensor) -> Layer:
    """The last output that is a map of the photo and whose places matter to the scores.

    Those of tokens do not where only the class token is looked at: behind the last attention, that is.

    Args:
        model: in eval mode.
        image: (1, 3, S, S).

    Raises:
        NoMap: there is none.
    """
    layers = _maps(model, image)
    if not layers:
        raise NoMap(
            "no layer's output is laid out as (N, C, H, W), as (N, H, W, C) or as tokens in the order of the patches"
        )
    if layers[-1].layout != "tokens":
        return layers[-1]
    last = layers[-_LAST:]
    scores, outputs = _recorded(model, last, image)
    gradients = _gradients(scores, scores.argmax(dim=1), outputs)
    for layer, gradient in zip(last[::-1], gradients[::-1], strict=True):
        if layer.as_map(gradient).any():
            return layer
    raise NoMap("the scores do not depend on the tokens of patches in the last layers")


def _maps(model: nn.Module, image: Tensor) -> list[Layer]:
    """The outputs that are maps of a (1, 3, S, S) image in the order in which they come."""
    calls: dict[nn.Module, int] = {}
    found: list[Layer] = []
    grid, width = (image.shape[2], image.shape[3]), 0

    def after(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal grid, width
        calls[module] = calls.get(module, -1) + 1
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.shape[0] != 1:
            return
        read = _read(output, grid, width)
        if read is not None:
            layout, grid, width = read
            found.append(Layer(module, calls[module], grid, layout))
        elif output.dim() == 3 and output.shape[1] not in (1, *_tokens(grid)):
            # Tokens in another order, or others than before: what follows has lost its places.
            found.clear()

    with torch.no_grad(), _hooked(model.modules(), after):
        model(image)
    return found


def _read(output: Tensor, grid: tuple[int, int], width: int) -> tuple[str, tuple[int, int], int] | None:
    """Layout, grid and width of what a layer makes of a square image, None where it is no map.

    Args:
        output: (1, ...).
        grid: of the last map before; no map is finer, as a matrix of tokens by tokens is.
        width: its channels; tokens have the width of the map that they were made of.
    """
    if output.dim() == 4:
        _, a, b, c = output.shape
        for layout, place, channels in (("NCHW", (b, c), a), ("NHWC", (a, b), c)):
            if 1 < place[0] == place[1] <= grid[0]:
                return layout, place, channels
    elif output.dim() == 3 and output.shape[1] in _tokens(grid) and output.shape[2] == width:
        return "tokens", grid, width
    return None


def _tokens(grid: tuple[int, int]) -> range:
    """How many tokens there can be of a grid: before them may stand those of the class, and registers."""
    places = math.prod(grid)
    return range(places, places + 1 + _BEFORE) if places > 1 else range(0)


def grad_cam(model: nn.Module, layer: Layer, images: Tensor, classes: Tensor) -> Tensor:
    """What speaks for a class in each image.

    Args:
        model: (N, 3, H, W) to (N, C) scores, in eval mode.
        layer: as ``last_map`` says.
        images: (N, 3, H, W).
        classes: (N,) class numbers.

    Returns:
        (N, h, w), not negative, of the feature map's size.

    Raises:
        NoMap: the scores do not depend on it smoothly.
    """
    scores, outputs = _recorded(model, [layer], images)
    (gradient,) = _gradients(scores, classes, outputs)
    weights = layer.as_map(gradient).mean(dim=(2, 3), keepdim=True)
    return (weights * layer.as_map(outputs[0].detach())).sum(dim=1).relu()


def _gradients(scores: Tensor, classes: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Those of the score of each image's class by ``outputs``."""
    if scores.dim() != 2 or not scores.requires_grad:
        raise NoMap("the head does not say which way its scores go")
    chosen = nn.functional.one_hot(classes, scores.shape[1]).to(scores.dtype)
    return torch.autograd.grad(scores, outputs, chosen, materialize_grads=True)


def _recorded(model: nn.Module, layers: Sequence[Layer], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Scores, and the outputs that they can be differentiated by: those of ``layers``, in the order of their calls."""
    calls: dict[nn.Module, int] = {}
    outputs: list[Tensor] = []

    def after(module: nn.Module, _: Any, output: Any) -> Tensor | None:
        calls[module] = calls.get(module, -1) + 1
        if not any(layer[:2] == (module, calls[module]) for layer in layers):
            return None
        # Only what follows is recorded: memory is that of the end of the network.
        torch.set_grad_enabled(True)
        outputs.append(output if output.requires_grad else output.detach().requires_grad_())
        # Not the same tensor, which somebody may change in place.
        made: Tensor = outputs[-1].clone()
        return made

    with torch.no_grad(), _hooked({layer.module for layer in layers}, after):
        return model(images), outputs


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
