"""The extension of engine ``torch``; `cnnrs.fit` calls it, nobody else should need to."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch

__all__ = ["Graph", "NativeOptimizer", "__version__", "fit", "forward"]

__version__: str

#: (loss, weight, correct or None, counted) of a batch.
_Counts = tuple[float, float, int | None, int]
#: (loss, weight, correct or None, counted, samples, batches, last mean loss or None, batches since the last step).
_Totals = tuple[float, float, int | None, int, int, int, float | None, int]

@final
class Graph:
    """A network as a list of operations: the twin of ``cnnrs._cnnrs.Graph``."""

    def __new__(
        cls, nodes: Sequence[tuple[str, str, list[int], dict[str, Any]]], output: int, tensors: Sequence[list[int]]
    ) -> Graph: ...
    def __len__(self) -> int: ...
    def shapes(self, input: Sequence[int]) -> list[list[int]]: ...
    def costs(self, shapes: Sequence[Sequence[int]]) -> list[tuple[int, tuple[int, int] | None]]: ...
    def reached(self) -> list[int]: ...
    def parameters(self) -> list[list[int]]: ...

@final
class NativeOptimizer:
    """SGD, Adam or AdamW over float32 CPU tensors that stay the user's."""

    def __new__(
        cls, sgd: Sequence[Any], adam: Sequence[Any], clip: Callable[[list[torch.Tensor | None]], None] | None
    ) -> NativeOptimizer: ...
    def gradients(self) -> list[torch.Tensor | None]:
        """The gradients since the last step, or that step's, one per parameter; empty before the first."""

    def updated(self) -> list[bool]:
        """For every parameter, whether it has been updated."""

def fit(
    number: int,
    phase: str,
    graph: Graph,
    tensors: Sequence[torch.Tensor],
    loss: tuple[Any, ...] | Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, _Counts]],
    optimizer: NativeOptimizer | tuple[list[torch.Tensor], Callable[[list[torch.Tensor | None], bool], None]] | None,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor] | None],
    accumulate: int,
    after: Callable[[int, float], Any] | None,
) -> _Totals:
    """One epoch of a lowered model through libtorch."""

def forward(graph: Graph, tensors: Sequence[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """The output of a lowered model for one batch, with autograd behind it where it is on."""
