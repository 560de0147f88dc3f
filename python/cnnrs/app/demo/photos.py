"""The transfer road on the user's own photos: ``make demo DATA=folder BACKBONE=vgg16 WEIGHTS=file.pth``."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs.app.demo.common import fit_all, heading, predict, save_curves, verdict
from cnnrs.app.layout import ONE_PER_CLASS, find_parts, need_folder
from cnnrs.classifier.heads import Parts, cut
from cnnrs.model.weights import Found, find


def photos(data: Path, backbone: str, weights: Path | None, epochs: int, out: Path) -> int:
    """Features of a pretrained backbone once, then a head for the classes of ``data``; returns the exit code."""
    start = time.perf_counter()
    need_folder(data, ONE_PER_CLASS)
    train, valid = find_photos(data)
    classes = train.classes
    # After the photos: it may be a download.
    found = pretrained(backbone, weights)
    for half in (train, valid):
        half.transform = found.transform
    print(f"{len(train):,} training and {len(valid):,} validation photos of {', '.join(classes)}")
    parts = split(found, len(classes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts.body.to(device)
    parts.head.to(device)

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
    model = parts.join()
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
        FileNotFoundError: there are no class folders with images in it.
        ValueError: the two halves have different classes.
    """
    parts = find_parts(data)
    if parts is None or parts.held_out is None:
        return cnnrs.ImageFolder(data if parts is None else parts.train).split(0.2, seed=0)
    train, valid = parts.train, parts.held_out
    datasets = cnnrs.ImageFolder(train), cnnrs.ImageFolder(valid)
    if datasets[0].classes != datasets[1].classes:
        raise ValueError(f"{train} has the classes {datasets[0].classes}, {valid} has {datasets[1].classes}")
    return datasets


def pretrained(backbone: str, weights: Path | None) -> Found:
    """A network by name, with the weights of a file, or those that its authors recommend."""
    try:
        return find(backbone, weights or "DEFAULT")
    except (FileNotFoundError, ValueError) as error:
        # Said to somebody who writes make's variables, not Python.
        raise type(error)(str(error).replace("weights=", "WEIGHTS=")) from error


def split(found: Found, num_classes: int) -> Parts:
    """VGG and AlexNet as in the tutorial, convolutions and classifier; any other before its last linear layer."""
    import torchvision

    tutorials = isinstance(found.model, torchvision.models.VGG | torchvision.models.AlexNet)
    return cut(found, "classifier" if tutorials else "linear", num_classes, dropout=0.5)


def optimizer_for(head: nn.Module) -> torch.optim.Optimizer:
    """Adam for a fresh linear layer, whatever the scale of its inputs; gentle SGD to tune layers that were trained."""
    if isinstance(head, nn.Linear):
        return torch.optim.Adam(head.parameters(), lr=1e-3)
    return torch.optim.SGD(head.parameters(), lr=1e-3, momentum=0.9)
