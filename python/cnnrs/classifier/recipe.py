"""Python to copy from a report: how a run is opened."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from cnnrs.classifier.heads import Preprocessing
from cnnrs.classifier.names import CARD, MODEL
from cnnrs.layers import last_linear

_LITE0 = "efficientnet_lite0"
_MLP = [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]


def recipe(
    backbone: str,
    head: str,
    model: nn.Module,
    options: Mapping[str, Any],
    shape: Preprocessing,
    folder: str = "RUN",
    photo: str = "photo.jpg",
) -> str:
    """Python that opens the classifier, with cnnrs, and without it where plain PyTorch can build the network.

    Args:
        backbone: name of the network.
        head: "linear", "mlp" or "classifier".
        model: the whole network.
        options: what torchvision's builder is called with.
        shape: what happens to a photo.
        folder: of the run.
        photo: a file to try it on.
    """
    with_cnnrs = f"""\
import cnnrs

run = cnnrs.load_run({_quoted(folder)})
predictions, unreadable = run.predict({_quoted(photo)})
print(predictions[0].label, predictions[0].probability)"""
    built = _built(backbone, head, model, options)
    if built is None:
        return with_cnnrs
    imports, lines = built
    return f"""\
{with_cnnrs}

# without cnnrs
import json

import torch
{imports}
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

{lines}
model.load_state_dict(load_file({_quoted(f"{folder}/{MODEL}")}))
model.eval()
transform = transforms.Compose([
    transforms.Resize({shape.resize}, transforms.InterpolationMode({shape.interpolation!r})),
    transforms.CenterCrop({shape.crop}),
    transforms.ToTensor(),
    transforms.Normalize(
        {list(shape.mean)},
        {list(shape.std)},
    ),
])
photo = Image.open({_quoted(photo)}).convert("RGB")
with torch.no_grad():
    probabilities = model(transform(photo)[None]).softmax(dim=1)[0]
classes = json.load(open({_quoted(f"{folder}/{CARD}")}, encoding="utf-8"))["classes"]
print(classes[probabilities.argmax()], probabilities.max().item())"""


def _built(backbone: str, head: str, model: nn.Module, options: Mapping[str, Any]) -> tuple[str, str] | None:
    """An import, and the lines that build the network with random weights; None where only cnnrs can."""
    import torchvision

    # torchvision's builders end in a layer for as many classes as they are told.
    end = _end(model) if head == "mlp" or backbone == _LITE0 else ""
    if head == "knn" or end is None:
        return None
    if backbone == _LITE0:
        made = 'model = EfficientNet.from_name("efficientnet-lite0")'
        return "from efficientnet_lite_pytorch import EfficientNet", f"{made}\n{end}"
    if backbone not in torchvision.models.list_models(module=torchvision.models):
        return None
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return "import torchvision", f"model = torchvision.models.{backbone}({given})" + (f"\n{end}" if end else "")


def _end(model: nn.Module) -> str | None:
    """The line that puts the trained head's layers into a network; None where they are of other kinds."""
    try:
        _, _, last = last_linear(model)
    except ValueError:
        return None
    path = next(name for name, module in model.named_modules() if module is last)
    head: nn.Module = last
    above, _, _ = path.rpartition(".")
    if above and [type(layer) for layer in model.get_submodule(above).children()] == _MLP:
        path, head = above, model.get_submodule(above)
    place = re.sub(r"\.(\d+)", r"[\1]", f"model.{path}")
    return f"{place} = {_said(head)}"


def _said(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"torch.nn.Linear({layer.in_features}, {layer.out_features})"
    if isinstance(layer, nn.Dropout):
        return f"torch.nn.Dropout({layer.p})"
    if isinstance(layer, nn.Sequential):
        return f"torch.nn.Sequential({', '.join(map(_said, layer))})"
    return f"torch.nn.{type(layer).__name__}()"


def _quoted(text: str) -> str:
    """As a literal in Python; JSON's strings are some."""
    return json.dumps(text, ensure_ascii=False)
