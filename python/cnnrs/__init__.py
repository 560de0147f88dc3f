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

from cnnrs import _torch as _torch

_torch.load()  # one readable ImportError when torch is missing or of another version

from cnnrs import errors, layers, models  # noqa: E402
from cnnrs import ray as ray  # noqa: E402
from cnnrs._cnnrs import __version__  # noqa: E402
from cnnrs.backbones import Backbone, backbone  # noqa: E402
from cnnrs.check import check  # noqa: E402
from cnnrs.checkpoint import BestCheckpoint, EarlyStopping  # noqa: E402
from cnnrs.engines import explain  # noqa: E402
from cnnrs.errors import CnnrsError, DecodeError, NonFiniteLossError, UnsupportedModelError  # noqa: E402
from cnnrs.feature_dataset import FeatureDataset, data_gen  # noqa: E402
from cnnrs.features import Features, load_features  # noqa: E402
from cnnrs.fit import compile, fit  # noqa: E402
from cnnrs.folder import ImageFolder, ImageList  # noqa: E402
from cnnrs.history import History  # noqa: E402
from cnnrs.layers import conv_layers, freeze, init, replace_head, set_dropout, unfreeze  # noqa: E402
from cnnrs.loader import DataLoader  # noqa: E402
from cnnrs.metrics import confusion, top_losses  # noqa: E402
from cnnrs.mnist import MNIST  # noqa: E402
from cnnrs.preconv import preconv  # noqa: E402
from cnnrs.runs import load_run  # noqa: E402
from cnnrs.summary import summary  # noqa: E402

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
    "explain",
    "fit",
    "freeze",
    "init",
    "layers",
    "load_features",
    "load_run",
    "models",
    "preconv",
    "replace_head",
    "set_dropout",
    "summary",
    "top_losses",
    "unfreeze",
]
