"""Attention within windows: torchvision's Swin of both versions and MaxViT, and what looks like them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import MaxVit, SwinTransformer
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformerBlockV2,
)

import cnnrs
from cnnrs import _cnnrs
from cnnrs.model.lowering import Lowered, lower
from cnnrs.model.operations import Unsupported
from cnnrs.model.player import play


def seeded(model: nn.Module) -> nn.Module:
    """With weights of ordinary size: the first ones leave scores, and what is added to them, near zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("logit_scale"):
                parameter.uniform_(1.0, 5.0)
            elif name.endswith("relative_position_bias_table"):
                parameter.normal_(0.0, 2.0)
            elif parameter.ndim > 1:
                nn.init.xavier_normal_(parameter, 2.0)
            else:
                parameter.normal_(0.0, 0.5)
        for module in model.modules():
            if isinstance(module, ShiftedWindowAttentionV2) and module.qkv.bias is not None:
                module.qkv.bias[len(module.qkv.bias) // 3 :][: len(module.qkv.bias) // 3].zero_()
    return model.eval()


def swin(window: tuple[int, int] = (4, 4), **kwargs: Any) -> nn.Module:
    return seeded(SwinTransformer([2, 2], 32, [2, 2], [2, 2], list(window), num_classes=5, **kwargs))


def swin_v2(window: tuple[int, int] = (4, 4)) -> nn.Module:
    return swin(window, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def maxvit() -> nn.Module:
    # Of 32 x 32 pixels: 16, then 8 x 8, four windows and one.
    return seeded(MaxVit((32, 32), 16, 4, [32, 64], [1, 2], 16, 0.2, num_classes=5))


#: The model, and the sizes of its images: whole windows, padding, windows that are larger than what there is.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, int]]]] = {
    "swin": (swin, [(32, 32), (30, 18), (6, 26), (6, 6)]),
    "swin of oblong windows": (partial(swin, (3, 5)), [(24, 20)]),
    "swin_v2": (swin_v2, [(32, 32), (30, 18), (6, 26)]),
    "maxvit": (maxvit, [(32, 32)]),
}


def lowered(model: nn.Module, size: tuple[int, int] = (32, 32)) -> Lowered:
    return lower(model.eval(), False, (3, *size))


def features_of(model: nn.Module, images: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    features, _ = cnnrs.preconv([(images, torch.zeros(len(images)))], model, verbose=False, **kwargs)
    return features


def error(features: torch.Tensor, exact: torch.Tensor) -> float:
    return float((features.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_like_the_module(name: str) -> None:
    make, sizes = MODELS[name]
    model = make()
    for number, size in enumerate(sizes):
        images = torch.randn((3, 8, 1, 2)[number], 3, *size)
        features, theirs = features_of(model, images, engine="cpu"), model(images)
        exact = copy.deepcopy(model).double()(images.double())
        # State today: 0.7 to 1.5 times eager's error.
        assert error(features, exact) < 5 * error(theirs, exact), size
        found = lowered(model, size)
        torch.testing.assert_close(play(found, found.tensors, images), theirs, rtol=1e-4, atol=1e-4)
        assert cnnrs.explain(model, images.shape).preconv == "cpu"


@torch.no_grad()
def test_maps_before_the_pooling_with_their_channels_last() -> None:
    model, images = swin(), torch.randn(2, 3, 30, 18)
    for part in (model.features, nn.Sequential(model.features, model.norm, model.permute)):
        features = features_of(part, images, engine="cpu")
        torch.testing.assert_close(features, part(images), rtol=1e-4, atol=1e-4)


def test_windows_are_one_operation() -> None:
    found = lowered(swin())
    kinds = [kind for _, kind, _, _ in found.operations]
    assert kinds.count("WindowAttention") == 4 and kinds.count("PatchMerging") == 1
    assert not {"View", "Softmax", "ZeroPad2d", "Split"} & set(kinds)
    rows = cnnrs.summary(swin(), (2, 3, 32, 32)).layers
    attention = next(row for row in rows if row.kind == "WindowAttention")
    # Two products of 16 tokens by 16 in each of 16 windows; bias and softmax: 4 operations per score of 2 heads.
    assert attention.output_shape == (2, 16, 16, 32)
    assert attention.flops == 2 * 16 * (4 * 16 * 16 * 32 + 4 * 2 * 16 * 16)


@pytest.mark.parametrize("make", [swin, swin_v2])
@torch.no_grad()
def test_weights_that_change_count(make: Callable[[], nn.Module]) -> None:
    model, images = make(), torch.randn(2, 3, 32, 32)
    features_of(model, images, engine="cpu")
    changed = 0
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("relative_position_bias_table", "logit_scale", "cpb_mlp")):
            parameter.detach().numpy()[...] *= 1.5
            before = features_of(model, images, engine="cpu")
            torch.testing.assert_close(before, model(images), rtol=1e-4, atol=1e-4)
            changed += 1
    assert changed >= 4


# -- what is not lowered -----------------------------------------------------------------------------------------


def first(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, ShiftedWindowAttention))


def other_index(model: nn.Module) -> None:
    index = first(model).relative_position_index
    index.copy_(index.flip(0))


def transposed_bias(model: nn.Module) -> None:
    index = first(model).relative_position_index
    index.copy_(index.view(16, 16).T.flatten())


def far_shift(model: nn.Module) -> None:
    first(model).shift_size = [5, 5]


def one_shift(model: nn.Module) -> None:
    first(model).shift_size = [2, 0]


def other_shift(model: nn.Module) -> None:
    first(model).shift_size = [1, 3]


def negative_shift(model: nn.Module) -> None:
    first(model).shift_size = [-1, 1]


def own_bias(model: nn.Module) -> None:
    bias = torch.randn(1, 2, 16, 16)
    first(model).get_relative_position_bias = lambda: bias


def other_heads(model: nn.Module) -> None:
    first(model).num_heads = 1
    first(model).relative_position_bias_table = nn.Parameter(torch.randn(49, 1))


def broadcast_bias(model: nn.Module) -> None:
    first(model).relative_position_bias_table = nn.Parameter(torch.randn(49, 1))


class Subclass(ShiftedWindowAttention):
    """Adds its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x  # type: ignore[no-any-return]


def subclass(model: nn.Module) -> None:
    first(model).__class__ = Subclass


def other_projection(model: nn.Module) -> None:
    class Twice(nn.Linear):
        pass

    first(model).proj.__class__ = Twice


def key_summand(model: nn.Module) -> None:
    nn.init.ones_(first(model).qkv.bias)


def other_curve(model: nn.Module) -> None:
    first(model).cpb_mlp[1] = nn.GELU()


def another_layer(model: nn.Module) -> None:
    first(model).cpb_mlp.append(nn.Linear(2, 2))


def wide_logit(model: nn.Module) -> None:
    first(model).logit_scale = nn.Parameter(torch.ones(1, 1, 1))


CHANGES: list[tuple[Callable[[], nn.Module], Callable[[nn.Module], None], bool]] = [
    (swin, other_index, False), (swin, transposed_bias, False), (swin, far_shift, False),
    (swin, one_shift, True), (swin, other_shift, True), (swin, negative_shift, False),
    (swin, own_bias, False), (swin, other_heads, True), (swin, broadcast_bias, False),
    (swin, subclass, False), (swin, other_projection, False), (swin_v2, key_summand, False),
    (swin_v2, other_curve, False), (swin_v2, another_layer, False), (swin_v2, wide_logit, False),
]  # fmt: skip


@pytest.mark.parametrize("make, change, native", CHANGES)
@torch.no_grad()
def test_layers_that_look_alike(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], None], native: bool
) -> None:
    model, images = make(), torch.randn(2, 3, 16, 16)
    change(model)
    assert (cnnrs.explain(model, images.shape).preconv == "cpu") == native
    features = features_of(model, images)
    torch.testing.assert_close(features, model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["attention_dropout", "dropout"])
def test_dropout_counts_in_training_mode(name: str) -> None:
    model = swin()
    setattr(first(model), name, 0.5)
    lower(model, False, (3, 32, 32))
    first(model).train()
    with pytest.raises(Unsupported, match="call eval"):
        lower(model, False, (3, 32, 32))


def test_training_and_images_of_any_size_are_as_before() -> None:
    for image in (None, (3, 32, 32)):
        with pytest.raises(Unsupported, match="computes with"):
            lower(swin(), gradients=True, image=image)


@torch.no_grad()
def test_images_of_another_size_are_another_maxvit() -> None:
    model = maxvit()
    assert cnnrs.explain(model, (2, 3, 64, 64)).preconv == "python"
    assert cnnrs.explain(model, (2, 3, 32, 32)).preconv == "cpu"


def test_heads_of_other_sizes_are_named() -> None:
    model = SwinTransformer([2, 2], 48, [1, 1], [2, 2], [4, 4], num_classes=5).eval()
    found = lowered(model)
    obstacle = _cnnrs.CpuNetwork.obstacle(found.graph, found.tensors, [2, 3, 32, 32])
    assert obstacle is not None and "has heads of 24 channels, no multiple of 16" in obstacle


# -- timm's ----------------------------------------------------------------------------------------------------


def timms(size: int = 48, **kwargs: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    shape = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 2), "window_size": 6, "num_classes": 0}
    model: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", img_size=size, **shape, **kwargs)
    return seeded(model)


@pytest.mark.parametrize("kwargs", [{}, {"strict_img_size": False}, {"always_partition": True}])
@torch.no_grad()
def test_timms(kwargs: dict[str, Any]) -> None:
    # 12 x 12, then 6 x 6: four windows and one, which has no shift unless it is always partitioned.
    size = 96 if kwargs.get("always_partition") else 48
    model, images = timms(size, **kwargs), torch.randn(3, 3, size, size)
    features, theirs = features_of(model, images, engine="cpu"), model(images)
    exact = copy.deepcopy(model).double()(images.double())
    assert error(features, exact) < 5 * error(theirs, exact)


def shifted(model: nn.Module) -> Any:
    return model.get_submodule("layers.0.blocks.1")


def other_mask(model: nn.Module) -> None:
    shifted(model).attn_mask *= 2


def no_mask(model: nn.Module) -> None:
    shifted(model).attn_mask = None


def other_shift_than_mask(model: nn.Module) -> None:
    shifted(model).shift_size = (2, 2)


def own_path(model: nn.Module) -> None:
    class DropPath(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    shifted(model).drop_path1 = DropPath()


def other_scale(model: nn.Module) -> None:
    shifted(model).attn.fused_attn, shifted(model).attn.scale = False, 0.5


@pytest.mark.parametrize("change", [other_mask, no_mask, other_shift_than_mask, own_path, other_scale])
@torch.no_grad()
def test_timms_that_look_alike(change: Callable[[nn.Module], None]) -> None:
    model, images = timms(), torch.randn(2, 3, 48, 48)
    change(model)
    assert (cnnrs.explain(model, images.shape).preconv == "cpu") == (change is other_scale)
    torch.testing.assert_close(features_of(model, images), model(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_timms_of_sizes_that_it_pads() -> None:
    # It rolls before it pads, so that padding is in the middle; a mask over one window.
    for size, kwargs in ((56, {}), (48, {"always_partition": True})):
        model, images = timms(size, **kwargs), torch.randn(2, 3, size, size)
        assert cnnrs.explain(model, images.shape).preconv == "python"
        torch.testing.assert_close(features_of(model, images), model(images), rtol=1e-4, atol=1e-4)
