"""Attention within windows, as Swin and MaxViT of torchvision and Swin of timm have it: layers lowered as a whole.

Their ``forward`` takes images apart and puts them together again, which is what one operation of the graph does.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from cnnrs._records import Attributes
from cnnrs.model.operations import LAYERS, Unsupported, _linear
from cnnrs.model.tokens import Tokens
from cnnrs.model.tracing import Standin
from cnnrs.model.window_tables import apart, distances

_SWIN, _MAXVIT = "torchvision.models.swin_transformer", "torchvision.models.maxvit"
_TIMM = "timm.models.swin_transformer"
#: Where a class is from, its name, and what its ``forward`` calls there. A subclass may do anything.
_LAYERS: dict[tuple[str, str], tuple[str, ...]] = {
    (_SWIN, "ShiftedWindowAttention"): ("shifted_window_attention", "_get_relative_position_bias"),
    (_SWIN, "ShiftedWindowAttentionV2"): ("shifted_window_attention", "_get_relative_position_bias"),
    (_SWIN, "PatchMerging"): ("_patch_merging_pad",),
    (_SWIN, "PatchMergingV2"): ("_patch_merging_pad",),
    (_MAXVIT, "PartitionAttentionLayer"): (),
    (_TIMM, "SwinTransformerBlock"): ("window_partition", "window_reverse"),
    (_TIMM, "PatchMerging"): (),
}
#: Methods that they call.
_METHODS = ("forward", "get_relative_position_bias", "get_relative_positional_bias", "_attn", "get_attn_mask",
            "_get_rel_pos_bias")  # fmt: skip
#: What MaxViT's is made of.
_PARTS = ("RelativePositionalMultiHeadAttention", "WindowPartition", "WindowDepartition")


def is_windowed(module: nn.Module) -> bool:
    """Whether it is one of the layers above, as its library has written it."""
    kind = type(module)
    calls = _LAYERS.get((kind.__module__, kind.__qualname__))
    return calls is not None and _is_untouched(module, calls)


def _is_untouched(module: nn.Module, calls: tuple[str, ...] = ()) -> bool:
    """Whether its methods, and the functions of its file that they call, are those of that file."""
    kind = type(module)
    own = [getattr(kind, name, None) for name in _METHODS]
    called = [vars(sys.modules[kind.__module__]).get(name) for name in calls]
    written = all(f is None or getattr(f, "__module__", None) == kind.__module__ for f in (*own, *called))
    return written and not any(name in vars(module) for name in _METHODS)


def _pair(sizes: Any, what: str) -> tuple[int, int]:
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or any(type(size) is not int for size in sizes):
        raise Unsupported(f"{what} is {sizes!r}")
    if min(sizes) < 0:
        raise Unsupported(f"{what} is negative: {sizes!r}")
    return sizes[0], sizes[1]


def _check_layer(module: Any, kind: type[nn.Module], name: str) -> None:
    if type(module) is not kind:
        raise Unsupported(f"{name} is a {type(module).__name__}, not a {kind.__name__}")


def _check_index(index: Any, window: tuple[int, int]) -> None:
    """Whether a table's rows belong to distances as they do where windows are read row by row."""
    rows = distances(window).flatten()
    if not isinstance(index, torch.Tensor) or not torch.equal(index.detach().cpu().flatten(), rows):
        raise Unsupported("finds the numbers of its distances elsewhere than the layer puts them")


def _is_same(mask: Any, wanted: torch.Tensor) -> bool:
    return isinstance(mask, torch.Tensor) and mask.shape == wanted.shape and bool((mask.detach().cpu() == wanted).all())


class Windowed(Tokens):
    """What layers with windows make of the values of a graph for images of one size."""

    def _windowed(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> Standin:
        if len(args) != 1:
            raise Unsupported(f"is called with {len(args)} arguments")
        x = self._tensor(args[0])
        shape = self.shape(self._read(x))
        if shape is None or len(shape) != 4:
            raise Unsupported("is called with something else than images of four dimensions")
        kind = type(module).__name__
        if kind.startswith("PatchMerging"):
            return self._merging(name, module, x)
        if kind == "SwinTransformerBlock":
            return self._block(name, module, x, shape[1:])
        if kind == "PartitionAttentionLayer":
            return self._partitioned(name, module, x, shape)
        return self._shifted(name, module, x)

    def _shifted(self, name: str, module: Any, x: Standin) -> Standin:
        """``shifted_window_attention`` of torchvision."""
        if module.training and (module.attention_dropout > 0.0 or module.dropout > 0.0):
            raise Unsupported("drops values in training mode; call eval()")
        window = _pair(module.window_size, "window_size")
        _check_index(module.relative_position_index, window)
        described: Attributes = {
            "heads": module.num_heads, "window": window, "shift": _pair(module.shift_size, "shift_size"), "grid": False,
            "logit": None, "table": None,
        }  # fmt: skip
        if type(module).__name__.endswith("V2"):
            described |= self._continuous(module.cpb_mlp)
            described["distances"] = self._tensor_index(module.relative_coords_table)
            described["logit"] = self._tensor_index(module.logit_scale)
        else:
            described["table"] = self._tensor_index(module.relative_position_bias_table)
        return self._attending(name, x, module.qkv, described, module.proj)

    def _continuous(self, mlp: Any) -> Attributes:
        _check_layer(mlp, nn.Sequential, "cpb_mlp")
        if [type(layer) for layer in mlp] != [nn.Linear, nn.ReLU, nn.Linear]:
            raise Unsupported("cpb_mlp is something else than two linear layers with ReLU in between")
        hidden, _, output = mlp
        if hidden.bias is None or output.bias is not None:
            raise Unsupported("cpb_mlp has a bias elsewhere than in front of its ReLU")
        return {
            "hidden": self._tensor_index(hidden.weight), "hidden_bias": self._tensor_index(hidden.bias),
            "output": self._tensor_index(output.weight),
        }  # fmt: skip

    def _attending(self, name: str, x: Standin, qkv: Any, described: Attributes, proj: Any) -> Standin:
        """One linear layer to queries, keys and values, their windows' attention, and one behind it."""
        for layer in (qkv, proj):
            _check_layer(layer, nn.Linear, "a layer")
        channels, heads = qkv.out_features // 3, described["heads"]
        if type(heads) is not int or heads < 1 or channels % heads or qkv.weight.shape[0] != 3 * channels:
            raise Unsupported(
                f"divides {qkv.weight.shape[0]} channels into queries, keys and values of {heads!r} heads"
            )
        if described["logit"] is None and "scale" not in described:
            described["scale"] = float((channels // heads) ** -0.5)
        described["fill"] = self._tensor_index(qkv.bias)
        x = self._apply(f"{name}.qkv", "Linear", [x], _linear(self._tensor_index, qkv.weight, qkv.bias))
        x = self._apply(name, "WindowAttention", [x], described)
        return self._apply(f"{name}.proj", "Linear", [x], _linear(self._tensor_index, proj.weight, proj.bias))

    def _merging(self, name: str, module: Any, x: Standin) -> Standin:
        _check_layer(module.reduction, nn.Linear, "reduction")
        if type(module.norm) not in LAYERS:
            raise Unsupported("its norm has no counterpart yet")
        x = self._apply(name, "PatchMerging", [x], {})
        parts = [("norm", module.norm), ("reduction", module.reduction)]
        if type(module).__name__.endswith("V2"):
            parts.reverse()
        for part, layer in parts:
            x = self._part(f"{name}.{part}", layer, x)
        return x

    def _partitioned(self, name: str, module: Any, x: Standin, shape: list[int | None]) -> Standin:
        """Windows of MaxViT, or a grid; everything else is the same for every pixel, wherever it lies meanwhile."""
        norm, attention, drop = module.attn_layer
        size = attention.size
        parts_of = (attention, module.partition_op, module.departition_op)
        for part, kind in zip(parts_of, _PARTS, strict=True):
            if (type(part).__module__, type(part).__name__) != (_MAXVIT, kind) or not _is_untouched(part):
                raise Unsupported(f"{type(part).__name__} is not torchvision's {kind}")
        grid, parts = module.partition_type == "grid", module.n_partitions
        swaps = [module.partition_swap, module.departition_swap]
        if any(type(swap).__name__ != ("SwapAxes" if grid else "Identity") for swap in swaps):
            raise Unsupported("exchanges other dimensions than those of windows")
        if any(type(swap).__name__ == "SwapAxes" and {swap.a, swap.b} != {-2, -3} for swap in swaps):
            raise Unsupported("exchanges other dimensions than those of windows")
        if (
            type(size) is not int
            or [*shape[2:]] != [size * parts] * 2
            or tuple(module.grid_size) != (size * parts,) * 2
        ):
            raise Unsupported(f"expects images of {module.grid_size}, got {shape[2:]}")
        if module.p != (parts if grid else size) or attention.max_seq_len != size * size:
            raise Unsupported("has windows of another size than its parts say")
        _check_index(attention.relative_position_index, (size, size))
        described: Attributes = {
            "heads": attention.n_heads, "window": (size, size), "shift": (0, 0), "grid": grid,
            "scale": float(attention.scale_factor), "logit": None,
            "table": self._tensor_index(attention.relative_position_bias_table),
        }  # fmt: skip
        x = self._apply(self._unique("permute"), "Permute", [x], {"dims": [0, 2, 3, 1]})
        y = self._part(f"{name}.attn_layer.0", norm, x)
        y = self._attending(f"{name}.attn_layer.1", y, attention.to_qkv, described, attention.merge)
        for layer in (drop, module.stochastic_dropout):
            y = self._part(name, layer, y)
        x = self._apply(self._unique("add"), "Add", [x, y], {"inplace": False})
        y = x
        for number, layer in enumerate([*module.mlp_layer, module.stochastic_dropout]):
            y = self._part(f"{name}.mlp_layer.{number}", layer, y)
        x = self._apply(self._unique("add"), "Add", [x, y], {"inplace": False})
        return self._apply(self._unique("permute"), "Permute", [x], {"dims": [0, 3, 1, 2]})

    def _block(self, name: str, module: Any, x: Standin, size: list[int | None]) -> Standin:
        """A block of timm's Swin, which rolls before it pads."""
        attention, mlp = module.attn, module.mlp
        if type(attention).__module__ != _TIMM or type(attention).__name__ != "WindowAttention":
            raise Unsupported(f"its attention is a {type(attention).__name__}")
        if type(mlp).__module__ != "timm.layers.mlp" or type(mlp).__name__ != "Mlp":
            raise Unsupported(f"its mlp is a {type(mlp).__name__}")
        if not all(_is_untouched(part) for part in (attention, mlp)):
            raise Unsupported("has parts that are written otherwise than timm's")
        window, shift = _pair(module.window_size, "window_size"), _pair(module.shift_size, "shift_size")
        _check_index(attention.relative_position_index, window)
        if any(shift):
            sides = [side or 0 for side in size[:2]]
            if any(side % of or (by and side <= of) for side, of, by in zip(sides, window, shift, strict=True)):
                raise Unsupported(f"rolls images of {sides}, which are not several whole windows of {window}")
            if not module.dynamic_mask and not _is_same(module.attn_mask, apart(sides, window, shift)):
                raise Unsupported("has another mask than that of its shift")
        elif module.attn_mask is not None:
            raise Unsupported("has a mask without a shift")
        described: Attributes = {
            "heads": attention.num_heads, "window": window, "shift": shift, "grid": False, "logit": None,
            "table": self._tensor_index(attention.relative_position_bias_table),
        }  # fmt: skip
        if not attention.fused_attn:
            described["scale"] = float(attention.scale)
            if type(attention.softmax) is not nn.Softmax or attention.softmax.dim not in (-1, 3):
                raise Unsupported("has another softmax")
        drop = attention.attn_drop
        if type(drop) is not nn.Dropout or (drop.training and drop.p > 0.0) or (attention.training and drop.p > 0.0):
            raise Unsupported("drops values in training mode; call eval()")
        y = self._part(f"{name}.norm1", module.norm1, x)
        y = self._attending(f"{name}.attn", y, attention.qkv, described, attention.proj)
        y = self._kept(self._part(f"{name}.attn.proj_drop", attention.proj_drop, y), module.drop_path1)
        x = self._apply(self._unique("add"), "Add", [x, y], {"inplace": False})
        y = self._part(f"{name}.norm2", module.norm2, x)
        for part in ("fc1", "act", "drop1", "norm", "fc2", "drop2"):
            y = self._part(f"{name}.mlp.{part}", getattr(mlp, part), y)
        return self._apply(self._unique("add"), "Add", [x, self._kept(y, module.drop_path2)], {"inplace": False})

    @staticmethod
    def _kept(x: Standin, drop: Any) -> Standin:
        kind = type(drop)
        theirs = (kind.__module__, kind.__name__) == ("timm.layers.drop", "DropPath") and _is_untouched(drop)
        if not (theirs or kind is nn.Identity) or (drop.training and getattr(drop, "drop_prob", 0.0) > 0.0):
            raise Unsupported("drops values in training mode; call eval()")
        return x
