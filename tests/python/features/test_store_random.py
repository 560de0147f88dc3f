"""Models that draw random numbers in eval mode: computed, said, and marked in the folder."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision import transforms

import cnnrs

PICTURES = TensorDataset(torch.rand(8, 1, 6, 6), torch.arange(8))


class Always(nn.Module):
    """Monte Carlo dropout, or the argument that everybody forgets."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x)


class Python(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * random.random()


class Numpy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + float(np.random.rand())


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


RANDOM = {
    ("torch", Always): "dropout that is always on",
    ("auto", Always): "dropout that is always on",
    ("python", Always): "PyTorch's generator",
    ("python", Noise): "PyTorch's generator",
    ("python", Python): "Python's generator",
    ("python", Numpy): "NumPy's generator",
}


@pytest.mark.parametrize(("engine", "model"), RANDOM)
def test_a_model_that_draws_is_said_and_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: Any, model: type[nn.Module]
) -> None:
    why = RANDOM[engine, model]
    loader = cnnrs.DataLoader(PICTURES, batch_size=4)
    for out in (None, tmp_path / "f"):
        with pytest.warns(UserWarning, match=f"drawn at random, although it is in eval mode: .*{why}"):
            first = cnnrs.preconv(loader, model(), out=out, engine=engine)
    assert why in json.loads((tmp_path / "f" / "meta.json").read_text())["random"]
    capsys.readouterr()
    again = cnnrs.preconv(loader, model(), out=tmp_path / "f", engine=engine)
    assert torch.equal(again.features, first.features)
    assert "were drawn at random and are kept as they are" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["python", "torch"])
def test_a_model_that_does_not_draw_is_not(folder: Path, tmp_path: Path, engine: Any) -> None:
    """Also where the loader's own threads do."""
    noisy = transforms.Compose(
        [transforms.Resize((8, 8)), transforms.ToTensor(), transforms.Lambda(lambda x: x + torch.rand(()))]
    )
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout(), nn.ReLU())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cnnrs.preconv(cnnrs.ImageFolder(folder, noisy), model, out=tmp_path / "f", engine=engine, batch_size=4)
    assert not [one for one in caught if "drawn at random" in str(one.message)]
    assert "random" not in json.loads((tmp_path / "f" / "meta.json").read_text())
    with pytest.warns(UserWarning, match="drawn at random"):
        cnnrs.preconv(cnnrs.ImageFolder(folder, noisy), Always(), engine="python", batch_size=4)
