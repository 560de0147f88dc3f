"""Switches of the process by which PyTorch chooses kernels: read and set in either interface, none of which raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs._util.precision import kernel_switches, precisions, tf32, uses_tf32
from cnnrs.engine import verify
from cnnrs.model.lowering import lower

NEWER = hasattr(torch.backends.cudnn, "conv")
newer = pytest.mark.skipif(not NEWER, reason="of torch 2.9 on")
backends: Any = torch.backends


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Both interfaces say the same again, what they say in a process that has set nothing."""
    yield
    if NEWER:
        backends.fp32_precision = backends.cudnn.fp32_precision = "none"
        for settings in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
            settings.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    assert not backends.cuda.matmul.allow_tf32 and backends.cudnn.allow_tf32


def of(setting: Callable[[], Any], value: Any, name: str = "fp32_precision") -> Callable[[], None]:
    return lambda: setattr(setting(), name, value)


#: How products and convolutions may be told, and whether either may then use TF32.
SET: dict[str, tuple[Callable[[], None], bool]] = {
    "nothing": (lambda: None, True),
    "high": (lambda: torch.set_float32_matmul_precision("high"), True),
    "no convolutions": (of(lambda: backends.cudnn, False, "allow_tf32"), False),
    "products": (of(lambda: backends.cuda.matmul, True, "allow_tf32"), True),
}
SET_NEWER: dict[str, tuple[Callable[[], None], bool]] = {
    "new products": (of(lambda: backends.cuda.matmul, "tf32"), True),
    "new convolutions": (of(lambda: backends.cudnn.conv, "ieee"), False),
    "everything": (of(lambda: backends, "tf32"), True),
    "recurrent networks": (of(lambda: backends.cudnn.rnn, "ieee"), True),
}
every = pytest.mark.parametrize("name", [*SET, *(pytest.param(name, marks=newer) for name in SET_NEWER)])


@every
def test_whichever_interface_was_used_everything_goes_on(name: str) -> None:
    use, expected = (SET | SET_NEWER)[name]
    use()
    assert uses_tf32() is expected
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert cnnrs.explain(model).engine == "cpu"
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))
    loss, _ = cnnrs.fit(0, model, [batch], optimizer=sgd, loss_fn=F.cross_entropy, verbose=False)
    assert loss > 0
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, is_floating_point=lambda: True)
    assert verify._tolerance(on_gpu, None) == (2.0**-5 if expected else 2.0**-11.5)


@every
def test_tf32_for_the_time_being(name: str) -> None:
    use, _ = (SET | SET_NEWER)[name]
    use()
    before = precisions()
    with tf32(True):
        assert uses_tf32() and precisions() != tuple(["ieee"] * len(before))
        with tf32(False):
            assert not uses_tf32()
        assert uses_tf32()
    assert precisions() == before


CHOOSE: dict[str, tuple[str, Any]] = {
    "benchmark": ("cudnn", True), "benchmark_limit": ("cudnn", 3), "deterministic": ("cudnn", True),
    "enabled": ("cudnn", False), "allow_fp16_reduced_precision_reduction": ("cuda.matmul", False),
    "allow_bf16_reduced_precision_reduction": ("cuda.matmul", False), "allow_tf32": ("cuda.matmul", True),
    "allow_fp16_accumulation": ("cuda.matmul", True),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOOSE)
def test_every_switch_that_chooses_kernels_counts(name: str) -> None:
    where, value = CHOOSE[name]
    settings = backends.cudnn if where == "cudnn" else backends.cuda.matmul
    old = getattr(settings, name, None)
    if old is None:
        pytest.skip("a newer torch's")
    before = kernel_switches()
    hash(before)
    setattr(settings, name, value)
    try:
        assert kernel_switches() != before
    finally:
        setattr(settings, name, old)
    assert kernel_switches() == before


def test_a_forward_that_sets_the_precision_is_called() -> None:
    class Sets(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.set_float32_matmul_precision("high")
            return super().forward(x)

    with pytest.raises(Exception, match="precision of float32"):
        lower(Sets(2, 2))
