"""``cnnrs summary``: the layers of a network."""

from __future__ import annotations

import argparse
import dataclasses
import os

from torch import nn

import cnnrs
from cnnrs.app.cli.output import print_json
from cnnrs.classifier.heads import cut
from cnnrs.model.weights import find

_TUTORIAL = {"SimpleCNN": (3, 32), "MnistNet": (1, 28), "CatDogNet": (3, 224)}


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
