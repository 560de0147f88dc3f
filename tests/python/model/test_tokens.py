"""Vision transformers: tokens, positions and attention, as torchvision, timm and others write them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

import cnnrs
from cnnrs import _cnnrs
from cnnrs._util.generators import Drawing
from cnnrs.engine import cpu_inference
from cnnrs.engine.choice import Engine
from cnnrs.model.lowering import Lowered, lower
from cnnrs.model.operations import Unsupported
from cnnrs.model.player import play

IMAGE = (3, 32, 24)
Attend = Callable[["Attention", torch.Tensor], torch.Tensor]


def fused(a: Attention, x: torch.Tensor) -> torch.Tensor:
    n, t, c = x.shape
    q, k, v = a.qkv(x).reshape(n, t, 3, a.heads, c // a.heads).permute(2, 0, 3, 1, 4).unbind(0)
    x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
    return x.transpose(1, 2).reshape(n, t, c)


def by_its_products(a: Attention, x: torch.Tensor) -> torch.Tensor:
    n, t, c = x.shape
    qkv = a.qkv(x).reshape(n, t, 3, a.heads, c // a.heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0] * 0.3, qkv[1], qkv[2]
    weights = a.drop((q @ k.transpose(-2, -1)).softmax(dim=-1))
    return (weights @ v).transpose(1, 2).flatten(2)


def scores_divided(a: Attention, x: torch.Tensor) -> torch.Tensor:
    n, t, _ = x.shape
    q, k, v = [part.view(n, t, a.heads, -1).transpose(1, 2) for part in (a.q(x), a.k(x), a.v(x))]
    weights = F.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(7.0), dim=-1)
    return torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(n, t, -1)


def with_a_scale(a: Attention, x: torch.Tensor) -> torch.Tensor:
    n, t, c = x.shape
    q, k, v = [part.view(-1, t, 2, c // 2).transpose(1, 2) for part in (a.q(x), a.k(x), a.v(x))]
    return F.scaled_dot_product_attention(q, k, v, scale=0.7).transpose(1, 2).reshape(n, t, c)


def sizes_of_heads(a: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = a.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    scale = q.shape[-1] / (q.size(1) * q.ndim * k.dim() * 8)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def sizes_of_the_result(a: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = a.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return x.reshape(x.shape[0], x.size(1), -1)


class Attention(nn.Module):
    """Of 64 channels in heads of 32."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.heads = attend, 2
        self.qkv, self.proj, self.drop = nn.Linear(64, 192), nn.Linear(64, 64, bias=False), nn.Dropout(0.1)
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.attend(self, x))  # type: ignore[no-any-return]


def first(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]


def last(x: torch.Tensor) -> torch.Tensor:
    return x[:, -1, :]


def mean(x: torch.Tensor) -> torch.Tensor:
    return x[:, 2:].mean(dim=1)


def everything(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0:]


class Transformer(nn.Module):
    """One block in timm's manner, with a register; ``late``: only patches have positions."""

    def __init__(
        self, attend: Attend = fused, result: Callable[[torch.Tensor], Any] = first, late: bool = True
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, stride=8)
        self.token, self.register = nn.Parameter(torch.randn(1, 1, 64)), nn.Parameter(torch.randn(1, 1, 64))
        self.positions = nn.Parameter(torch.randn(1, 12 if late else 14, 64))
        self.norm, self.attention = nn.LayerNorm(64), Attention(attend)
        self.gamma = nn.Parameter(torch.randn(64))
        self.mlp = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 100), nn.GELU("tanh"), nn.Linear(100, 64))
        self.result, self.late = result, late

    def forward(self, x: torch.Tensor) -> Any:
        _, _, h, w = x.shape
        torch._assert(h % 8 == 0 and w % 8 == 0, f"images of {h} x {w}")
        x = self.patches(x).flatten(2).transpose(1, 2)
        own = [self.token.expand(x.shape[0], -1, -1), self.register.expand(x.shape[0], -1, -1)]
        x = torch.cat([*own, x + self.positions], dim=1) if self.late else torch.cat([*own, x], dim=1) + self.positions
        x = x + self.attention(self.norm(x)) * self.gamma
        return self.result(x + self.mlp(x))


def small() -> VisionTransformer:
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=100, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # It begins with zeros.
    return model


def lowered(model: nn.Module, image: tuple[int, ...] = IMAGE) -> Lowered:
    return lower(model.eval(), False, image)


def loader(images: torch.Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=2)


def error(features: torch.Tensor, model: nn.Module, images: torch.Tensor) -> float:
    """Relative, against float64."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())
    return float((features.double() - exact).norm() / exact.norm())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": small,
    **{attend.__name__: lambda attend=attend: Transformer(attend)  # type: ignore[misc]
       for attend in (fused, by_its_products, scores_divided, with_a_scale, sizes_of_heads, sizes_of_the_result)},
    **{result.__name__: lambda result=result: Transformer(result=result, late=False)  # type: ignore[misc]
       for result in (last, mean, everything)},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_like_the_module(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    images = torch.randn(5, 3, 32, 32 if name == "torchvision" else 24)
    features, _ = cnnrs.preconv(loader(images), model, engine="cpu")
    with torch.no_grad():
        theirs = model(images)
    assert features.shape == theirs.shape
    # State today: 1.0 to 1.6 times eager's error, which is 2e-7.
    assert error(features, model, images) < 5 * error(theirs, model, images)
    found = lowered(model, tuple(images.shape[1:]))
    torch.testing.assert_close(play(found, found.tensors, images), theirs)
    assert cnnrs.explain(model, images.shape).preconv == "cpu"


def test_attention_is_one_operation() -> None:
    for attend in (fused, by_its_products, scores_divided, with_a_scale):
        found = lowered(Transformer(attend))
        kinds = [kind for _, kind, _, _ in found.operations]
        assert kinds.count("Attention") == 1 and "Softmax" not in kinds, attend
        assert kinds.count("View") == 0 and kinds.count("Permute") == 1, attend


def test_auto_takes_it_and_says_so() -> None:
    model = Transformer().eval()
    assert cnnrs.explain(model, (2, *IMAGE)).preconv == "cpu"
    rows = cnnrs.summary(model, (2, *IMAGE)).layers
    attention = next(row for row in rows if row.kind == "Attention")
    # Two products of 14 tokens by 14 tokens, 64 channels, 2 images; 3 operations of softmax for 2 heads.
    assert (attention.output_shape, attention.flops) == ((2, 14, 64), 4 * 2 * 14 * 14 * 64 + 3 * 2 * 2 * 14 * 14)
    # Nothing is known of images of another size.
    assert cnnrs.explain(model, (2, 3, 30, 30)).preconv == "python"


class Sized(nn.Module):
    """Decides by the height of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = x.shape[2] > 16
        x = self.conv(x).flatten(2).transpose(1, 2).mean(1)
        return x * x if high else x + x


def test_images_of_every_size_have_operations_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sized().eval()
    images = [torch.randn(2, 3, size, 16) for size in (32, 16, 32)]

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in images:
            yield batch, torch.zeros(len(batch))

    made = []
    network = cpu_inference.network

    def counted(found: Lowered, **how: bool) -> _cnnrs.CpuNetwork:
        made.append(found.image)
        return network(found, **how)

    monkeypatch.setattr(cpu_inference, "network", counted)
    engines: list[Engine] = ["auto", "cpu"]
    for engine in engines:
        features, _ = cnnrs.preconv(list(batches()), model, engine=engine)
        with torch.no_grad():
            torch.testing.assert_close(features, torch.cat([model(batch) for batch in images]))
    # The second call finds the first one's plan.
    assert made == [(3, 32, 16), (3, 16, 16), (3, 32, 16), (3, 16, 16), (3, 32, 16)]
    found = lowered(model, (3, 32, 16))
    assert cpu_inference.obstacle(found, images[0]) is None
    reason = "its operations are those for images [3, 32, 16], not [3, 16, 16]"
    assert cpu_inference.obstacle(found, images[1]) == reason


def test_weights_that_change_count() -> None:
    model, images = Transformer().eval(), torch.randn(2, *IMAGE)
    cnnrs.preconv(loader(images), model, engine="cpu")
    model.positions.data += 1.0
    model.token.detach().numpy()[...] = 0.5
    features, _ = cnnrs.preconv(loader(images), model, engine="cpu")
    with torch.no_grad():
        torch.testing.assert_close(features, model(images))


# -- what is not lowered ---------------------------------------------------------------------------------------


def masked(a: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = a.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def exchanged(a: Attention, x: torch.Tensor) -> torch.Tensor:
    k, q, v = a.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads_first(a: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = a.qkv(x).reshape(x.shape[0], x.shape[1], 2, 3, 32).permute(3, 0, 2, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def not_put_back(a: Attention, x: torch.Tensor) -> torch.Tensor:
    n, t, c = x.shape
    q, k, v = a.qkv(x).reshape(n, t, 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).reshape(n, t, c)


def over_tokens(a: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = a.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 32).permute(2, 0, 1, 3, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).flatten(2)


def without_softmax(a: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = a.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    return ((q @ k.transpose(-2, -1)) @ v).transpose(1, 2).flatten(2)


def along_queries(a: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = a.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    return ((q @ k.transpose(-2, -1)).softmax(-2) @ v).transpose(1, 2).flatten(2)


def values_scaled(a: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = a.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v * 2.0).transpose(1, 2).flatten(2)


def heads_added(a: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = a.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k + q, v).transpose(1, 2).flatten(2)


def weights_changed(a: Attention, x: torch.Tensor) -> torch.Tensor:
    qkv = a.qkv(x)
    q, k, v = qkv.reshape(x.shape[0], x.shape[1], 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    qkv += 1.0  # The parts are views of it.
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("attend", [
    masked, exchanged, heads_first, not_put_back, over_tokens, without_softmax, along_queries, values_scaled,
    heads_added, weights_changed,
])  # fmt: skip
def test_other_attentions_are_called(attend: Attend) -> None:
    model, images = Transformer(attend).eval(), torch.randn(2, *IMAGE)
    with pytest.raises(Unsupported) as found:
        lowered(model)
    assert str(found.value)
    features, _ = cnnrs.preconv(loader(images), model)
    with torch.no_grad():
        assert torch.equal(features, model(images))
    with pytest.raises(cnnrs.UnsupportedModelError):
        cnnrs.preconv(loader(images), model, engine="cpu")


class Multihead(nn.Module):
    """torch's own attention, called in some way."""

    def __init__(self, call: Callable[[Any, torch.Tensor], torch.Tensor], **kwargs: Any) -> None:
        super().__init__()
        self.conv, self.call = nn.Conv2d(3, 32, 8, stride=8), call
        self.attention = nn.MultiheadAttention(32, 2, **{"batch_first": True, **kwargs})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.attention, self.conv(x).flatten(2).transpose(1, 2))


CALLS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], dict[str, Any], str]] = {
    "weights": (lambda a, x: a(x, x, x)[1] @ x, {}, "reads the weights of an attention"),
    "returned": (lambda a, x: a(x, x, x)[1], {}, "reads the weights of an attention"),
    "both": (lambda a, x: a(x, x, x), {}, "does not return one tensor"),
    "looked": (lambda a, x: a(x, x, x, None, True)[1].ndim * x, {}, "asks for the ndim"),
    "others": (lambda a, x: a(x, x + x, x, need_weights=False)[0], {}, "are not the queries"),
    "named": (lambda a, x: a(query=x, value=x + x, key=x, need_weights=False)[0], {}, "are not the queries"),
    "mask": (lambda a, x: a(x, x, x, need_weights=False, attn_mask=torch.ones(12, 12).tril() > 0)[0], {}, "a mask"),
    "batch": (lambda a, x: a(x, x, x, need_weights=False)[0], {"batch_first": False}, "batch_first=False"),
    "bias": (lambda a, x: a(x, x, x, need_weights=False)[0], {"add_bias_kv": True}, "of its own"),
    "zero": (lambda a, x: a(x, x, x, need_weights=False)[0], {"add_zero_attn": True}, "of its own"),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_calls_of_torchs_attention(name: str) -> None:
    call, kwargs, reason = CALLS[name]
    with pytest.raises(Unsupported, match=reason):
        lowered(Multihead(call, **kwargs))


@pytest.mark.parametrize("bias", [False, True])
def test_torchs_attention_without_bias_and_by_name(bias: bool) -> None:
    images = torch.randn(2, *IMAGE)
    for need_weights in ({}, {"need_weights": False}):
        model = Multihead(lambda a, x, how=need_weights: a(value=x, key=x, query=x, **how)[0], bias=bias)
        features, _ = cnnrs.preconv(loader(images), model.eval(), engine="cpu")
        with torch.no_grad():
            torch.testing.assert_close(features, model(images))


class Repeats(nn.Module):
    """Puts a token of its own in front in some way."""

    def __init__(self, make: Callable[[nn.Parameter, torch.Tensor], torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.conv, self.make = nn.Conv2d(3, 16, 8, stride=8), make
        self.token = nn.Parameter(torch.randn(*(shape or (1, 1, 16))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([self.make(self.token, x), x], dim=1)


@pytest.mark.parametrize("make", [
    lambda token, x: token.expand(x.shape[0], 2, -1),
    lambda token, x: token.expand(2, -1, -1),
    lambda token, x: token.repeat(x.shape[0], 1, 1),
    lambda token, x: token.expand(x.shape[0], -1, -1).mul_(2.0),
    lambda token, x: (token + torch.rand(1)).expand(x.shape[0], -1, -1),
])  # fmt: skip
def test_tokens_that_are_no_parameter_per_sample(make: Callable[[nn.Parameter, torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(Unsupported):
        lowered(Repeats(make))


def test_tokens_by_their_sizes() -> None:
    model = Repeats(lambda token, x: token.expand((x.size(0), 3, x.size(-1))), 1, 3, 16)
    images = torch.randn(3, *IMAGE)
    found = lowered(model)
    with torch.no_grad():
        torch.testing.assert_close(cpu_inference.network(found)(images), model(images))


def test_training_and_shapes_that_are_not_known_are_as_before() -> None:
    model = Transformer()
    for image in (None, IMAGE):
        with pytest.raises(Unsupported, match="computes with the size of a tensor"):
            lower(model, gradients=True, image=image)
    assert cnnrs.explain(model, (2, *IMAGE)).engine == "python"


def test_attention_without_dropout_draws_nothing() -> None:
    q = torch.randn(1, 2, 8, 16)
    for p in (0.0, 0.5):
        with Drawing() as drawing, torch.no_grad():
            F.scaled_dot_product_attention(q, q, q, dropout_p=p)
        assert drawing.drew == (p > 0)


def test_heads_of_other_sizes_are_named() -> None:
    model = VisionTransformer(16, 8, num_layers=1, num_heads=2, hidden_dim=48, mlp_dim=16).eval()
    found = lowered(model, (3, 16, 16))
    obstacle = _cnnrs.CpuNetwork.obstacle(found.graph, found.tensors, [2, 3, 16, 16])
    assert obstacle is not None and "has heads of 24 channels, no multiple of 16" in obstacle
    assert cnnrs.explain(model, (2, 3, 16, 16)).preconv_reasons == (obstacle,)


@pytest.mark.parametrize("name, image", [("vit_tiny_patch16_224", 224), ("vit_small_patch14_dinov2", 56)])
def test_timms(name: str, image: int) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=image, num_classes=0, depth=2).eval()
    images = torch.randn(2, 3, image, image)
    features, _ = cnnrs.preconv(loader(images), model, engine="cpu")
    with torch.no_grad():
        assert error(features, model, images) < 5 * error(model(images), model, images)
