"""The examples of docs/preconv.md run, in order, in a folder as the text describes it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import cnnrs

DOCS = Path(__file__).resolve().parents[3] / "docs" / "preconv.md"


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for folder, number in (("train/cat", 6), ("train/dog", 6), ("valid/cat", 1)):
        (tmp_path / "cat_and_dog" / folder).mkdir(parents=True)
        for i in range(number):
            image = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            image.save(tmp_path / "cat_and_dog" / folder / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)

    def random_weights(self: torchvision.models.WeightsEnum, *_: object, **__: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return torchvision.models.resnet18(weights=None).state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", random_weights)
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(cnnrs.ray, "extract", lambda *given, **_: asked.append(given))
    namespace: dict[str, object] = {}
    code = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.M | re.S)
    assert len(code) == 5
    for block in code:
        exec(compile(block, DOCS.name, "exec"), namespace)
    assert namespace["features"].shape == (12, 512)  # type: ignore[attr-defined]
    assert len(asked) == 2 and asked[0][1] == "resnet18"
    with torch.no_grad():
        assert namespace["network"](torch.zeros(1, 3, 224, 224)).shape == (1, 2)  # type: ignore[operator]
