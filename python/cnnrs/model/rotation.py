"""Rotary position embedding as networks write it: queries and keys whose channels are turned in pairs.

``x * cos + rot(x) * sin``, where ``rot`` takes channels apart, negates some and puts them together again, and tokens in
front may be left as they are. What such steps make of the channels of a head is followed by doing the same, with
PyTorch's own functions, to the numbers of the channels: it does not matter how it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cnnrs.model.heads import Heads, Rotation
from cnnrs.model.operations import Unsupported

#: Of heads that can be turned.
_WHOLE = ("n", "h", "t", "d")


@dataclass(frozen=True, eq=False)
class Mixed:
    """Heads (N, heads, ...) each of whose numbers is a sum of the same head's numbers before, times factors.

    Attributes:
        node: whose value the heads are of.
        heads: what it is made of: (N, heads, T, channels).
        terms: which number each is (``token * channels + channel``), and its factor; all of one shape.
    """

    node: int
    heads: Heads
    terms: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.terms[0][0].shape)

    @property
    def rank(self) -> int:
        return len(self.shape) + 2

    @property
    def sizes(self) -> list[int | None]:
        """As :attr:`Heads.sizes`."""
        return [None, self.heads.heads, *self.shape]

    def each(self, make: Callable[[torch.Tensor], torch.Tensor]) -> Mixed:
        """What moves numbers, done to them."""
        return replace(self, terms=tuple((make(places), make(factors)) for places, factors in self.terms))


def begun(node: int, heads: Heads) -> Mixed:
    """Heads as they are."""
    if heads.axes != _WHOLE or heads.of is not None or heads.rotation is not None:
        raise Unsupported("takes heads apart in another order than (N, heads, T, channels)")
    places = torch.arange(heads.tokens * heads.depth, device="cpu").view(heads.tokens, heads.depth)
    return Mixed(node, heads, ((places, torch.ones(places.shape, dtype=torch.float32, device="cpu")),))


def settled(mixed: Mixed) -> Heads:
    """The same as heads that are turned, or are as they were.

    Raises:
        Unsupported: it is neither.
    """
    heads = mixed.heads
    if mixed.shape != (heads.tokens, heads.depth):
        raise Unsupported("reads a part of the heads of an attention")
    own = torch.arange(heads.tokens * heads.depth, device="cpu").view(mixed.shape)
    channels = torch.arange(heads.depth, device="cpu")
    for half in (False, True):
        if heads.depth % 2:
            break
        partner = (channels + heads.depth // 2) % heads.depth if half else channels ^ 1
        others = own - channels + partner
        if (table := _table(mixed, own, others)) is None:
            continue
        plain = ((table[0] == 1.0) & (table[1] == 0.0)).all(dim=1)
        first = int(plain.to(torch.int64).cumprod(0).sum())
        if first == heads.tokens:
            return heads
        return replace(heads, rotation=Rotation(table[:, first:].contiguous(), first, half))
    raise Unsupported("mixes the channels of heads otherwise than in pairs")


def _table(mixed: Mixed, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor | None:
    """Factors of numbers and of their partners; None where there are other numbers in it."""
    table = torch.zeros((2, *mixed.shape), dtype=torch.float32, device="cpu")
    for places, factors in mixed.terms:
        if bool(((factors != 0.0) & (places != own) & (places != others)).any()):
            return None
        table[0] += torch.where(places == own, factors, 0.0)
        table[1] += torch.where(places == others, factors, 0.0)
    return table


# -- steps -----------------------------------------------------------------------------------------------------


def step(name: str, of: Callable[[Any], Mixed | None], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What a call makes of mixed heads: others like them, or several.

    Args:
        name: of the function.
        of: what an argument is; None where it is no heads.
        args: of the call.
        kwargs: of the call.

    Raises:
        Unsupported: the call has no counterpart.
    """
    if name in ("cat", "concat", "concatenate", "stack"):
        return _together(name, of, *args, **kwargs)
    if name in ("mul", "add", "sub", "__mul__", "__rmul__", "__add__", "__radd__", "__sub__"):
        if kwargs or len(args) != 2:
            raise Unsupported(f"has arguments without counterpart: {kwargs}")
        return _arithmetic(name.strip("_").removeprefix("r"), of, *args)
    found = of(args[0])
    if found is None or name not in _STEPS:
        raise Unsupported("is applied to something else than heads of an attention")
    return _STEPS[name](found, *args[1:], **kwargs)


def _dim(mixed: Mixed, dim: Any, own: int = 2) -> int:
    """A dimension, counted from the tokens; ``own``: the first that there may be."""
    if type(dim) is not int or not -mixed.rank <= dim < mixed.rank or dim % mixed.rank < own:
        raise Unsupported("takes apart another dimension than tokens or channels")
    return dim % mixed.rank - 2


def _alike(mixed: Sequence[Mixed | None]) -> list[Mixed]:
    """Of one value all, as many terms in each."""
    found = [one for one in mixed if one is not None]
    if len(found) != len(mixed) or any((one.node, one.heads) != (found[0].node, found[0].heads) for one in found):
        raise Unsupported("combines heads of an attention with something else")
    most = max(len(one.terms) for one in found)
    nothing = [(one.terms[0][0], torch.zeros_like(one.terms[0][1])) for one in found]
    pairs = zip(found, nothing, strict=True)
    return [replace(one, terms=(*one.terms, *[none] * (most - len(one.terms)))) for one, none in pairs]


def _together(name: str, of: Callable[[Any], Mixed | None], tensors: Any, dim: int = 0) -> Mixed:
    parts = _alike([of(tensor) for tensor in tensors])
    if name == "stack":
        if dim not in (-1, parts[0].rank):
            raise Unsupported("puts heads together along another dimension than a last one")
        at = len(parts[0].shape)
    else:
        at = _dim(parts[0], dim)
    join = torch.stack if name == "stack" else torch.cat
    try:
        terms = [
            tuple(join([one.terms[number][kind] for one in parts], at) for kind in (0, 1))
            for number in range(len(parts[0].terms))
        ]
    except RuntimeError as error:
        raise Unsupported(f"puts together what does not fit: {error}") from error
    return replace(parts[0], terms=tuple((places, factors) for places, factors in terms))


def _arithmetic(name: str, of: Callable[[Any], Mixed | None], one: Any, other: Any) -> Mixed:
    first, second = of(one), of(other)
    if name == "mul":
        if (first is None) == (second is None):
            raise Unsupported("multiplies heads by heads")
        mixed, table = (first, other) if first is not None else (second, one)
        assert mixed is not None
        return _times(mixed, table)
    if first is None or second is None:
        raise Unsupported("adds something else to the heads of an attention")
    first, second = _alike([first, second])
    if first.shape != second.shape:
        raise Unsupported("adds heads of other sizes")
    added = [(places, -factors if name == "sub" else factors) for places, factors in second.terms]
    # What was put there for both to have as many counts for nothing.
    terms = [term for term in (*first.terms, *added) if bool((term[1] != 0.0).any())]
    return replace(first, terms=tuple(terms or first.terms[:1]))


def _times(mixed: Mixed, table: Any) -> Mixed:
    if not isinstance(table, torch.Tensor) or table.dtype is not torch.float32 or table.device.type != "cpu":
        raise Unsupported("multiplies heads by something else than a float32 table of positions")
    table = table.detach()
    if any(size != 1 for size in table.shape[: -len(mixed.shape)]):
        raise Unsupported("multiplies every head or sample by a table of its own")
    table = table.reshape(table.shape[-len(mixed.shape) :])
    try:
        table = table.expand(mixed.shape)
    except RuntimeError:
        sizes = f"{tuple(table.shape)} for {mixed.shape}"
        raise Unsupported(f"multiplies heads by a table of other sizes: {sizes}") from None
    return replace(mixed, terms=tuple((places, factors * table) for places, factors in mixed.terms))


def _item(mixed: Mixed, index: Any) -> Mixed:
    entries = list(index) if isinstance(index, tuple) else [index]
    if entries.count(Ellipsis) > 1 or any(not isinstance(entry, (slice, type(Ellipsis))) for entry in entries):
        raise Unsupported("takes something else than slices of heads")
    at = entries.index(Ellipsis) if Ellipsis in entries else len(entries)
    missing = mixed.rank - len([entry for entry in entries if entry is not Ellipsis])
    entries[at : at + 1] = [slice(None)] * missing
    bounds = [bound for entry in entries for bound in (entry.start, entry.stop, entry.step)]
    if missing < 0 or entries[:2] != [slice(None)] * 2 or any(type(b) not in (int, type(None)) for b in bounds):
        raise Unsupported("takes something else than some tokens or channels of all heads")
    kept = tuple(entries[2:])
    return mixed.each(lambda numbers: numbers[kept])


def _chunk(mixed: Mixed, chunks: int, dim: int = 0) -> tuple[Mixed, ...]:
    return _parts(mixed, lambda numbers, at: numbers.chunk(chunks, at), dim)


def _split(mixed: Mixed, split_size: Any = None, dim: int = 0, split_size_or_sections: Any = None) -> Any:
    sizes = split_size if split_size_or_sections is None else split_size_or_sections
    entries = sizes if isinstance(sizes, (tuple, list)) else [sizes]
    if any(type(size) is not int for size in entries):
        raise Unsupported("divides heads into parts of sizes that are not known")
    return _parts(mixed, lambda numbers, at: torch.split(numbers, sizes, at), dim)


def _unbind(mixed: Mixed, dim: int = 0) -> tuple[Mixed, ...]:
    # Of pairs of channels only: what is left has tokens and channels.
    if len(mixed.shape) < 3:
        raise Unsupported("takes single tokens or channels of heads")
    return _parts(mixed, lambda numbers, at: numbers.unbind(at), dim)


def _parts(mixed: Mixed, divide: Callable[[torch.Tensor, int], Any], dim: Any) -> tuple[Mixed, ...]:
    at = _dim(mixed, dim)
    try:
        divided = [[divide(numbers, at) for numbers in term] for term in mixed.terms]
    except RuntimeError as error:
        raise Unsupported(f"divides heads into parts that do not fit: {error}") from error
    made = []
    for part in range(len(divided[0][0])):
        made.append(replace(mixed, terms=tuple((places[part], factors[part]) for places, factors in divided)))
    return tuple(made)


def _negated(mixed: Mixed) -> Mixed:
    return replace(mixed, terms=tuple((places, -factors) for places, factors in mixed.terms))


def _reshaped(mixed: Mixed, sizes: Sequence[Any]) -> Mixed:
    """The first of the sizes, the batch's, is somebody else's to check."""
    if len(sizes) < 3 or sizes[1] != mixed.heads.heads or any(type(size) is not int for size in sizes[2:]):
        raise Unsupported("puts heads together to another shape")
    rest = list(sizes[2:])
    if len(rest) > 3:
        raise Unsupported("puts heads together to another shape")
    try:
        return mixed.each(lambda numbers: numbers.reshape(rest))
    except RuntimeError as error:
        raise Unsupported(f"puts heads together to a shape that does not fit: {error}") from error


def _flatten(mixed: Mixed, start_dim: int = 0, end_dim: int = -1) -> Mixed:
    start, end = _dim(mixed, start_dim), _dim(mixed, end_dim)
    if start > end:
        raise Unsupported("flattens dimensions in another order")
    return mixed.each(lambda numbers: numbers.flatten(start, end))


_STEPS: dict[str, Callable[..., Any]] = {
    "__getitem__": _item, "chunk": _chunk, "split": _split, "unbind": _unbind, "neg": _negated, "__neg__": _negated,
    "reshape": _reshaped, "view": _reshaped, "flatten": _flatten,
}  # fmt: skip


def takes(name: str, mixed: bool, args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one of these steps, not one of an attention's.

    Args:
        name: of the function.
        mixed: whether it gets heads that have been taken apart.
        args: of the call.
        kwargs: of the call.
    """
    if name in ("chunk", "split", "neg", "__neg__", "cat", "concat", "concatenate", "stack", "add", "sub", "__add__"):
        return True
    if name in ("mul", "__mul__", "__rmul__"):
        numbers = [value for value in args if type(value) in (int, float)]
        return not numbers and not kwargs
    if name == "__getitem__":
        # `qkv[0]` is one of the parts.
        return mixed or (len(args) == 2 and type(args[1]) is not int)
    return mixed and name in _STEPS
