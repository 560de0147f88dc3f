"""Any network as a frozen backbone: by name or as a module, cut at any layer, with the transform its weights want."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import nn

from cnnrs.model.cut import cut
from cnnrs.model.weights import find

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
