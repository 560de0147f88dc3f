"""Layer surgery of transfer learning: freeze, replace the head, change dropout, initialise, pick the convolutions.

Every helper changes the given module in place and returns it, so that calls can be chained.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

Module = TypeVar("Module", bound=nn.Module)

_SCHEMES: dict[str, Callable[..., Any]] = {
    "normal": nn.init.normal_,
    "uniform": nn.init.uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "trunc_normal": nn.init.trunc_normal_,
    "orthogonal": nn.init.orthogonal_,
}


class _StaysInEval:
    """In place of a layer's own ``train``: it has no effect.

    An attribute of the layer, so that whoever calls ``model.train()`` meets it, and copies and pickles have it.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, mode: bool = True) -> nn.Module:
        return self._layer


def freeze(module: Module, statistics: bool = False) -> Module:
    """Stop training every parameter of ``module`` (``requires_grad = False``).

    Running statistics (batch norm) are buffers, not parameters, and still move in training mode. ``module.eval()``
    stops them only until somebody calls ``model.train()``, as :func:`cnnrs.fit` does when a training epoch begins.

    Args:
        module: Any module.
        statistics: Keep the running statistics too: layers that have some go into eval mode and stay in it, whoever
            calls ``train()``, in copies and pickles too. Dropout still follows ``train()``. :func:`unfreeze` undoes it.

    Returns:
        The same module.

    Example:
        >>> from cnnrs.models import MnistNet
        >>> net = MnistNet()
        >>> _ = freeze(net.conv1)
        >>> [name for name, p in net.named_parameters() if not p.requires_grad]
        ['conv1.0.weight', 'conv1.0.bias']
    """
    module.requires_grad_(False)
    if statistics:
        for layer in filter(_has_statistics, module.modules()):
            keep_in_eval(layer)
    return module


def keep_in_eval(layer: nn.Module) -> None:
    """Eval mode for one layer, whoever calls its ``train()``; :func:`unfreeze` undoes it."""
    layer.eval()
    layer.train = _StaysInEval(layer)  # type: ignore[method-assign]


def _has_statistics(layer: nn.Module) -> bool:
    return any(name.startswith("running_") and buffer is not None for name, buffer in layer._buffers.items())


def unfreeze(module: Module) -> Module:
    """Train every parameter of ``module`` again (``requires_grad = True``), and let its statistics move.

    Layers whose statistics were frozen take over the mode (train or eval) of ``module``.
    """
    module.requires_grad_(True)
    for layer in module.modules():
        if isinstance(vars(layer).get("train"), _StaysInEval):
            del layer.train
            layer.train(module.training)
    return module


def replace_head(model: Module, num_classes: int) -> Module:
    """Replace the last ``nn.Linear`` by a new one with ``num_classes`` outputs.

    That is the last one in the order of registration: ``classifier[-1]`` of VGG, ``fc`` of ResNet, ``heads.head`` of a
    vision transformer. The new layer is trainable, freshly initialised, on the device and in the dtype of the old one.

    Args:
        model: Any module that contains an ``nn.Linear``.
        num_classes: Outputs of the new layer, at least 1.

    Returns:
        The same model.

    Raises:
        ValueError: There is no ``nn.Linear`` inside ``model``, or ``num_classes`` is below 1.

    Example:
        >>> from cnnrs.models import MnistNet
        >>> replace_head(MnistNet(), 5).fc2[0]
        Linear(in_features=50, out_features=5, bias=True)
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    parent, name, old = last_linear(model)
    new = nn.Linear(
        old.in_features, num_classes, old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
    )
    setattr(parent, name, new.train(old.training))
    return model


def last_linear(model: nn.Module) -> tuple[nn.Module, str, nn.Linear]:
    """The last ``nn.Linear`` inside ``model`` in the order of registration, as (parent, attribute name, layer).

    Raises:
        ValueError: There is none, or ``model`` itself is it and so has no parent.
    """
    path = next((p for p, m in reversed(list(model.named_modules())) if p and isinstance(m, nn.Linear)), None)
    if path is None:
        raise ValueError(f"{type(model).__name__} contains no nn.Linear to replace: set its last layer yourself")
    owner, _, name = path.rpartition(".")
    parent = model.get_submodule(owner)
    return parent, name, cast(nn.Linear, getattr(parent, name))


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """``model.set_submodule(path, module)``, which torch has since 2.5."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def set_dropout(module: Module, p: float) -> Module:
    """Set the probability of every dropout layer inside ``module`` to ``p``.

    Raises:
        ValueError: ``p`` is outside 0..1, or there is no dropout layer.

    Example:
        >>> set_dropout(nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5)), 0.2)[1]
        Dropout(p=0.2, inplace=False)
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    layers = [layer for layer in module.modules() if isinstance(layer, _DropoutNd)]
    if not layers:
        raise ValueError(f"{type(module).__name__} contains no dropout layer")
    for layer in layers:
        layer.p = p
    return module


def init(module: Module, scheme: str = "kaiming_normal", **options: Any) -> Module:
    """Initialise the weights of all convolutions and linear layers by ``scheme``; their biases become zero.

    Args:
        module: Any module; other layers (BatchNorm, embeddings) keep their values.
        scheme: Name of a function of ``torch.nn.init`` without the underscore: ``"normal"``, ``"uniform"``,
            ``"xavier_normal"``, ``"xavier_uniform"``, ``"kaiming_normal"``, ``"kaiming_uniform"``, ``"trunc_normal"``,
            ``"orthogonal"``.
        **options: Its keyword arguments, e.g. ``std=0.01`` or ``nonlinearity="relu"``.

    Returns:
        The same module.

    Raises:
        ValueError: The scheme is unknown.

    Example:
        >>> layer = init(nn.Linear(4, 2), "normal", std=0.01)
        >>> layer.bias.tolist()
        [0.0, 0.0]
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}, expected one of {', '.join(_SCHEMES)}")
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            _SCHEMES[scheme](layer.weight, **options)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def conv_layers(model: nn.Module) -> nn.Sequential:
    """All ``nn.Conv2d`` layers of ``model``, in order, sharing its weights.

    Names are those of ``named_modules()`` with dots replaced by spaces, because a module name may not contain a dot.

    Example:
        >>> from cnnrs.models import SimpleCNN
        >>> [name for name, _ in conv_layers(SimpleCNN()).named_children()]
        ['conv1 conv1', 'conv2 conv2', 'conv3 conv3']
    """
    layers = nn.Sequential()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            layers.add_module(name.replace(".", " ") or "0", layer)
    return layers
