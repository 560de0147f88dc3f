"""The extension of engine ``torch``; `cnnrs.fit` calls it, nobody else should need to."""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, final

import torch

from cnnrs._records import AdamRow, ClassLoss, Epoch, EpochTotals, Node, SgdRow

__all__ = ["Graph", "NativeOptimizer", "__version__", "fit", "forward"]

__version__: str

#: (loss, weight, correct or None, counted) of a batch.
_Counts = tuple[float, float, int | None, int]

@final
class Graph:
    """A network as a list of operations: the twin of ``cnnrs._cnnrs.Graph``."""

    kinds: ClassVar[list[str]]

    def __new__(cls, nodes: Sequence[Node], output: int, tensors: Sequence[list[int]]) -> Graph: ...
    def __len__(self) -> int: ...
    def shapes(self, input: Sequence[int]) -> list[list[int]]: ...
    def costs(self, shapes: Sequence[Sequence[int]]) -> list[tuple[int, tuple[int, int] | None]]: ...
    def reached(self) -> list[int]: ...
    def parameters(self) -> list[list[int]]: ...

@final
class NativeOptimizer:
    """SGD, Adam or AdamW over float32 CPU tensors that stay the user's."""

    def __new__(
        cls, sgd: Sequence[SgdRow], adam: Sequence[AdamRow], clip: Callable[[list[torch.Tensor | None]], None] | None
    ) -> NativeOptimizer: ...
    def gradients(self) -> list[torch.Tensor | None]:
        """The gradients since the last step, or that step's, one per parameter; empty before the first."""

    def updated(self) -> list[bool]:
        """For every parameter, whether it has been updated."""

def fit(
    epoch: Epoch,
    graph: Graph,
    tensors: Sequence[torch.Tensor],
    loss: ClassLoss | Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, _Counts]],
    optimizer: NativeOptimizer | tuple[list[torch.Tensor], Callable[[list[torch.Tensor | None], bool], None]] | None,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor] | None],
) -> EpochTotals:
    """One epoch of a lowered model through libtorch."""

def forward(graph: Graph, tensors: Sequence[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """The output of a lowered model for one batch, with autograd behind it where it is on."""
