"""What a report says of timm's networks: how to use them without cnnrs, and what they look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cnnrs.app.cli import main
from cnnrs.app.report.activation import activation_maps, grad_cam, last_map
from cnnrs.classifier.run_folder import load_run
from fruit import fruit, plain_answers

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "head"),
    [("vit_tiny_patch16_224", "linear"), ("convnext_atto", "mlp"), ("regnetx_002", "knn")],
)
def test_recipe_and_maps(name: str, head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
    photos = fruit(tmp_path / "fruit", 3)
    arguments = ["--backbone", f"timm/{name}", "--weights", str(tmp_path / "weights.pth"), "--head", head]
    assert main(["train", str(photos), *arguments, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    run = load_run(tmp_path / "run")
    photo = photos / "plum" / "00.jpg"
    (ours,), _ = run.predict(photo)
    ((label, probability),) = plain_answers(run, tmp_path / "run", photo)
    # The same network on the same pixels, by another engine: float32 rounding.
    assert label == ours.label and probability == pytest.approx(ours.probability, abs=1e-4)
    if head != "knn":
        assert list(activation_maps(run, [(str(photo), 1)])) == [str(photo)]


@pytest.mark.parametrize(
    ("name", "where", "layout", "grid"),
    [
        # The class token is looked at: the last tokens of patches that matter are those before the last attention.
        ("vit_tiny_patch16_224", "blocks.11.norm1", "tokens", (14, 14)),
        # The mean of all but one that is no patch.
        ("vit_wee_patch16_reg1_gap_256", "norm", "tokens", (16, 16)),
        ("swin_tiny_patch4_window7_224", "norm", "NHWC", (7, 7)),
        ("convnext_atto", "norm_pre", "NCHW", (7, 7)),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_which_map(name: str, where: str, layout: str, grid: tuple[int, int], fused: bool) -> None:
    torch.manual_seed(0)
    timm.layers.set_fused_attn(fused)
    try:
        model = timm.create_model(name, num_classes=3).eval()
    finally:
        timm.layers.set_fused_attn(True)
    side = model.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, side, side)
    layer = last_map(model, images[:1])
    assert (layer.layout, layer.grid) == (layout, grid)
    assert next(path for path, module in model.named_modules() if module is layer.module) == where
    heat = grad_cam(model, layer, images, torch.tensor([0, 1]))
    assert heat.shape == (2, *grid) and bool(heat.any())
