"""What TorchScript graphs compute: their text, and the numbers that it does not show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

# Counts the types of the process.
_MANGLED = re.compile(r"___torch_mangle_\d+\.")


def text(graph: Any) -> str:
    """The graph as text, the same each time it is made."""
    return _MANGLED.sub("", str(graph))


def constants(module: torch.jit.ScriptModule) -> list[Any]:
    """Attributes that the graph reads, and tensors that are part of it (`torch.jit.freeze` makes all weights such)."""
    graph: Any = module.inlined_graph
    (owner, *_) = graph.inputs()
    objects: dict[str, Any] = {owner.debugName(): module._c}
    found: list[Any] = []
    for node in _nodes(graph):
        if node.kind() != "prim::GetAttr" or (name := next(node.inputs()).debugName()) not in objects:
            continue
        value = objects[name].getattr(node.s("name"))
        if isinstance(value, torch._C.ScriptModule):
            objects[node.output().debugName()] = value
        # Parameters and buffers are listed elsewhere, None is a type; preconv computes in eval mode.
        elif not isinstance(value, (torch.Tensor, type(None))) and node.s("name") != "training":
            found += [node.s("name"), value]
    return found + tensors(graph)


def tensors(graph: Any) -> list[torch.Tensor]:
    """The tensors that are constants of a graph."""
    values = (node for node in _nodes(graph) if node.kind() == "prim::Constant" and node.hasAttribute("value"))
    kinds = {"t": lambda node: [node.t("value")], "ts": lambda node: list(node.ts("value"))}
    return [one for node in values for one in kinds.get(node.kindOf("value"), lambda _: [])(node)]


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)
