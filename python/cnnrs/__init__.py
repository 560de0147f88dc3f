"""Image folders to trained PyTorch classifiers: fast loading, frozen features once, a compiled fit loop.

The tutorial's path, with the names PyTorch users know::

    train = cnnrs.ImageFolder("pets/train", transform)        # torchvision's attributes, order and errors
    loader = cnnrs.DataLoader(train, batch_size=32, shuffle=True)
    loss, accuracy = cnnrs.fit(epoch, model, loader, "training", optimizer=optimizer, loss_fn=F.nll_loss)

    features, labels = cnnrs.preconv(loader, vgg.features, out="features/train")
    head_loader = cnnrs.DataLoader(cnnrs.FeatureDataset(features, labels), batch_size=64, shuffle=True)

    cnnrs.summary(model, (1, 3, 224, 224))                    # shapes, parameters, receptive fields, cost
    cnnrs.explain(model)                                      # which engine runs it, and why
"""

from importlib import import_module
from typing import TYPE_CHECKING

from cnnrs import _torch as _torch

_torch.load()  # one readable ImportError when torch is missing or of another version

from cnnrs._cnnrs import __version__  # noqa: E402

if TYPE_CHECKING:
    from cnnrs import errors, layers, models
    from cnnrs import ray as ray
    from cnnrs.app.jobs.evaluate import evaluate
    from cnnrs.app.jobs.train import train
    from cnnrs.classifier.probe import probe
    from cnnrs.classifier.run_folder import load_run
    from cnnrs.data.check import check
    from cnnrs.data.feature_dataset import FeatureDataset, data_gen
    from cnnrs.data.folder import ImageFolder
    from cnnrs.data.image_list import ImageList
    from cnnrs.data.loader import DataLoader
    from cnnrs.data.mnist import MNIST
    from cnnrs.data.photos import photo_extensions
    from cnnrs.engine.explain import explain
    from cnnrs.engine.summary import summary
    from cnnrs.errors import CnnrsError, DecodeError, NonFiniteLossError, UnsupportedModelError
    from cnnrs.features.features import Features, load_features
    from cnnrs.features.preconv import preconv
    from cnnrs.layers import conv_layers, freeze, init, replace_head, set_dropout, unfreeze
    from cnnrs.model.backbone import Backbone, backbone
    from cnnrs.training.checkpoint import BestCheckpoint, EarlyStopping
    from cnnrs.training.fit import compile, fit
    from cnnrs.training.history import History
    from cnnrs.training.metrics import confusion, top_losses

#: Where the public names live: a module is loaded when one of its names is first asked for, so that ``import cnnrs``
#: costs little beside ``import torch``. The imports above say the same to type checkers.
_HOMES = {
    "app.jobs.evaluate": "evaluate",
    "app.jobs.train": "train",
    "classifier.probe": "probe",
    "classifier.run_folder": "load_run",
    "data.check": "check",
    "data.feature_dataset": "FeatureDataset data_gen",
    "data.folder": "ImageFolder",
    "data.image_list": "ImageList",
    "data.loader": "DataLoader",
    "data.mnist": "MNIST",
    "data.photos": "photo_extensions",
    "engine.explain": "explain",
    "engine.summary": "summary",
    "errors": "CnnrsError DecodeError NonFiniteLossError UnsupportedModelError",
    "features.features": "Features load_features",
    "features.preconv": "preconv",
    "layers": "conv_layers freeze init replace_head set_dropout unfreeze",
    "model.backbone": "Backbone backbone",
    "training.checkpoint": "BestCheckpoint EarlyStopping",
    "training.fit": "compile fit",
    "training.history": "History",
    "training.metrics": "confusion top_losses",
}
_MODULES = ("errors", "layers", "models", "ray")

__all__ = [
    "MNIST",
    "Backbone",
    "BestCheckpoint",
    "CnnrsError",
    "DataLoader",
    "DecodeError",
    "EarlyStopping",
    "FeatureDataset",
    "Features",
    "History",
    "ImageFolder",
    "ImageList",
    "NonFiniteLossError",
    "UnsupportedModelError",
    "__version__",
    "backbone",
    "check",
    "compile",
    "confusion",
    "conv_layers",
    "data_gen",
    "errors",
    "evaluate",
    "explain",
    "fit",
    "freeze",
    "init",
    "layers",
    "load_features",
    "load_run",
    "models",
    "photo_extensions",
    "preconv",
    "probe",
    "replace_head",
    "set_dropout",
    "summary",
    "top_losses",
    "train",
    "unfreeze",
]

if not TYPE_CHECKING:

    def __getattr__(name):
        if name in _MODULES:
            return import_module(f"cnnrs.{name}")
        home = next((home for home, names in _HOMES.items() if name in names.split()), None)
        if home is None:
            raise AttributeError(f"module 'cnnrs' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"cnnrs.{home}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
