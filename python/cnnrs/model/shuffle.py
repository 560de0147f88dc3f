"""A channel shuffle, as networks write it: channels in groups, the groups' dimension behind that of their channels.

``x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)``
"""

from __future__ import annotations

from typing import Any

from cnnrs._records import Node


def groups_behind(nodes: list[Node], node: int, channels: int | None) -> int | None:
    """How many groups ``nodes[node]`` has taken apart and swapped; None where it is something else.

    Args:
        nodes: the operations so far.
        node: a permutation, it may be.
        channels: of what is taken apart, where that is known.
    """
    _, kind, sources, attributes = nodes[node]
    if kind != "Permute" or attributes["dims"] != [0, 2, 1, 3, 4] or nodes[sources[0]][1] != "View":
        return None
    (x,), dims = nodes[sources[0]][2], nodes[sources[0]][3]["dims"]
    n, groups, each, *plane = dims
    known = type(groups) is int and type(each) is int and groups > 0 and groups * each == channels
    return groups if known and n in (-1, (x, 0)) and plane == [(x, 2), (x, 3)] else None


def puts_together(nodes: list[Node], node: int, dims: list[Any]) -> bool:
    """Whether a view of these sizes, of what :func:`groups_behind` knows, has the channels of before in a row."""
    view = nodes[nodes[node][2][0]]
    (x,), (_, groups, each, *_) = view[2], view[3]["dims"]
    if len(dims) != 4 or dims.count(-1) > 1:
        return False
    n, channels, *plane = dims
    return n in (-1, (x, 0)) and channels in (-1, groups * each) and plane == [(x, 2), (x, 3)]


def source(nodes: list[Node], node: int) -> int:
    """What is shuffled."""
    return nodes[nodes[node][2][0]][2][0]


def without(nodes: list[Node], output: int, unneeded: set[int]) -> tuple[list[Node], int]:
    """The operations without those of ``unneeded`` that nobody reads, and the new number of the output."""
    read = {output}
    kept: list[int] = []
    for number in reversed(range(len(nodes))):
        if number in unneeded and number not in read:
            continue
        kept.append(number)
        _, _, sources, attributes = nodes[number]
        read |= {*sources, *(dim[0] for dim in attributes.get("dims", ()) if isinstance(dim, tuple))}
    now = {old: new for new, old in enumerate(reversed(kept))}
    return [_renumbered(nodes[old], now) for old in now], now[output]


def _renumbered(operation: Node, now: dict[int, int]) -> Node:
    name, kind, sources, attributes = operation
    if kind == "View":
        dims = [(now[dim[0]], dim[1]) if isinstance(dim, tuple) else dim for dim in attributes["dims"]]
        attributes = {**attributes, "dims": dims}
    return name, kind, [now[source] for source in sources], attributes
