"""List the layers of a network: output sizes, parameters, receptive fields, cost, and which engine runs it.

NAME is a network of torchvision, one of the tutorial's (SimpleCNN, MnistNet, CatDogNet), efficientnet_lite0, or a run
folder. No weights are downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import os

from torch import nn

import cnnrs
from cnnrs.cli.options import add_json, named, print_json, whole
from cnnrs.heads import cut
from cnnrs.weights import find

EPILOG = """\
examples:
  cnnrs summary vgg16
  cnnrs summary MnistNet
  cnnrs summary resnet50 --size 160 --json
"""
_TUTORIAL = {"SimpleCNN": (3, 32), "MnistNet": (1, 28), "CatDogNet": (3, 224)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cnnrs summary``."""
    parser.add_argument("name", type=named, metavar="NAME|RUN", help="a network, or a folder that cnnrs train wrote")
    parser.add_argument("--size", type=whole(1), metavar="N", help="height and width of the input (default: the usual)")
    parser.add_argument("--batch", type=whole(1), default=1, metavar="N", help="images (default: 1)")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Summarise; returns the exit code."""
    model, channels, size = _model(options.name)
    side = options.size or size
    try:
        found = cnnrs.summary(model.eval(), (options.batch, channels, side, side))
    except RuntimeError as error:
        raise ValueError(f"{options.name} cannot take images of {side} x {side}: {error}") from error
    if not options.json:
        print(found)
        return 0
    layers = [dataclasses.asdict(layer) for layer in found.layers]
    print_json(
        {
            "name": options.name, "input": [options.batch, channels, side, side], "layers": layers,
            "parameters": found.parameters, "trainable": found.trainable, "flops": found.flops,
            "engine": found.engine, "reasons": list(found.reasons),
        }
    )  # fmt: skip
    return 0


def _model(name: str) -> tuple[nn.Module, int, int]:
    if name in _TUTORIAL:
        return (getattr(cnnrs.models, name)(), *_TUTORIAL[name])
    if os.path.isdir(name):
        run = cnnrs.load_run(name)
        return run.model, 3, run.preprocessing.crop
    found = find(name, None)
    model = found.model if found.last is None else cut(found, "linear", 1000).join()
    return model, 3, 299 if name == "inception_v3" else 224
