"""Compute the frozen convolutional features once; train only the head, as often as you like."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

import cnnrs
from cnnrs import _cnnrs, cpu_features
from cnnrs._progress import progress
from cnnrs.engines import Engine, choose, device_of, to_device
from cnnrs.features import FORMAT, Features, Store, as_labels
from cnnrs.graph import Lowered


def preconv(
    data: Iterable[Any] | Dataset[Any],
    model: nn.Module,
    out: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 32,
    num_workers: int | None = None,
    engine: Engine = "auto",
    precision: Literal["exact"] | None = None,
    verbose: bool = True,
) -> Features:
    """Run ``model`` once over ``data`` and keep what it returns.

    The model runs in eval mode without gradients; its parameters, batch-norm statistics and train/eval flags are as
    before afterwards. Batches are moved to the device the model is on; the features come back to the CPU.

    Args:
        data: a loader or any iterable of (inputs, targets), or a dataset (read in order, ``batch_size`` at a time).
        model: the frozen part, for example ``vgg.features``: (N, 3, H, W) float32 to (N, ...) float16, 32 or 64.
        out: folder to keep the features in: ``features.npy``, ``labels.npy``, ``meta.json``. A second call with the
            same images, transform and weights loads them instead of computing; if anything changed it says what and
            recomputes. None keeps them in memory.
        batch_size: images at a time when ``data`` is a dataset.
        num_workers: threads that read images when ``data`` is a dataset; None: all cores.
        engine: "cpu" computes float32 images on the CPU in native code, equal to PyTorch up to float rounding; "torch" runs
            the layers through libtorch, "python" calls the module. "auto" takes the first that can.
        precision: "exact" keeps engine "cpu" from Winograd convolution, whose rounding is a little coarser.
        verbose: say what is stored or recomputed, and show a bar on terminals and in notebooks.

    Returns:
        :class:`Features`, in dataset order when the loader does not shuffle. It unpacks: ``conv_feat, labels = ...``

    Raises:
        ValueError: no samples; images of different sizes; an unknown engine.
        TypeError: batches that are no pairs.
        FileExistsError: ``out`` holds something else than features.
        RuntimeError: shapes or devices that do not fit, in PyTorch's words.
        UnsupportedModelError: engine="torch" or "cpu" for a model that it cannot run.

    >>> import torch, cnnrs
    >>> batches = [(torch.rand(4, 3, 8, 8), torch.arange(4))] * 2
    >>> features, labels = cnnrs.preconv(batches, torch.nn.Conv2d(3, 5, 3))
    >>> features.shape, labels.tolist()
    (torch.Size([8, 5, 6, 6]), [0, 1, 2, 3, 0, 1, 2, 3])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    loader: Any = data
    if isinstance(data, Dataset):
        loader = cnnrs.DataLoader(data, batch_size=batch_size, num_workers=num_workers)
    device = device_of(model)
    with _frozen(model):
        lowered = choose(model, engine)
        source = _Source(loader)
        if out is None:
            return _compute(source, model, lowered, engine, precision, device, None, verbose)
        store = Store(Path(out))
        key = _key(source, model, lowered, precision)
        changes = _changes(store, key)
        if changes is None:
            return _load(store, source, verbose)
        if changes and verbose:
            print(f"{store.folder}: recomputing the features, because {' and '.join(changes)}")
        store.begin()
        features = _compute(source, model, lowered, engine, precision, device, store.features_path, verbose)
        meta = {
            "shape": list(features.features.shape), "dtype": str(features.features.dtype).removeprefix("torch."),
            "paths": features.paths, "classes": features.classes, "key": key, "cnnrs": cnnrs.__version__,
        }  # fmt: skip
        store.finish(features.labels, meta)
        return store.load({**meta, "format": FORMAT})


def _load(store: Store, source: _Source, verbose: bool) -> Features:
    meta = store.meta()
    assert meta is not None
    features = store.load(meta)
    if verbose:
        print(f"{store.folder}: {len(features)} features are up to date, nothing to compute")
    return features


def _compute(
    source: _Source,
    model: nn.Module,
    lowered: Lowered | None,
    engine: Engine,
    precision: Literal["exact"] | None,
    device: torch.device,
    path: Path | None,
    verbose: bool,
) -> Features:
    labels: list[torch.Tensor] = []

    def inputs() -> Iterator[torch.Tensor]:
        for batch in progress(source.batches(), "features", verbose=verbose):
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise TypeError(f"data must yield pairs (inputs, targets), got a {type(batch).__name__}")
            labels.append(torch.as_tensor(batch[1]))
            yield to_device(torch.as_tensor(batch[0]), device)

    network, batches = None, inputs()
    if lowered is not None and engine != "torch":
        network, batches = cpu_features.network(lowered, batches, required=engine == "cpu", exact=precision == "exact")
    if network is not None:
        memory, shape, dtype = _cnnrs.extract_python(network, batches, path, source.expected)
    elif lowered is not None:
        memory, shape, dtype = _cnnrs.extract_torch(lowered.graph, lowered.tensors, batches, path, source.expected)
    else:
        memory, shape, dtype = _cnnrs.extract_python(_without_grad(model), batches, path, source.expected)
    if path is not None:
        import numpy as np

        features = torch.from_numpy(np.load(path, mmap_mode="c"))
    else:
        kinds = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}
        assert memory is not None and dtype is not None
        features = torch.from_numpy(memory).view(kinds[dtype]).reshape(shape)
    return Features(features, as_labels(labels), source.paths(), source.classes)


def _without_grad(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            output = model(inputs)
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"the model must return one tensor, got {type(output).__name__}")
        return output

    return call


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time being; every layer gets its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


# -- where the rows come from --------------------------------------------------------------------------------


class _RecordingSampler(BatchSampler):
    """Passes a loader's batches of indices on and remembers them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seen: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.inner:
            self.seen.extend(batch)
            yield batch

    def __len__(self) -> int:
        return len(self.inner)


class _Source:
    """The batches and, where the data is a loader over files, which file each row comes from."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self._files: list[str] | None = None
        self._recorder: _RecordingSampler | None = None
        self.classes: list[str] | None = None
        self.transform = ""
        if type(data) not in (DataLoader, cnnrs.DataLoader):
            return
        loader: DataLoader[Any] = data  # type: ignore[assignment]
        self._files, dataset = _files(loader.dataset)
        self.classes = getattr(dataset, "classes", None)
        self.transform = repr(getattr(dataset, "transform", None))
        if loader.batch_sampler is not None:
            self._recorder = _RecordingSampler(loader.batch_sampler)

    @property
    def expected(self) -> int:
        """Number of rows, 0 when unknown."""
        sampler = self._data.sampler if isinstance(self._data, DataLoader) else None
        return len(sampler) if isinstance(sampler, Sized) else 0

    def batches(self) -> Iterable[Any]:
        if self._recorder is None:
            return self._data
        loader: Any = self._data
        self._recorder.seen.clear()
        return type(loader)(  # type: ignore[no-any-return]
            loader.dataset, batch_sampler=self._recorder, num_workers=loader.num_workers, collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory, generator=loader.generator, worker_init_fn=loader.worker_init_fn,
        )  # fmt: skip

    def paths(self) -> list[str] | None:
        """The file of each row, in the order in which the rows came."""
        if self._files is None or self._recorder is None:
            return None
        return [self._files[index] for index in self._recorder.seen]

    def every_file(self) -> list[str] | None:
        """All files when the loader visits each exactly once, in whatever order; None when it may not."""
        if self._files is None or not isinstance(self._data, DataLoader) or self._data.drop_last:
            return None
        sampler = self._data.sampler
        whole = type(sampler) is SequentialSampler or (
            type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(self._files)
        )
        own = type(self._data.batch_sampler) is BatchSampler and self._data.batch_sampler.sampler is sampler
        return self._files if whole and own else None


def _files(dataset: Any) -> tuple[list[str] | None, Any]:
    """The file of each sample, and the dataset below any ``Subset``."""
    if isinstance(dataset, Subset):
        files, inner = _files(dataset.dataset)
        return (None if files is None else [files[i] for i in dataset.indices]), inner
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, list) and samples and isinstance(samples[0], tuple) and isinstance(samples[0][0], str):
        return [sample[0] for sample in samples], dataset
    return None, dataset


# -- the key: everything that shapes the numbers -------------------------------------------------------------

_WORDS = {
    "files": "images were added, removed or changed",
    "transform": "the transform changed",
    "model": "the model or its weights changed",
    "precision": "another precision is asked for",
    "versions": "another version of torch or cnnrs computes them",
}


def _key(
    source: _Source, model: nn.Module, lowered: Lowered | None, precision: Literal["exact"] | None
) -> dict[str, str] | None:
    """Hashes of all that shapes the features; None when the data cannot be identified."""
    files = source.every_file()
    if files is None:
        return None
    listing = hashlib.sha256()
    for path in sorted(files):
        status = os.stat(path)
        listing.update(json.dumps([path, status.st_size, status.st_mtime_ns]).encode())
    return {
        "files": listing.hexdigest(),
        "transform": source.transform,
        "model": _model_hash(model, lowered),
        "precision": precision or "",
        "versions": f"torch {torch.__version__}, cnnrs {cnnrs.__version__}",
    }


def _model_hash(model: nn.Module, lowered: Lowered | None) -> str:
    digest = hashlib.sha256(repr(model).encode())
    if lowered is not None:
        digest.update(repr(lowered.operations).encode())
    tensors = list(model.state_dict().values()) if lowered is None else lowered.tensors
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _changes(store: Store, key: dict[str, str] | None) -> list[str] | None:
    """What makes the stored features unusable, in words: None when they are good, [] when there are none."""
    meta = store.meta()
    if meta is None:
        return []
    if meta.get("format") != FORMAT:
        return [f"they are stored in format {meta.get('format')}, not {FORMAT}"]
    stored = meta.get("key")
    if key is None or not isinstance(stored, dict):
        return ["cnnrs cannot tell whether these are the same images (only loaders over image folders can be compared)"]
    changed = [words for name, words in _WORDS.items() if stored.get(name) != key[name]]
    return changed or None
