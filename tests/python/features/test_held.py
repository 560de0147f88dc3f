"""Another model on the same folder: nothing is thrown away unasked."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import transforms

import cnnrs

TRANSFORM = transforms.Compose([transforms.Resize((24, 24)), transforms.ToTensor()])


def network(channels: int = 6, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def state(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def test_features_of_another_model_stay(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "train", cnnrs.ImageFolder(folder, TRANSFORM)
    first = cnnrs.preconv(data, network(), out)
    before = state(out)
    message = (
        rf"{out} holds 26 rows of Sequential, which other weights or code would replace: give "
        rf"out='{out}-sequential', or overwrite=True to throw them away"
    )
    for other in (network(seed=1), network(channels=4)):
        with pytest.raises(FileExistsError, match=message):
            cnnrs.preconv(data, other, out)
        assert state(out) == before
    named = cnnrs.backbone(cnnrs.models.SimpleCNN(), "conv3", "avg")
    with pytest.raises(
        FileExistsError, match=rf"of Sequential, which conv3 avg would replace: give out='{out}-conv3-avg'"
    ):
        cnnrs.preconv(data, named, out)
    (tmp_path / "train-conv3-avg").mkdir()
    with pytest.raises(FileExistsError, match=rf"give out='{out}-conv3-avg-2'"):
        cnnrs.preconv(data, named, out)
    assert state(out) == before
    # The same model, and whatever else changes, goes on as ever.
    assert torch.equal(cnnrs.preconv(data, network(), out).features, first.features)
    assert cnnrs.preconv(data, network(), out, dtype="float16").features.dtype is torch.float16
    capsys.readouterr()
    made = cnnrs.preconv(data, named, out, overwrite=True)
    assert "because the model or its weights changed" in capsys.readouterr().out
    assert torch.equal(made.features, cnnrs.preconv(data, named).features)
    with pytest.raises(FileExistsError, match=r"holds 26 rows of conv3 avg, which Sequential would replace"):
        cnnrs.preconv(data, network(), out)


def test_rows_in_the_making_stay(folder: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "f", cnnrs.ImageFolder(folder, TRANSFORM)
    sizes: list[int] = []

    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(os.path.getsize(out / "features.journal"))
            if sizes[-1] > sizes[0]:
                raise KeyboardInterrupt
            # Rows are flushed once a second.
            time.sleep(0.1)
            return self.inner(x)

    with pytest.raises(KeyboardInterrupt):
        cnnrs.preconv(data, Stops(), out, batch_size=1, engine="python")
    with pytest.raises(FileExistsError, match=r"holds \d+ rows of Stops, which Sequential would replace"):
        cnnrs.preconv(data, network(), out)
    assert len(cnnrs.preconv(data, network(), out, overwrite=True)) == 26


def test_data_that_cannot_be_compared(tmp_path: Path) -> None:
    batches = [(torch.randn(2, 3, 8, 8), torch.arange(2))]
    cnnrs.preconv(batches, network(), tmp_path / "f")
    cnnrs.preconv(batches, network(seed=1), tmp_path / "f")
    with pytest.raises(FileExistsError, match="holds 2 rows of Sequential, which Conv2d would replace"):
        cnnrs.preconv(batches, nn.Conv2d(3, 2, 3), tmp_path / "f")
    assert cnnrs.preconv(batches, nn.Conv2d(3, 2, 3), tmp_path / "f", overwrite=True).features.shape == (2, 2, 6, 6)
