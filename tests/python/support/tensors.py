"""Tensors of every kind, a network to give them to, and what PyTorch makes of it: what tests of tensors share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import transforms

import cnnrs
from cnnrs import _cnnrs
from cnnrs.model.lowering import lower

ENGINES = ["auto", "cpu"]
Tensors = dict[str, Callable[[torch.Tensor], torch.Tensor]]


class Named(torch.Tensor):
    """A subclass that changes nothing."""


class Doubling(torch.Tensor):
    """A subclass whose functions are its own: what its memory says is not what it computes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found * 2 if func is F.conv2d or func is F.linear else found


def read_only(tensor: torch.Tensor) -> torch.Tensor:
    array = tensor.detach().numpy().copy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = np.frombuffer(b"x" + tensor.detach().contiguous().numpy().tobytes(), np.uint8)[1:]
        return torch.from_numpy(memory.view(tensor.detach().numpy().dtype)).view(tensor.shape)


def far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """Rows a MiB apart."""
    memory = torch.zeros(len(tensor), 1 << 18, dtype=tensor.dtype)
    view = memory[:, : tensor[0].numel()].unflatten(1, tensor.shape[1:]) if tensor.dim() > 1 else memory[:, 0]
    return view.copy_(tensor)


def inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


#: The same numbers in other memory.
SAME: Tensors = {
    "view": lambda t: torch.cat([t, t, t])[len(t) : 2 * len(t)],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "step": lambda t: t.repeat_interleave(3, -1)[..., ::3],
    "far apart": far_apart,
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
    "unaligned": unaligned,
    "read-only": read_only,
    "negated": lambda t: torch._neg_view(-t),
    "imaginary": lambda t: torch.complex(t, -t).conj().imag if t.is_floating_point() else torch._neg_view(-t),
    "subclass": lambda t: t.as_subclass(Named),
    "expanded": lambda t: t[:1].expand_as(t),
}
#: Other numbers, or none.
OTHER: Tensors = {
    "meta": lambda t: t.to("meta"),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "conjugated": lambda t: t.to(torch.complex64).conj(),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "sparse": lambda t: t.to_sparse(),
    "functions of its own": lambda t: t.as_subclass(Doubling),
}
IMAGES: Tensors = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "CSR": lambda t: t[:, 0, 0].to_sparse_csr(),
    "MKL-DNN": lambda t: t.to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
    "requires_grad": lambda t: t.clone().requires_grad_(),
    "parameter": nn.Parameter,
    "inference": inference,
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "one number": lambda t: t.flatten()[0],
}


def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(6) % 3


def network() -> nn.Module:
    """Engine "cpu" is what "auto" takes for it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )  # fmt: skip


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


Outcome = Exception | list[torch.Tensor]


def outcome(work: Callable[[], list[torch.Tensor]]) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    except Exception as error:
        return error


def loop(model: nn.Module, optimizer: Any, data: Any, loss_fn: Any = F.cross_entropy) -> list[torch.Tensor]:
    model.train()
    for x, y in data:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def fitted(
    model: nn.Module, optimizer: Any, data: Any, engine: Any, loss_fn: Any = F.cross_entropy
) -> list[torch.Tensor]:
    cnnrs.fit(0, model, data, optimizer=optimizer, loss_fn=loss_fn, engine=engine, verbose=False)
    return [p.detach() for p in model.parameters()]


def follows(got: Outcome, expected: Outcome, engine: str) -> None:
    """What came out is what PyTorch makes of it; engine "cpu" may also refuse."""
    if isinstance(got, Exception):
        refused = engine == "cpu" and isinstance(got, cnnrs.UnsupportedModelError)
        assert refused or type(got) is type(expected), f"{got!r}, expected {expected!r}"
        return
    assert not isinstance(expected, Exception), f"PyTorch raises {expected!r}"
    for a, b in zip(got, expected, strict=True):
        # Float32 sums of up to 600 terms of size one, each rounded by 6e-8.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def digits(root: Path) -> cnnrs.MNIST:
    return cnnrs.MNIST(root, train=False, transform=transforms.ToTensor())


def compiled() -> tuple[_cnnrs.CpuNetwork, nn.Module]:
    model = network().eval()
    lowered = lower(model, gradients=False)
    tensors = [tensor.detach().clone() for tensor in lowered.tensors]
    return _cnnrs.CpuNetwork(lowered.graph, tensors, 1, False), model
