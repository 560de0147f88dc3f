"""The Rust extension; `cnnrs` wraps it, nobody else should need to import it."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrs._records import (
    BatchNormGradients,
    ConvolutionGradients,
    CpuTask,
    Epoch,
    EpochTotals,
    Kept,
    Late,
    Limits,
    Node,
    Norm,
    ReadOptions,
    RowFile,
    Transform,
)

__all__ = [
    "Cache",
    "CpuNetwork",
    "CpuPlans",
    "Graph",
    "Kernels",
    "Loader",
    "Memory",
    "__version__",
    "available_threads",
    "check_files",
    "copy_rows",
    "cpu_obstacle",
    "cpu_slow",
    "extract_rows",
    "fit_cpu",
    "fit_python",
    "journal_line",
    "jpeg_decoder",
    "parse_journal",
    "read_idx",
    "row_checksums",
    "scan_folders",
]

__version__: str

class _PythonEngine(Protocol):
    """The user's module, loss and optimizer."""

    def forward(self, inputs: Any, targets: Any, training: bool, /) -> tuple[float, float, int | None, int, int]:
        """(loss, weight, correct or None, counted, samples) of a batch."""

    def backward(self) -> None:
        """Adds the gradients of that loss."""

    def update(self) -> None:
        """Steps the optimizer."""

@final
class Graph:
    """A network as a list of operations, in the order `forward` calls them."""

    kinds: ClassVar[list[str]]
    """The kinds of operations there are."""

    def __new__(cls, nodes: Sequence[Node], output: int, tensors: Sequence[list[int]]) -> Graph: ...
    def __len__(self) -> int: ...
    def shapes(self, input: Sequence[int]) -> list[list[int]]:
        """Output shape of every node for one input shape (N, C, H, W)."""

    def costs(self, shapes: Sequence[Sequence[int]]) -> list[tuple[int, tuple[int, int] | None]]:
        """(FLOPs, receptive field (h, w) or None) of every node, from the shapes that `shapes` returned."""

    def reached(self) -> list[int]:
        """Indices of the parameters that the output depends on."""

    def parameters(self) -> list[list[int]]:
        """Indices of the parameters that each node reads."""

def fit_python(
    epoch: Epoch,
    engine: _PythonEngine,
    batches: Iterator[tuple[Any, Any] | None],
    before: EpochTotals | None,
) -> EpochTotals:
    """One epoch of any module, or what is left of it after ``before``."""

def extract_rows(
    batches: Iterator[tuple[torch.Tensor, list[tuple[int, int]], list[str]]],
    file: RowFile | None,
    expected: int,
) -> tuple[NDArray[np.uint8] | None, list[int], str]:
    """Keeps features: (bytes, or None when they are in a file; shape; torch's name of the type).

    Batches are (contiguous features on the CPU, runs (first row, rows) where they go, identities of the rows).
    """

def copy_rows(
    source: str | os.PathLike[str],
    file: RowFile,
    row: Sequence[int],
    dtype: str,
    moves: Sequence[tuple[int, int, int, Sequence[str]]],
) -> None:
    """Copies rows of shape `row`; moves are (first row there, first row here, rows, identities)."""

def journal_line(json: str) -> bytes:
    """The line of a journal that says ``json``."""

def parse_journal(
    data: bytes,
) -> tuple[str | None, list[tuple[int, int, int, list[str]]], tuple[int, int]]:
    """(JSON of the header or None, runs (first row, rows, checksum, identities), where the records begin and end), up
    to the first line that is torn or not as it was written.
    """

def row_checksums(path: str | os.PathLike[str], row_bytes: int, runs: Sequence[tuple[int, int]]) -> list[int | None]:
    """CRC-32 of runs (first row, rows) of a `.npy` file with our header, None where it ends before."""

def jpeg_decoder() -> str:
    """Who decodes JPEGs in this process, in words."""

@final
class Memory:
    """Batch buffers and scratch space that survive an epoch."""

    def __new__(cls, batches: int) -> Memory:
        """Keeps up to ``batches`` buffers for re-use."""

@final
class Cache:
    """Images that are decoded once: in memory, or in a file. At most ``limit`` bytes."""

    def __new__(cls, limit: int, path: str | os.PathLike[str] | None = None, key: bytes | None = None) -> Cache:
        """``key`` names everything that shaped the images besides their own files."""

    def refresh(self) -> None:
        """Takes in what other processes have added."""

    def status(self) -> tuple[int, int, int, int, str | None]:
        """(images, bytes, limit in bytes, images without room, why nothing can be stored any more)."""

@final
class Loader:
    """Loads batches of samples in order, ahead of the consumer."""

    def __new__(
        cls,
        transform: Transform,
        read: ReadOptions,
        seed: int,
        threads: int,
        memory: Memory,
        rows: torch.Tensor | None = None,
        cache: Kept | None = None,
    ) -> Loader:
        """``rows``: (N, H, W) uint8 gray images, for :meth:`submit_rows`."""

    def submit_files(
        self, indices: Sequence[int], positions: Sequence[int], paths: Sequence[str | os.PathLike[str]]
    ) -> int:
        """Asks for the batch of these files; ``positions`` are their places in the epoch. Returns its ticket."""

    def submit_rows(self, indices: Sequence[int], position: int) -> int:
        """Asks for the batch of these rows of ``rows``; ``position`` is the place of the first one in the epoch."""

    def submit_pixels(
        self, indices: Sequence[int], positions: Sequence[int], images: Sequence[tuple[int, int, int, bytes]]
    ) -> int:
        """Asks for the batch of these images, each (height, width, channels, packed bytes)."""

    def poll(self, ticket: int) -> tuple[str, Any]:
        """Waits for the batch of ``ticket`` and forgets older ones: ("batch", capsule) and the like."""

    def retry(self, ticket: int, sample: int, pixels: tuple[int, int, int, bytes]) -> None:
        """Gives a failed sample of the batch pixels that somebody else decoded."""

    def saw_turned(self) -> bool:
        """Whether one of the files so far had an EXIF orientation other than upright."""

    def drop_samples(self, ticket: int, samples: Sequence[int]) -> None:
        """Does without these failed samples of the batch."""

    def ready(self, ticket: int) -> bool:
        """Whether :meth:`poll` would not wait."""

    def discard(self, ticket: int) -> None:
        """Forgets this batch, if it is still on its way."""

def available_threads() -> int:
    """Threads that ``num_workers=None`` means: the cores this process may use."""

def read_idx(path: str | os.PathLike[str], labels: bool) -> Any:
    """The uint8 array of an IDX file as a capsule for ``torch.from_dlpack``."""

def scan_folders(
    folders: Sequence[str | os.PathLike[str]],
    numbers: Sequence[int],
    extensions: Sequence[str] | None = None,
    skip_hidden: bool = False,
) -> tuple[list[tuple[str, int]], list[int | None], list[os.PathLike[str]]]:
    """The files below each folder in torchvision's order: ([(path, number of the folder)], [files per folder, or None
    for a folder that does not exist], [links that lead back and were not followed]).
    """

def check_files(
    paths: Sequence[str | os.PathLike[str]],
    progress: Callable[[int], object],
    threads: int,
    limits: Limits,
) -> list[tuple[str | None, int, int, int, int, Exception | None, str | None]]:
    """Per file: (format, width, height, bytes, hash of the contents, what is wrong with it, whose fault that is).

    The last is "broken", "truncated", "limit", "unreadable" or "ours"; the first two are about bytes that were read to
    the end.
    """

@final
class CpuPlans:
    """Compiled plans and the threads that run them, kept from epoch to epoch."""

    def __new__(cls) -> CpuPlans: ...
    def __len__(self) -> int:
        """Number of plans at hand: one per input shape, phase and set of trained parameters."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the last epoch, also after an exception."""

@final
class Kernels:
    """Operations that autograd calls, over contiguous float32 (N, H, W, C), with the threads and memory they share."""

    def __new__(cls, workers: int, torch: str | None) -> Kernels:
        """``workers``: number of threads; ``torch``: the library whose threads they are, if it has some of OpenMP's."""

    @property
    def openmp(self) -> bool:
        """Whether the threads are PyTorch's own."""

    def conv3x3(
        self,
        input: torch.Tensor,
        filters: torch.Tensor,
        bias: torch.Tensor | None,
        output: torch.Tensor,
        padding: int,
    ) -> None:
        """A 3 x 3 convolution of stride 1 with filters (O, I, 3, 3), all channels multiples of 16, into ``output``."""

    def conv3x3_input(
        self, derivative: torch.Tensor, filters: torch.Tensor, gradient: torch.Tensor, padding: int
    ) -> None:
        """The gradient of the input of such a convolution."""

    def conv3x3_weight(
        self, input: torch.Tensor, derivative: torch.Tensor, gradient: torch.Tensor, padding: int
    ) -> None:
        """The gradient of the filters of such a convolution."""

    def convolution(
        self,
        input: torch.Tensor,
        norm: Norm | None,
        gate: torch.Tensor | None,
        filters: torch.Tensor,
        output: torch.Tensor,
        stride: int,
        padding: int,
        moments: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """A convolution of ``input``, or of what ``norm`` makes of it, into ``output``.

        Filters (O, I, 1, 1) with stride 1, or (C, 1, k, k) with k 3, 5 or 7 and stride 1 or 2; at least 16 channels.
        ``padding``: zeros above and to the left; below and to the right there are as many as ``output`` needs.
        Behind the norm and in front of a 1 x 1 convolution ``gate`` (N, C) multiplies. ``moments``: where mean and
        variance of the output go.
        """

    def convolution_backward(
        self,
        input: torch.Tensor,
        norm: Norm | None,
        gate: torch.Tensor | None,
        filters: torch.Tensor,
        stride: int,
        padding: int,
        derivative: torch.Tensor,
        output: torch.Tensor | None,
        late: Late | None,
        gradients: ConvolutionGradients,
    ) -> None:
        """Its gradients; with a norm, that of ``input`` goes as far as its result, with a gate as far as the gate's.

        ``late``: what is left to do to ``derivative``, for which ``output`` is needed, too.
        """

    def squeeze(self, input: torch.Tensor, norm: Norm, mean: torch.Tensor) -> None:
        """The mean (N, C) over every image of what ``norm`` makes of ``input``."""

    def squeeze_backward(
        self,
        input: torch.Tensor,
        norm: Norm,
        gate: torch.Tensor,
        mean: torch.Tensor,
        derivative: torch.Tensor,
        gradients: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """From ``derivative``, that of a gate's result, and ``mean``, that of the mean the gate was made from.

        The derivative of the norm's result goes in the place of ``derivative``, the gradients of weight and bias into
        ``gradients``.
        """

    def finish(self, input: torch.Tensor, late: Late) -> None:
        """Does what is left to do to a derivative in its place; ``input``: the batch norm's."""

    def moments(self, input: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> None:
        """Mean and biased variance of every channel."""

    def batch_norm(self, input: torch.Tensor, residual: torch.Tensor | None, norm: Norm, output: torch.Tensor) -> None:
        """The norm, the sum with ``residual`` and the activation."""

    def batch_norm_backward(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None,
        norm: Norm,
        derivative: torch.Tensor,
        training: bool,
        gradients: BatchNormGradients,
    ) -> None:
        """All gradients; ``training``: mean and variance are the batch's own."""

def cpu_obstacle(graph: Graph, input: Sequence[int], targets: Sequence[int] | None) -> str | None:
    """Why the cpu engine cannot run a graph on inputs (and targets that are values) of this shape; None if it can."""

def cpu_slow(graph: Graph) -> list[int]:
    """Nodes that PyTorch trains at least as fast as the cpu engine, where they are most of the work; else none."""

def fit_cpu(
    epoch: Epoch,
    graph: Graph,
    tensors: Sequence[torch.Tensor],
    task: CpuTask,
    plans: CpuPlans,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor] | None]
    | tuple[torch.Tensor, torch.Tensor, list[int], list[int]],
) -> EpochTotals:
    """One epoch of a lowered model without libtorch."""

@final
class CpuNetwork:
    """A frozen network on engine cpu, compiled for the shape of the first batch and again when it changes."""

    def __new__(
        cls, graph: Graph, tensors: Sequence[torch.Tensor], workers: int, exact: bool, torch: str | None = None
    ) -> CpuNetwork: ...
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features of one batch, contiguous float32 (N, ...), of float32 images on the CPU."""

    def look(self, images: torch.Tensor) -> None:
        """Compute one batch in float32 and count the values that int8 layers will read."""

    def ranges(self) -> list[tuple[int, float, float]]:
        """(operation, lowest, highest) of the values counted, but for 0.01 %; NaN where some were not finite."""

    def quantize(self, shape: Sequence[int], ranges: Sequence[tuple[int, float, float]]) -> None:
        """From now on layers that gain by it compute in int8, what they read being in these ranges."""

    @staticmethod
    def byte_layers(
        graph: Graph, tensors: Sequence[torch.Tensor], input: Sequence[int], bf16: bool
    ) -> tuple[list[str], int]:
        """The layers that would compute in int8 or bfloat16, and how many convolutions and linear layers there are."""

    def in_bf16(self, shape: Sequence[int]) -> None:
        """From now on layers that gain by it compute in bfloat16; ValueError where no layer would."""

    @staticmethod
    def bf16_is_fast() -> bool:
        """Whether this processor has an instruction for bfloat16 (AVX512-BF16)."""

    @staticmethod
    def bytes_are_fast() -> bool:
        """Whether this processor has instructions for int8, without which it is not faster than float32."""

    def is_current(self) -> bool:
        """Whether the plan was made of the weights as they are, bit for bit; False before the first batch."""

    def timings(self) -> list[tuple[str, str, str, int, float]]:
        """Per step: name, kind, method, floating-point operations per image, seconds since the first batch."""

    def bytes(self) -> tuple[int, int, int]:
        """Bytes of activations, weights and the workers' memory, 0 before the first batch."""

    @staticmethod
    def obstacle(graph: Graph, tensors: Sequence[torch.Tensor], input: Sequence[int]) -> str | None:
        """Why a graph cannot be computed on inputs of this shape; None where it can."""
