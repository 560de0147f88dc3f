"""Python to copy from a report: how a run is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnnrs.classifier.card import CARD, MODEL
from cnnrs.classifier.heads import Preprocessing

_WITH_CNNRS = """\
import cnnrs

run = cnnrs.load_run("RUN")
predictions, unreadable = run.predict("photo.jpg")
print(predictions[0].label, predictions[0].probability)"""


def recipe(backbone: str, head: str, options: Mapping[str, Any], shape: Preprocessing) -> str:
    """Python that opens the classifier, with cnnrs, and without it where torchvision alone can build the network.

    Args:
        backbone: name of the network.
        head: "linear", "mlp" or "classifier".
        options: what torchvision's builder is called with.
        shape: what happens to a photo.
    """
    import torchvision

    if backbone not in torchvision.models.list_models(module=torchvision.models) or head == "mlp":
        return _WITH_CNNRS
    return f"""\
{_WITH_CNNRS}

# without cnnrs
import json

import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

model = torchvision.models.{backbone}({", ".join(f"{name}={value!r}" for name, value in options.items())}).eval()
model.load_state_dict(load_file("RUN/{MODEL}"))
transform = transforms.Compose([
    transforms.Resize({shape.resize}, transforms.InterpolationMode({shape.interpolation!r})),
    transforms.CenterCrop({shape.crop}),
    transforms.ToTensor(),
    transforms.Normalize({list(shape.mean)}, {list(shape.std)}),
])
with torch.no_grad():
    probabilities = model(transform(Image.open("photo.jpg").convert("RGB"))[None]).softmax(dim=1)[0]
classes = json.load(open("RUN/{CARD}", encoding="utf-8"))["classes"]
print(classes[probabilities.argmax()], probabilities.max().item())"""
