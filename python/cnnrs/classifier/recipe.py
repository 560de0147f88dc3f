"""Python to copy from a report: how a run is opened."""

from __future__ import annotations

import json
import re
from typing import Any, Protocol

from torch import nn

from cnnrs.classifier.heads import Preprocessing
from cnnrs.classifier.names import CARD, MODEL
from cnnrs.classifier.neighbours import Neighbours
from cnnrs.layers import last_linear

_LITE0 = "efficientnet_lite0"
_MLP = [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]


class Made(Protocol):
    """What a recipe needs to know of a :class:`cnnrs.Run`."""

    model: nn.Module
    classes: list[str]
    preprocessing: Preprocessing
    backbone: str
    head: str
    options: dict[str, Any]
    read: dict[str, Any]
    multilabel: bool


def recipe(run: Made, folder: str = "RUN", photo: str = "photo.jpg") -> str:
    """Python that opens a classifier, with cnnrs, and without it where plain PyTorch can build the network.

    Args:
        run: the classifier.
        folder: of the run.
        photo: a file to try it on.
    """
    shown = "labels" if run.multilabel else "label, predictions[0].probability"
    with_cnnrs = f"""\
import cnnrs

run = cnnrs.load_run({_quoted(folder)})
predictions, unreadable = run.predict({_quoted(photo)})
print(predictions[0].{shown})"""
    built = _built(run)
    if built is None:
        return with_cnnrs
    imports, lines = built
    shape = run.preprocessing
    return f"""\
{with_cnnrs}

# without cnnrs
import json

import torch
{imports}
from PIL import Image, ImageOps
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
{_opened(run, photo)}
with torch.no_grad():
    scores = model(transform(photo)[None])[0]
card = json.load(open({_quoted(f"{folder}/{CARD}")}, encoding="utf-8"))
{_SEVERAL if run.multilabel else _ONE}"""


_ONE = """\
probabilities = scores.softmax(dim=0)
print(card["classes"][probabilities.argmax()], probabilities.max().item())"""

_SEVERAL = """\
for name, probability, threshold in zip(card["classes"], scores.sigmoid().tolist(), card["thresholds"]):
    if probability >= threshold:
        print(name, probability)"""


def _opened(run: Made, photo: str) -> str:
    """The lines that make a picture in RGB of a file, as the run reads it."""
    lines = [f"photo = Image.open({_quoted(photo)})"]
    if page := run.read.get("page"):
        lines.append(f"photo.seek({page})")
    if run.read.get("exif"):
        lines.append("photo = ImageOps.exif_transpose(photo)")
    if (scale := run.read.get("scale", "none")) != "none":
        lines.append(f"# 16-bit and float images come out wrong here: cnnrs read them with scale={_quoted(scale)}.")
    return "\n".join([*lines, 'photo = photo.convert("RGB")'])


def _built(run: Made) -> tuple[str, str] | None:
    """An import, and the lines that build the network with random weights; None where only cnnrs can."""
    import torchvision

    name = run.backbone
    if name in torchvision.models.list_models(module=torchvision.models):
        # Its builders end in a layer for as many classes as they are told.
        options = {"num_classes": len(run.classes), **run.options}
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        imported, made = "import torchvision", f"model = torchvision.models.{name}({given})"
        end: str | None = _end(run.model) if run.head in ("mlp", "knn") else ""
    elif name == _LITE0:
        imported = "from efficientnet_lite_pytorch import EfficientNet"
        made, end = 'model = EfficientNet.from_name("efficientnet-lite0")', _end(run.model)
    else:
        made = f"model = timm.create_model({_quoted(name.removeprefix('timm/'))})\nmodel.reset_classifier(0)"
        imported, end = "import timm", _end(run.model)
    return None if end is None else (imported, f"{made}\n{end}".rstrip())


def _end(model: nn.Module) -> str | None:
    """The lines that put the trained head's layers into a network; None where they are of other kinds."""
    voters = [(path, module) for path, module in model.named_modules() if isinstance(module, Neighbours)]
    if voters:
        ((path, head),) = voters
        return f"{_voting(head)}\n{_place(path)} = Neighbours()"
    try:
        _, _, last = last_linear(model)
    except ValueError:
        return None
    path = next(name for name, module in model.named_modules() if module is last)
    layer: nn.Module = last
    above, _, _ = path.rpartition(".")
    if above and [type(child) for child in model.get_submodule(above).children()] == _MLP:
        path, layer = above, model.get_submodule(above)
    return f"{_place(path)} = {_said(layer)}"


def _voting(head: Neighbours) -> str:
    """A class that does what a head of rows that vote does, whose state fits it."""
    rows, width = head.rows.shape
    if head.several:
        scores = ["scores = (total + 1).log() - (total - votes.sum(dim=1) + 1).log()"]
    else:
        scores = [
            "# A class whose photos are more similar wins among those of as many votes.",
            f"order = torch.linspace(0.5, 0, {head.k})[:, None]",
            "scores = (total + (votes * order).amax(dim=1) + 1).log()",
        ]
    said = "\n".join(f"        {line}" for line in scores)
    return f"""
class Neighbours(torch.nn.Module):
    \"""The {head.k} most similar of {rows} photos vote.\"""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros({rows}, {width}, dtype={head.rows.dtype}))
        self.register_buffer("votes", torch.zeros({rows}, {head.votes.shape[1]}))
        self.register_buffer("sharpness", torch.ones(()))

    def forward(self, x):
        x = torch.nn.functional.normalize(x, dim=1)
        votes = self.votes[(x @ self.rows.float().T).topk({head.k}).indices]
        total = votes.clamp(min=0).sum(dim=1)
{said}
        return scores * self.sharpness

"""


def _place(path: str) -> str:
    return re.sub(r"\.(\d+)", r"[\1]", f"model.{path}")


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
