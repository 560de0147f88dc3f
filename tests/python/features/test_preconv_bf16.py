"""`preconv(precision="bf16")` on the CPU: engine `cpu` where the processor has the instruction, autocast elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import VisionTransformer

import cnnrs
from cnnrs.engine import verify
from cnnrs.errors import UnsupportedModelError


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that has it; others compute the same by portable code."""
    monkeypatch.setattr("cnnrs.engine.cpu_inference.bf16_is_fast", lambda: True)


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnrs.engine.cpu_inference.bf16_is_fast", lambda: False)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 1), nn.BatchNorm2d(32), nn.GELU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    ).eval()  # fmt: skip


@pytest.fixture
def photos() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(40, 3, 20, 20, generator=generator), torch.arange(40) % 3)


def run(data: Any, model: nn.Module, out: Path | None = None, **options: Any) -> cnnrs.Features:
    return cnnrs.preconv(data, model, out, **{"verbose": False, "precision": "bf16", **options})


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("engine", ["auto", "cpu"])
def test_features_are_near_those_in_float32(photos: TensorDataset, model: nn.Module, engine: Any) -> None:
    exact = run(photos, model, precision=None).features
    found = run(photos, model, engine=engine, dtype="float32").features
    # Two of the four convolutions are rounded: each by up to 2^-9 of both factors.
    assert found.dtype == torch.float32 and 0 < apart(found, exact) < 2 * 2 * 2**-9
    rows = run(photos, model, engine=engine).features
    assert rows.dtype == torch.bfloat16 and torch.equal(rows, found.bfloat16())


@pytest.mark.usefixtures("native")
def test_vision_transformers_of_any_size(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128)
    model.heads = nn.Identity()
    images, labels = torch.randn(4, 3, 32, 32), torch.zeros(4)
    exact = run([(images, labels)], model.eval(), precision=None).features
    found = run([(images, labels)], model, dtype="float32", verbose=True).features
    assert 0 < apart(found, exact) < 8 * 2 * 2**-9
    assert "autocast" not in capsys.readouterr().out
    said = str(cnnrs.explain(model, (4, 3, 32, 32), precision="bf16"))
    assert "precision='bf16': 8 of 9 convolutions and linear layers, all others in float32:\n" in said


@pytest.mark.usefixtures("native")
def test_layers_of_other_algorithms_stay_in_float32(model: nn.Module) -> None:
    # The first layer, and Winograd's.
    said = str(cnnrs.explain(model, (2, 3, 20, 20), precision="bf16"))
    assert "precision='bf16': 2 of 4 convolutions and linear layers, all others in float32:\n  - 2\n  - 7" in said


@pytest.mark.usefixtures("lacking")
def test_without_the_instruction_it_is_autocast(photos: TensorDataset, model: nn.Module) -> None:
    found = run(photos, model, batch_size=40).features
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(photos.tensors[0])
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"takes a processor with AVX512-BF16: use engine=.auto."):
        run(photos, model, engine="cpu")
    said = str(cnnrs.explain(model, (2, 3, 20, 20), precision="bf16"))
    assert said.endswith("autocast of the module by PyTorch, because this processor has no AVX512-BF16")


@pytest.mark.usefixtures("native")
def test_models_that_the_engine_cannot_run_are_autocast(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()

    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return plain(x * float(x.mean()))

    batches = [(torch.randn(2, 3, 8, 8), torch.zeros(2))]
    for model, why in ((plain, "no layer would compute in bfloat16"), (Reads().eval(), "operations that engine 'cpu'")):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = model(batches[0][0])
        assert torch.equal(run(batches, model, verbose=True).features, expected)
        said = capsys.readouterr().out
        assert "precision='bf16' is PyTorch's autocast here, because" in said and why in said
        with pytest.raises(UnsupportedModelError):
            run(batches, model, engine="cpu")


def test_autocast_is_another_store(
    photos: TensorDataset, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(fast: bool) -> Any:
        monkeypatch.setattr("cnnrs.engine.cpu_inference.bf16_is_fast", lambda: fast)
        run(photos, model, tmp_path / "f")
        return json.loads((tmp_path / "f" / "meta.json").read_text())["key"]["precision"]

    assert key(True) == "bf16, engine cpu" and key(False) == "bf16"
    monkeypatch.setattr("cnnrs.engine.cpu_inference.bf16_is_fast", lambda: True)
    run(photos, model, tmp_path / "f", engine="python")
    assert json.loads((tmp_path / "f" / "meta.json").read_text())["key"]["precision"] == "bf16"


@pytest.mark.usefixtures("native")
def test_a_network_that_makes_roundings_larger_says_so(photos: TensorDataset, model: nn.Module) -> None:
    last = model[7]
    assert isinstance(last, nn.Conv2d)
    with torch.no_grad():
        # Differences of channels that are nearly the same.
        model[2].weight[1::2] = model[2].weight[::2]  # type: ignore[index]
        model[2].bias[1::2] = model[2].bias[::2] + 1e-3  # type: ignore[index]
        model[3] = nn.Identity()  # type: ignore[index]
        model[5], model[6] = nn.Identity(), nn.Identity()  # type: ignore[index]
        last.weight[:, 1::2] = -last.weight[:, ::2]
        last.bias.zero_()  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match=r"precision='bf16': the features are [\d.]+ % away"):
        run(photos, model)


def test_fp16_is_not_engine_cpu(photos: TensorDataset, model: nn.Module) -> None:
    with pytest.raises(ValueError, match="precision='fp16' is autocast of the module itself"):
        run(photos, model, engine="cpu", precision="fp16")


@pytest.mark.usefixtures("native")
def test_rows_do_not_depend_on_the_size_that_comes_first(model: nn.Module) -> None:
    """Which convolutions are Winograd's depends on the size."""
    torch.manual_seed(0)
    batches = [(torch.randn(2, 3, size, size), torch.zeros(2)) for size in (8, 48)]
    found = [run(data, model).features for data in (batches, batches[::-1])]
    assert torch.equal(found[0][:2], found[1][2:]) and torch.equal(found[0][2:], found[1][:2])


class Sized(nn.Module):
    """Something else for larger images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.small, self.large = (nn.Conv2d(n, 32, 1) for n in (3, 32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = (self.small if x.shape[2] < 20 else self.large)(self.first(x).relu()).mean((2, 3))
        return y


@pytest.mark.usefixtures("native")
def test_every_size_is_compared_with_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, differs = [], verify.differs

    def spy(model: nn.Module, lowered: Any, inputs: torch.Tensor, **options: Any) -> str | None:
        sizes.append(inputs.shape[2])
        return differs(model, lowered, inputs, **options)

    monkeypatch.setattr(verify, "differs", spy)
    model = Sized().eval()
    batches = [(torch.randn(2, 3, size, size), torch.zeros(2)) for size in (16, 24)]
    found = run(batches, model, dtype="float32").features
    with torch.no_grad():
        assert apart(found, torch.cat([model(images) for images, _ in batches])) < 3 * 2**-9
    assert sizes == [16, 24]
