"""Any network as a frozen backbone: by name or as a module, cut at any layer, with the transform its weights want."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from cnnrs.cache import kept_ops
from cnnrs.cut import cut
from cnnrs.transforms import lower
from cnnrs.weights import find

POOLS = ("avg", "max", "cls")


class Backbone(nn.Module):
    """Images to features.

    Attributes:
        body: (N, 3, H, W) images to what the chosen layer returns.
        pool: the layer's output to (N, C), or nothing.
        name: what it is, in words.
        transform: what makes an image of a file as the weights want it; None when nobody knows.
    """

    def __init__(
        self, body: nn.Module, pool: nn.Module, name: str = "", transform: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__()
        self.body = body
        self.pool = pool
        self.name = name
        self.transform = transform

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) images to features."""
        features: torch.Tensor = self.pool(self.body(x))
        return features


def backbone(
    model: nn.Module | str, layer: str | None = None, pool: str | None = None, weights: Any = "DEFAULT"
) -> Backbone:
    """A network up to one of its layers, to be run once over many images.

    Args:
        model: a module (shared, not copied); or the name of a model of torchvision, of timm (``"timm/<name>"`` where
            both have it), or ``"efficientnet_lite0"`` (from the packages of that name on PyPI).
        layer: path of the module whose output is taken, as ``named_modules()`` lists it: ``"features.29"``,
            ``"layer3"``, ``"encoder"``. None: the whole of a module; of a model by name everything before its last
            linear layer, or, with ``pool``, before its own pooling. A module that ``forward`` calls more than once is
            an error, or its first call where ``forward`` cannot be traced.
        pool: ``"avg"`` or ``"max"`` of (N, C, H, W) or of (N, tokens, C) to (N, C); ``"cls"``: the first token.
        weights: of a model by name: torchvision's names (``"DEFAULT"``, ``"IMAGENET1K_V1"``) or objects, downloaded to
            torch's cache when they are not there; a ``.pth`` or ``.safetensors`` file; None for random numbers.

    Returns:
        A :class:`Backbone`; its ``transform`` prepares images as the weights want them.

    Raises:
        ValueError: unknown names, layers or poolings; weights that do not fit.
        FileNotFoundError: the weights are nowhere and cannot be downloaded; says what is wanted and where it goes.

    >>> import torch, cnnrs
    >>> cnnrs.backbone(cnnrs.models.SimpleCNN(), "conv3", "avg")(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 128])
    """
    if pool is not None and pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(map(repr, POOLS))} or None, got {pool!r}")
    name, transform, own = "", None, model
    if isinstance(model, str):
        found = find(model, weights)
        name, transform, own = found.name, found.transform, found.model
        if layer is None:
            layer = found.before_pooling(pool)
    elif isinstance(model, Backbone):
        name, transform = model.name, model.transform
    if not isinstance(own, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    body = own if layer is None else cut(own, layer)
    return Backbone(
        body, _pooling(pool, body, _channels_last(own, layer)), " ".join(filter(None, (name, layer, pool))), transform
    )


def resolve(model: nn.Module | str, layer: str | None, pool: str | None, weights: Any) -> nn.Module:
    """`backbone`, unless it is a module that is to be used as it is."""
    if isinstance(model, nn.Module) and layer is None and pool is None:
        return model
    return backbone(model, layer, pool, weights)


# -- pooling -------------------------------------------------------------------------------------------------


def _channels_last(model: nn.Module, layer: str | None) -> bool:
    """Whether four dimensions are (N, H, W, C), which their sizes do not tell."""
    from torchvision.models import SwinTransformer

    if isinstance(model, SwinTransformer):
        # All but the convolution that cuts the image into patches.
        return layer is not None and layer.partition(".")[0] in ("features", "norm") and layer != "features.0.0"
    # What timm's models say of themselves.
    return getattr(model, "output_fmt", None) == "NHWC"


def _pooling(pool: str | None, body: nn.Module, channels_last: bool) -> nn.Module:
    if pool is None:
        return nn.Identity()
    if channels_last:
        return _Pool(pool, channels_last)
    # Layers that the engines know, where the output is certain to be a picture.
    if pool == "avg" and _makes_pictures(body):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return _Pool(pool)


def _makes_pictures(body: nn.Module) -> bool:
    last = next((module for module in reversed(list(body.modules())) if not list(module.children())), None)
    if isinstance(body, torch.fx.GraphModule):
        (output,) = (node for node in body.graph.nodes if node.op == "output")
        made = output.args[0]
        if isinstance(made, torch.fx.Node) and made.op == "call_module":
            inner = list(body.get_submodule(str(made.target)).modules())
            last = inner[-1] if made.target and inner else last
    pictures = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)
    return isinstance(last, pictures) or (
        isinstance(last, (nn.ReLU, nn.SiLU, nn.Hardswish, nn.ReLU6))
        and not any(isinstance(module, nn.Linear) for module in body.modules())
    )


class _Pool(nn.Module):
    def __init__(self, kind: str, channels_last: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.channels_last = channels_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) or (N, tokens, C), with `channels_last` (N, H, W, C), to (N, C)."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"pool={self.kind!r} takes one tensor, this layer returns a {type(x).__name__}")
        if self.channels_last and x.dim() == 4:
            x = x.flatten(1, 2)
        if self.kind == "cls":
            if x.dim() != 3:
                raise ValueError(f'pool="cls" takes the first of (N, tokens, C), this layer returns {tuple(x.shape)}')
            return x[:, 0]
        if x.dim() not in (3, 4):
            raise ValueError(
                f"pool={self.kind!r} takes (N, C, H, W) or (N, tokens, C), this layer returns {tuple(x.shape)}: leave "
                "pool out, or take an earlier layer"
            )
        x = x.flatten(2) if x.dim() == 4 else x.transpose(1, 2)
        return x.mean(dim=2) if self.kind == "avg" else x.amax(dim=2)

    def extra_repr(self) -> str:
        return self.kind + (", channels last" if self.channels_last else "")


# -- transforms ----------------------------------------------------------------------------------------------


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
