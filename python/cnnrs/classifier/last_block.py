"""Which layers of a network go on learning behind a head that was trained: the last block, or all of them."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from cnnrs.layers import freeze, keep_in_eval

Which = Literal["last", "all"]
WHICH: tuple[str, ...] = get_args(Which)

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def last_block(model: nn.Module, head: str) -> str:
    """Path of the last block before the head.

    A block is an item of a list of modules (``Sequential``, ``ModuleList``, ``ModuleDict``) that is no list itself and
    holds several weights (tensors of two dimensions or more): ``layer4.1`` of resnet18, ``encoder.layers.
    encoder_layer_11`` of vit_b_16. Networks without such lists have their last part with weights instead, and where
    that is a list of layers its last layer: ``Mixed_7c`` of inception_v3, ``classifier.3`` of vgg16.

    Args:
        model: the whole network; its modules are registered in the order in which they are called.
        head: path of the head in it.

    Raises:
        ValueError: there are no weights beside the head's.
    """
    found = ""
    for path, module in model.named_modules():
        if not path or is_in(path, head) or is_in(head, path) or (found and is_in(path, found)):
            continue
        above, _, _ = path.rpartition(".")
        is_item = isinstance(model.get_submodule(above), _LISTS) and not isinstance(module, _LISTS)
        if is_item and len(_weights(module)) > 1:
            found = path
    return found or _last_part(model, head)


def _last_part(model: nn.Module, head: str) -> str:
    path, module = "", model
    while not path or isinstance(module, _LISTS) or is_in(head, path):
        inside = [
            (below, child)
            for name, child in module.named_children()
            if not is_in(below := f"{path}.{name}".lstrip("."), head)
            and any(not is_in(f"{below}.{weight}", head) for weight in _weights(child))
        ]
        if not inside:
            break
        path, module = inside[-1]
    if not path:
        raise ValueError(f"{type(model).__name__} has no weights beside its head: there is nothing to fine-tune")
    return path


def _weights(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.dim() > 1]


def is_in(path: str, other: str) -> bool:
    """Whether a module is another one or inside it."""
    return path == other or path.startswith(f"{other}.")


def thaw(model: nn.Module, head: str, which: Which) -> str:
    """Let the head and the last block with all that is behind it be trained, or everything; the rest is frozen.

    Running statistics stay as they are everywhere: the network begins as the one the head was trained on, and batches
    of a few photos know less about them than the photos they come from. What is in front of the block computes what it
    computed for the head, without dropout. What did not require gradients before, beside the head, is frozen by those
    who made the network, and stays so. ``layers.unfreeze`` undoes all of it.

    Returns:
        Path of the last block, also where everything is trained.
    """
    required = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    freeze(model, statistics=True)
    block = last_block(model, head)
    begun = which == "all"
    for name, parameter in model.named_parameters():
        begun = begun or is_in(name, block)
        parameter.requires_grad_((begun and name in required) or is_in(name, head))
    for path, module in model.named_modules():
        if which == "all" or is_in(path, block):
            break
        if path and not is_in(block, path) and not is_in(head, path):
            keep_in_eval(module)
    return block
