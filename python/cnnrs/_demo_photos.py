"""The transfer road on the user's own photos: ``make demo DATA=folder BACKBONE=vgg16 WEIGHTS=file.pth``."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision import transforms

import cnnrs
from cnnrs import weights as weights_file
from cnnrs.cli.options import find_halves
from cnnrs.demo import fit_all, heading, predict, save_curves, verdict
from cnnrs.layers import last_linear


def photos(data: Path, backbone: str, weights: Path | None, epochs: int, out: Path) -> int:
    """Features of a pretrained backbone once, then a head for the classes of ``data``; returns the exit code."""
    start = time.perf_counter()
    train, valid = find_photos(data)
    classes = train.classes
    print(f"{len(train):,} training and {len(valid):,} validation photos of {', '.join(classes)}")
    model = cnnrs.replace_head(pretrained(backbone, weights), len(classes))
    parts = split(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)

    heading(f"1/2: the features of {backbone}, once")
    stores = out / "features" / f"{data.resolve().name}-{backbone}"
    train_features = cnnrs.preconv(
        cnnrs.DataLoader(train, batch_size=16), cnnrs.freeze(parts.body), out=stores / "train"
    )
    valid_features = cnnrs.preconv(cnnrs.DataLoader(valid, batch_size=16), parts.body, out=stores / "valid")
    print(f"{tuple(train_features.features.shape)} training features are in {stores.resolve()}")

    heading("2/2: train the head, put it back into the full network")
    history = fit_all(
        parts.head,
        cnnrs.DataLoader(cnnrs.FeatureDataset(*train_features), batch_size=32, shuffle=True),
        cnnrs.DataLoader(cnnrs.FeatureDataset(*valid_features), batch_size=32),
        optimizer_for(parts.head),
        epochs,
        loss_fn=F.cross_entropy,
    )
    save_curves(history, out / f"{data.resolve().name}-{backbone}.png")

    # A few batches are enough to see that head and body belong together; all of them would be the slow part again.
    checked = [(valid_features.features[:64].to(device), None)]
    from_features = predict(parts.head, checked)
    parts.join()
    loader = cnnrs.DataLoader(valid, batch_size=16)
    from_photos = predict(model, ((images.to(device), labels) for images, labels in loader), limit=4)

    print(f"\nFinished in {time.perf_counter() - start:.0f} s.")
    print(f"  {history.val_accuracy[-1]:.2f} % of the validation photos are recognised")
    same = verdict(
        "the full network predicts from the photos what the head predicts from the features",
        torch.equal(from_photos, from_features),
    )
    return 0 if same else 1


def find_photos(data: Path) -> tuple[cnnrs.ImageFolder, cnnrs.ImageFolder]:
    """Training and validation photos: ``train/`` and ``valid/`` where they exist, else every fifth photo is held back.

    Raises:
        FileNotFoundError: There is no such folder, or no class folders with images in it.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"DATA={data}: there is no such folder")
    transform = transforms.Compose(
        [
            transforms.Resize((224, 224)),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    halves = find_halves(data)
    if halves is None:
        return cnnrs.ImageFolder(data, transform).split(0.2, seed=0)
    train, valid = halves
    datasets = cnnrs.ImageFolder(train, transform), cnnrs.ImageFolder(valid, transform)
    if datasets[0].classes != datasets[1].classes:
        raise ValueError(f"{train} has the classes {datasets[0].classes}, {valid} has {datasets[1].classes}")
    return datasets


# -- the backbone ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """A network in two: ``body`` is computed once, ``head`` is trained, ``join`` makes the network whole again."""

    body: nn.Module
    head: nn.Module
    join: Callable[[], None]


def split(model: nn.Module) -> Parts:
    """VGG and AlexNet as in the tutorial, convolutions and classifier; any other before its last linear layer."""
    if isinstance(model, torchvision.models.VGG | torchvision.models.AlexNet):
        return Parts(nn.Sequential(model.features, model.avgpool, nn.Flatten()), model.classifier, lambda: None)
    parent, name, head = last_linear(model)
    setattr(parent, name, nn.Identity())
    return Parts(model, head, lambda: setattr(parent, name, head))


def optimizer_for(head: nn.Module) -> torch.optim.Optimizer:
    """Adam for a fresh linear layer, whatever the scale of its inputs; gentle SGD to tune layers that were trained."""
    if isinstance(head, nn.Linear):
        return torch.optim.Adam(head.parameters(), lr=1e-3)
    return torch.optim.SGD(head.parameters(), lr=1e-3, momentum=0.9)


def pretrained(backbone: str, path: Path | None) -> nn.Module:
    """A torchvision model with its ImageNet weights from ``path``, from torch's cache, or downloaded.

    Raises:
        ValueError: torchvision has no such model, or the file holds something else.
        FileNotFoundError: The weights are nowhere; the message says which file is wanted and where it was looked for.
    """
    try:
        model = torchvision.models.get_model(backbone, weights=None)
        choices = list(torchvision.models.get_model_weights(backbone))
    except ValueError:
        known = ", ".join(torchvision.models.list_models(module=torchvision.models))
        raise ValueError(f"BACKBONE={backbone}: torchvision has no such model, but {known}") from None
    if not any(isinstance(layer, nn.Linear) for layer in model.modules()):
        raise ValueError(f"BACKBONE={backbone}: it has no linear layer to put a new head in; try vgg16 or resnet18")
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"WEIGHTS={path}: there is no such file; {backbone} wants {_file_name(choices[0])}")
        return _fill(model, backbone, weights_file.read(path), f"WEIGHTS={path}")

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for choice in choices:
        file = cache / _file_name(choice)
        # Some files hold the convolutions only.
        if file.is_file() and choice.meta["categories"] is not None:
            return _fill(model, backbone, weights_file.read(file), str(file))
    wanted = choices[0]
    try:
        return _fill(model, backbone, wanted.get_state_dict(progress=True, check_hash=True), wanted.url)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"the weights of {backbone} are not here and cannot be downloaded ({error})\n"
            f"  wanted:  {_file_name(wanted)}, from {wanted.url}\n"
            f"  looked:  {cache}\n"
            f"  Fetch the file on a machine with network and put it there, or say where it is: WEIGHTS=<path>"
        ) from error


def _file_name(weights: Any) -> str:
    return Path(urlparse(weights.url).path).name


def _fill(model: nn.Module, backbone: str, state: Mapping[str, Tensor], source: str) -> nn.Module:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # The first line only says that there are errors; hundreds may follow.
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{source} does not fit {backbone}: {reasons[0][:200]}") from error
    return model
