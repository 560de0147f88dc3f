"""Vision transformers with rotary positions, with queries of their own, with weights that they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs.engine import cpu_inference, kept_plans
from cnnrs.model.lowering import Lowered, lower
from cnnrs.model.operations import Unsupported
from cnnrs.model.player import play

IMAGE = (3, 24, 32)
Turn = Callable[["Rotary", torch.Tensor, torch.Tensor], torch.Tensor]
Attend = Callable[["Rotary", torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rot(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat([-two, one], dim=-1)


def neighbours(m: Rotary, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    sin, cos = table.repeat_interleave(2, -1).chunk(2, -1)
    late = x[:, :, m.first :, :]
    return torch.cat([x[:, :, : m.first, :], (late * cos + rot(late) * sin).to(dtype=x.dtype)], dim=2).type_as(x)


def halves(m: Rotary, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    sin, cos = (torch.cat([part, part], -1) for part in table.chunk(2, -1))
    early, late = x.split((m.first, x.shape[-2] - m.first), dim=-2)
    half = x.shape[-1] // 2
    other = torch.cat((-late[..., half:], late[..., :half]), dim=-1)
    return torch.cat((early, cos * late + sin * other), dim=-2)


def complex_numbers(m: Rotary, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    sin, cos = table.chunk(2, -1)
    pairs = x[:, :, m.first :].reshape(x.shape[0], x.shape[1], -1, x.shape[3] // 2, 2)
    one, two = pairs.unbind(-1)
    turned = torch.stack((one * cos - two * sin, two * cos + one * sin), dim=-1).flatten(3)
    return torch.cat([x[:, :, : m.first], turned], 2)


def both(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(m.turn(m, q, table), m.turn(m, k, table), v)


def products(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    q, k = m.turn(m, q, table) * 0.25, m.turn(m, k, table)
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class Rotary(nn.Module):
    """12 patches behind ``first`` tokens of their own, 64 channels, 2 heads; tables for the size of the images."""

    def __init__(self, turn: Turn = neighbours, attend: Attend = both, first: int = 2, gated: bool = True) -> None:
        super().__init__()
        self.turn, self.attend, self.first, self.gated = turn, attend, first, gated
        self.patches, self.token = nn.Conv2d(3, 64, 8, stride=8), nn.Parameter(torch.randn(1, first, 64))
        self.norm, self.qkv, self.proj = nn.LayerNorm(64), nn.Linear(64, 192, bias=False), nn.Linear(64, 64)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(64))
        self.register_buffer("k_bias", torch.zeros(64), persistent=False)
        self.register_buffer("bands", torch.rand(2, 8) * 3)
        self.fc1, self.inner, self.fc2 = nn.Linear(64, 160), nn.LayerNorm(80), nn.Linear(80, 64)
        self.gate, self.wide = nn.Linear(64, 80), nn.Linear(64, 80)

    def table(self, height: int, width: int) -> torch.Tensor:
        grid = torch.meshgrid(torch.arange(0.5, height), torch.arange(0.5, width), indexing="ij")
        angles = (torch.stack(grid, -1).flatten(0, 1)[:, :, None] * self.bands).flatten(1)
        return torch.cat([angles.sin(), angles.cos()], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        n, height, width, c = x.shape
        x, table = x.view(n, -1, c), self.table(height, width)
        if self.first:
            x = torch.cat([self.token.expand(n, -1, -1), x], dim=1)
        y = F.linear(self.norm(x), self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = y.reshape(n, x.shape[1], 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(self.attend(self, q, k, v, table).transpose(1, 2).reshape(n, x.shape[1], c))
        if self.gated:
            one, two = self.fc1(x).chunk(2, dim=-1)
        else:
            one, two = self.gate(x), self.wide(x)
        return (x + self.fc2(self.inner(F.silu(one) * two))).mean(1)


class Pooled(nn.Module):
    """Queries of its own read all patches; ``make`` makes them of a sequence that repeats per sample."""

    def __init__(self, make: Callable[[Pooled, torch.Tensor, torch.Tensor], torch.Tensor], count: int = 1) -> None:
        super().__init__()
        self.make, self.count = make, count
        self.patches, self.latent = nn.Conv2d(3, 64, 8, stride=8), nn.Parameter(torch.randn(1, count, 64))
        self.positions = nn.Parameter(torch.randn(12, 64))
        self.q, self.kv, self.fc = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        n, t, c = x.shape
        x = x + self.positions.unsqueeze(0).to(x.dtype)
        q = self.make(self, self.latent.expand(n, -1, -1), x)
        q = q.reshape(n, q.shape[1], 2, 32).transpose(1, 2)
        k, v = self.kv(x).reshape(n, t, 2, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, c)
        return (x + F.gelu(self.fc(x)))[:, -1]


def encoder(**how: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 2, 96, batch_first=True, **how)
    tower = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(64), enable_nested_tensor=False)
    return nn.Sequential(nn.Conv2d(3, 64, 8, stride=8), nn.Flatten(2), Swapped(), tower)


class Swapped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def query(m: Pooled, latent: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return m.q(latent)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{turn.__name__: lambda turn=turn: Rotary(turn)  # type: ignore[misc]
       for turn in (neighbours, halves, complex_numbers)},
    "every token": lambda: Rotary(halves, first=0),
    "by products": lambda: Rotary(neighbours, products, gated=False),
    "latent": lambda: Pooled(query),
    "latents": lambda: Pooled(lambda m, latent, x: m.q(m.q(latent)), 5),
    "latent alone": lambda: Pooled(lambda m, latent, x: latent),
    "of each sample": lambda: Pooled(lambda m, latent, x: m.q(x[:, 3:5])),
    "encoder": lambda: encoder(activation="gelu", norm_first=True),
    "encoder with relu": lambda: encoder(dropout=0.2),
}  # fmt: skip


def lowered(model: nn.Module, image: tuple[int, ...] = IMAGE) -> Lowered:
    return lower(model.eval(), False, image)


def error(features: torch.Tensor, model: nn.Module, images: torch.Tensor) -> float:
    """Relative, against float64."""
    exact = copy.deepcopy(model).double()
    if isinstance(model, Rotary):
        # The tables are made of float32 numbers.
        exact.table = lambda *size: model.table(*size).double()  # type: ignore[assignment]
    with torch.no_grad():
        result = exact(images.double())
    return float((features.double() - result).norm() / result.norm())


@pytest.mark.parametrize("name", MODELS)
def test_like_the_module(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    batches = [torch.randn(n, *IMAGE) for n in (1, 3, 8)]
    features, _ = cnnrs.preconv([(batch, torch.zeros(len(batch))) for batch in batches], model, engine="cpu")
    images = torch.cat(batches)
    with torch.no_grad():
        theirs = model(images)
    assert features.shape == theirs.shape
    assert error(features, model, images) < 5 * error(theirs, model, images)
    found = lowered(model)
    torch.testing.assert_close(play(found, found.tensors, images), theirs)
    assert cnnrs.explain(model, images.shape).preconv == "cpu"


def test_images_of_another_size_have_tables_of_their_own() -> None:
    model = Rotary().eval()
    batches = [torch.randn(2, 3, *size) for size in ((24, 32), (32, 16), (24, 32))]
    features, _ = cnnrs.preconv([(batch, torch.zeros(2)) for batch in batches], model, engine="cpu")
    with torch.no_grad():
        torch.testing.assert_close(features, torch.cat([model(batch) for batch in batches]))


def test_one_attention_and_one_table() -> None:
    found = lowered(Rotary(halves))
    rotations = [attributes["rotation"] for _, kind, _, attributes in found.operations if kind == "Attention"]
    (table, first, half), *others = rotations
    assert (first, half, others) == (2, True, []) and found.tensors[table].shape == (2, 12, 32)
    # The table and the bias; three biases and the bands.
    assert len(found.folded) == 2 and sorted(tensor.numel() for tensor in found.sources) == [16, 64, 64, 64]


# -- what has been computed counts as what it has been computed of ----------------------------------------------


@pytest.mark.parametrize("write", [
    lambda m: m.bands.add_(0.5), lambda m: m.q_bias.data.mul_(2.0), lambda m: m.k_bias.numpy().fill(3.0),
    lambda m: setattr(m.v_bias, "data", m.v_bias.data + 1.0), lambda m: setattr(m, "q_bias", m.v_bias),
])  # fmt: skip
def test_weights_that_change_count(write: Callable[[Any], Any]) -> None:
    model, images = Rotary().eval(), torch.randn(2, *IMAGE)
    batches = [(images, torch.zeros(2))]
    cnnrs.preconv(batches, model, engine="cpu")
    with torch.no_grad():
        before = model(images)
        write(model)
        features, _ = cnnrs.preconv(batches, model, engine="cpu")
        assert (model(images) - before).abs().max() > 1e-3
        torch.testing.assert_close(features, model(images))


def test_weights_that_change_between_batches_count() -> None:
    model, images = Rotary().eval(), torch.randn(2, *IMAGE)

    def batches() -> Any:
        yield images, torch.zeros(2)
        # As weights that are given other memory.
        model.q_bias.data = model.q_bias.data * 2.0
        yield images, torch.zeros(2)

    features, _ = cnnrs.preconv(batches(), model, engine="cpu")
    with torch.no_grad():
        torch.testing.assert_close(features[2:], model(images))


def test_the_plan_of_the_same_weights_is_kept() -> None:
    model = Rotary().eval()
    plan = kept_plans.take(model, lowered(model))
    plan(torch.randn(1, *IMAGE))
    plan.give_back()
    assert kept_plans.take(model, lowered(model)) is plan
    plan.give_back()
    with torch.no_grad():
        model.k_bias += 1.0
    assert kept_plans.take(model, lowered(model)) is not plan


def test_parameters_are_counted_once() -> None:
    rows = cnnrs.summary(Rotary().eval(), (1, *IMAGE)).layers
    assert next(row for row in rows if row.name == "qkv").parameters == 64 * 192


# -- look-alikes: right, or not lowered -------------------------------------------------------------------------


def values_too(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return both(m, q, k, m.turn(m, v, table), table)


def queries_only(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(m.turn(m, q, table), k, v)


def two_tables(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(m.turn(m, q, table), m.turn(m, k, table * 0.5), v)


def two_layouts(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(neighbours(m, q, table), halves(m, k, table), v)


def two_prefixes(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    q = m.turn(m, q, table)
    m = copy.copy(m)
    m.first = 1
    return F.scaled_dot_product_attention(q, m.turn(m, k, torch.cat([table[:1], table])), v)


def crossed(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    q = torch.cat([k[:, :, :2], m.turn(m, q, table)[:, :, 2:]], dim=2)
    return F.scaled_dot_product_attention(q, m.turn(m, k, table), v)


def turned_result(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return m.turn(m, both(m, q, k, v, table), table)


def with_noise(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return both(m, q, k, v, table + torch.rand(1))


def of_every_head(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return both(m, q, k, v, torch.stack([table, table.flip(0)]))


def some_keys(m: Rotary, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k[:, :, 1:], v[:, :, 1:])


@pytest.mark.parametrize("attend", [
    values_too, queries_only, two_tables, two_layouts, two_prefixes, crossed, turned_result, with_noise, of_every_head,
    some_keys,
])  # fmt: skip
def test_other_rotations_are_called(attend: Attend) -> None:
    model, images = Rotary(neighbours, attend).eval(), torch.randn(2, *IMAGE)
    with pytest.raises(Unsupported) as found:
        lowered(model)
    assert str(found.value)
    if attend is not with_noise:
        features, _ = cnnrs.preconv([(images, torch.zeros(2))], model, verbose=False)
        with torch.no_grad():
            assert torch.equal(features, model(images))


def shuffled(m: Rotary, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return neighbours(m, torch.cat([x[..., 16:], x[..., :16]], -1), table)


def thirds(m: Rotary, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    turned = neighbours(m, x, table)
    return turned + x[..., torch.arange(32).roll(3).tolist()[0] :].sum() * 0


def shifted(m: Rotary, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    turned = neighbours(m, x, table)
    return torch.cat([turned[:, :, 1:], turned[:, :, :1]], dim=2)


def reversed_tokens(m: Rotary, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return neighbours(m, x, table).flip(2)


def in_place(m: Rotary, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    x = neighbours(m, x, table)
    x.mul_(2.0)
    return x


def twice(m: Rotary, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return halves(m, neighbours(m, x, table), table)


@pytest.mark.parametrize("turn", [shuffled, thirds, shifted, reversed_tokens, in_place, twice])
def test_other_orders_are_called(turn: Turn) -> None:
    model, images = Rotary(turn).eval(), torch.randn(2, *IMAGE)
    with pytest.raises(Unsupported):
        lowered(model)
    features, _ = cnnrs.preconv([(images, torch.zeros(2))], model, verbose=False)
    with torch.no_grad():
        assert torch.equal(features, model(images))


def scaled_halves(m: Rotary, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return neighbours(m, x, table * 1.5)


def signs_exchanged(m: Rotary, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    sin, cos = table.repeat_interleave(2, -1).chunk(2, -1)
    late = x[:, :, m.first :, :]
    return torch.cat([x[:, :, : m.first, :], late * cos - rot(late) * sin], dim=2)


@pytest.mark.parametrize("turn", [scaled_halves, signs_exchanged])
def test_whatever_turns_in_pairs_is_right(turn: Turn) -> None:
    model, images = Rotary(turn).eval(), torch.randn(2, *IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(cpu_inference.network(lowered(model))(images), model(images))


def test_a_table_of_another_size_is_pytorchs_error() -> None:
    model = Rotary(lambda m, x, table: neighbours(m, x, table[1:]))
    with pytest.raises(Unsupported, match="by a table of other sizes"):
        lowered(model)


def test_training_is_as_before() -> None:
    for model in (Rotary(), Pooled(query)):
        with pytest.raises(Unsupported):
            lower(model)
    with pytest.raises(Unsupported, match="this layer has no counterpart"):
        lower(encoder())
    with pytest.raises(Unsupported, match="drops values in training mode"):
        lower(encoder(dropout=0.5), False, IMAGE)


@pytest.mark.parametrize("call", [
    lambda layer, x: layer(x, torch.zeros(12, 12)), lambda layer, x: layer(x, src_key_padding_mask=torch.zeros(2, 12)),
    lambda layer, x: layer(x, is_causal=True),
])  # fmt: skip
def test_masks_of_torchs_layer(call: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.layer = (
                nn.Conv2d(3, 64, 8, stride=8),
                nn.TransformerEncoderLayer(64, 2, batch_first=True),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call(self.layer, self.patches(x).flatten(2).transpose(1, 2))

    with pytest.raises(Unsupported, match="is called with a mask"):
        lowered(Called())


def test_tables_that_are_buffers_follow_them_between_batches() -> None:
    def turned(m: Any, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x * m.cos + rotate_half(x) * m.sin

    model: Any = Rotary(turned, first=0).eval()
    model.register_buffer("cos", torch.rand(12, 32))
    model.register_buffer("sin", torch.rand(12, 32))
    images = torch.randn(2, *IMAGE)

    def batches() -> Any:
        yield images, torch.zeros(2)
        model.cos.mul_(-2.0)
        yield images, torch.zeros(2)

    features, _ = cnnrs.preconv(batches(), model, engine="cpu", verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(features[2:], model(images))
