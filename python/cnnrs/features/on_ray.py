"""Features of big collections on many machines: a class for Ray Data's ``map_batches``, and one call around it.

Ray (``pip install 'cnnrs[ray]'``) moves the work; cnnrs reads the images and runs the model in each worker. The images
must be found under the same paths on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from cnnrs import _cnnrs
from cnnrs.data.image_list import ImageList
from cnnrs.data.loader import DataLoader
from cnnrs.engine.choice import Engine
from cnnrs.engine.memory_order import Order
from cnnrs.features.extract import Extractor, kept
from cnnrs.features.features import Features
from cnnrs.features.plan import Plan
from cnnrs.features.precision import Precision, type_name
from cnnrs.features.preparation import source_of
from cnnrs.features.samples import Data, elsewhere
from cnnrs.features.session import Session
from cnnrs.features.store import Store
from cnnrs.features.update import File, Item, Update, placed, runs_of
from cnnrs.model.backbone import Backbone, resolve
from cnnrs.model.modes import frozen

# Model batches in one task: while one is computed the next are decoded, and a task is worth its overhead.
_BATCHES = 8


class Extract:
    """Images to features, for ``dataset.map_batches(Extract, fn_constructor_args=...)``.

    A batch has the column ``path`` (of image files) or ``sample`` (indices of `data`, with ``pass``); it keeps its
    columns and gets ``features`` (N, ...) more, and with ``sample`` also ``identity``, a hash of the image's contents.
    bfloat16 features are uint16, their bits: NumPy has no such type.

    Args:
        model: as for :func:`cnnrs.preconv`.
        transform: of the images at ``path``; None: what the weights want.
        data: a loader whose samples the column ``sample`` counts.
        layer, pool, weights, engine, precision, dtype: as for :func:`cnnrs.preconv`.
        batch_size: images the model gets at a time.
        num_workers: threads that read images.
        seed: of the augmentation.
        device: "cuda" moves the model to the worker's GPU.
        order: of memory, in which a model that is called on the CPU gets its batches.

    Raises:
        KeyError: a batch without those columns.

    >>> import numpy as np, tempfile, torch, cnnrs.ray
    >>> from PIL import Image
    >>> from torchvision.transforms import ToTensor
    >>> path = tempfile.mkdtemp() + "/blue.png"
    >>> Image.new("RGB", (8, 8), (0, 0, 255)).save(path)
    >>> extract = cnnrs.ray.Extract(torch.nn.AvgPool2d(8), ToTensor())
    >>> extract({"path": np.array([path])})["features"].ravel().tolist()
    [0.0, 0.0, 1.0]
    """

    def __init__(
        self,
        model: nn.Module | str,
        transform: Any = None,
        *,
        data: Data | None = None,
        layer: str | None = None,
        pool: str | None = None,
        weights: Any = "DEFAULT",
        engine: Engine = "auto",
        precision: Precision | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        order: Order = "contiguous",
    ) -> None:
        _refuse_int8(precision)
        body = resolve(model, layer, pool, weights)
        if device is not None:
            body = body.to(device)
        self.body = body
        self.transform = transform if transform is not None or not isinstance(body, Backbone) else body.transform
        self.data = data
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        # For the life of the worker: the flags matter to nobody else.
        self._frozen = ExitStack()
        self._frozen.enter_context(frozen(body))
        self.extractor = Extractor(body, engine, precision, type_name(dtype), verbose=False)
        # Each worker's clock might choose another one.
        self.extractor.order = order
        # Nor need they have the same instructions.
        self.extractor.may_be_native = False

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with the column ``features``."""
        if "sample" in batch and self.data is not None:
            data, samples = self.data, [int(i) for i in batch["sample"]]
            passes = {int(number) for number in batch["pass"]}
            if len(passes) != 1:
                raise ValueError(f"a batch must be of one pass, got {sorted(passes)}")
            number = passes.pop()
        elif "path" in batch:
            images = ImageList([str(path) for path in batch["path"]], self.transform)
            data = Data(DataLoader(images, batch_size=self.batch_size, num_workers=self.num_workers))
            samples, number = list(range(len(images))), 0
        else:
            raise KeyError(f'a batch needs the column "path", got {", ".join(batch)}')
        data.device = self.extractor.device
        cut = [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]
        features = self.extractor(placed(data.batches(cut, self.seed, number)), None, len(samples))
        assert features is not None
        if len(features) != len(samples):
            raise ValueError(
                f"{len(samples) - len(features)} of {len(samples)} files failed, and on Ray none can be left out: use "
                'on_error="raise"; cnnrs.check lists files that cannot be read'
            )
        bits = features.view(torch.uint16) if features.dtype == torch.bfloat16 else features
        found = {**batch, "features": bits.numpy()}
        if "sample" in batch and self.data is not None:
            found["identity"] = np.array(self._identities(data, samples, batch))
        return found

    @staticmethod
    def _identities(data: Data, samples: list[int], batch: dict[str, np.ndarray]) -> list[str]:
        """Of images that are what the driver saw; "" for those that have changed since."""
        identities = [data.identity(i) for i in samples]
        now = [None if (stat := data.stat(i)) is None else elsewhere(stat) for i in samples]
        stats = zip(batch["bytes"].tolist(), batch["changed"].tolist(), strict=True)
        return [one if stat in (None, then) else "" for one, stat, then in zip(identities, now, stats, strict=True)]


def extract(
    data: Dataset[Any] | Any,
    model: nn.Module | str,
    out: str | os.PathLike[str],
    *,
    workers: int = 2,
    gpus: float = 0,
    format: str = "store",
    layer: str | None = None,
    pool: str | None = None,
    weights: Any = "DEFAULT",
    batch_size: int = 32,
    num_workers: int | None = None,
    engine: Engine = "auto",
    precision: Precision | None = None,
    dtype: str | torch.dtype | None = None,
    passes: int = 1,
    seed: int = 0,
    any_transform: bool = False,
    overwrite: bool = False,
    verbose: bool = True,
) -> Features | None:
    """:func:`cnnrs.preconv` on the workers of a Ray cluster.

    The store is the one that ``preconv`` writes: each can go on where the other was killed, and opens what the other
    wrote. The process that calls this writes it; with ``format="parquet"`` the workers write themselves.

    Args:
        data: a data set of image files, or a loader over one.
        model: as for ``preconv``; sent to the workers.
        out: the folder of the store, or where Parquet files go (also ``s3://`` and the like).
        workers: processes, each with its own copy of the model.
        gpus: of each worker.
        format: "store", or "parquet" with the columns path, label, pass and features.
        layer: as for ``preconv``, like all that follow but ``num_workers``.
        pool: of the layer's output.
        weights: of a model given by name.
        batch_size: images the model gets at a time.
        num_workers: threads of each worker that read images.
        engine: who runs the model.
        precision: what it computes in.
        dtype: type to keep features in.
        passes: how many times all images are augmented and computed.
        seed: of the augmentation.
        any_transform: accept a transform that is not the one the weights were trained with.
        overwrite: throw away features of another model.
        verbose: say what is stored or recomputed.

    Returns:
        The features; None for Parquet.

    Raises:
        ImportError: Ray is not installed.
        ValueError: data whose samples are no files, or whatever ``preconv`` refuses.
    """
    _refuse_int8(precision)
    ray = _ray()
    if format not in ("store", "parquet"):
        raise ValueError(f"format must be 'store' or 'parquet', got {format!r}")
    body = resolve(model, layer, pool, weights)
    source = source_of(data, body, batch_size, num_workers, any_transform)
    if source.unidentified:
        raise ValueError(f"cnnrs.ray.extract needs a data set of image files: {source.unidentified}")
    options = {"engine": engine, "precision": precision, "dtype": type_name(dtype), "seed": seed}
    with frozen(body):
        extractor = Extractor(body, engine, precision, type_name(dtype), verbose)
        extractor.may_be_native = False
        session = _RaySession(source, body, extractor, verbose, overwrite, ray, options, workers, gpus)
        if format == "store":
            return session.in_folder(Store(out), passes, seed)
        session.to_parquet(os.fspath(out), session.plan(passes, seed))
    return None


class _RaySession(Session):
    """`preconv` with somebody else computing."""

    def __init__(
        self,
        data: Data,
        model: nn.Module,
        extractor: Extractor,
        verbose: bool,
        overwrite: bool,
        ray: Any,
        options: dict[str, Any],
        workers: int,
        gpus: float,
    ) -> None:
        super().__init__(data, model, extractor, verbose, overwrite)
        self.ray = ray
        self.options = options
        self.workers = workers
        self.gpus = gpus

    def compute(self, update: Update, file: File) -> None:
        """Have the workers compute what is missing, and write it in whatever order it comes."""
        dataset = self._mapped(update.plan, update.missing)
        received = self._bar(self._received(dataset, update.plan), update.count)
        rows = ((kept(features, self.extractor.dtype), runs, ids) for features, runs, ids in received)
        _cnnrs.extract_rows(rows, file, 0)

    def to_parquet(self, out: str, plan: Plan) -> None:
        """Have the workers compute everything and write it themselves."""
        dataset = self._mapped(plan, [plan.samples] * plan.passes, named=True)
        dataset.drop_columns(["sample", "row", "bytes", "changed"]).write_parquet(out)

    def _mapped(self, plan: Plan, missing: list[list[int]], named: bool = False) -> Any:
        tables = list(_tables(plan, missing, named))
        resources: dict[str, Any] = {"num_gpus": self.gpus} if self.gpus else {}
        # Sent once, not with every task.
        arguments = {
            **self.options,
            "data": self.data,
            "batch_size": plan.batch_size,
            "device": "cuda" if self.gpus else None,
            "order": plan.order or "contiguous",
        }
        dataset = self.ray.data.from_arrow(tables)
        return dataset.map_batches(
            Extract,
            fn_constructor_args=(self.model,),
            fn_constructor_kwargs=arguments,
            # One table, one task: the model gets the same batches as in one process.
            batch_size=None,
            compute=self.ray.data.ActorPoolStrategy(size=min(self.workers, len(tables))),
            **resources,
        )

    @staticmethod
    def _received(dataset: Any, plan: Plan) -> Iterator[Item]:
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
            # A copy: Ray's arrays may not be written, and torch knows no such tensors.
            features = torch.from_numpy(np.array(_stacked(batch["features"])))
            if features.dtype == torch.uint16:
                features = features.view(torch.bfloat16)
            rows = batch["row"].tolist()
            yield features, runs_of(rows), [str(one) for one in batch["identity"]]


def _tables(plan: Plan, missing: list[list[int]], named: bool) -> Iterator[Any]:
    """The work, as Arrow tables of a few model batches each."""
    import pyarrow

    place = plan.places()
    size = plan.batch_size * _BATCHES
    for number, samples in enumerate(missing):
        for start in range(0, len(samples), size):
            some = samples[start : start + size]
            stats = [elsewhere(plan.stats[i]) if plan.stats is not None else (-1, -1) for i in some]
            columns: dict[str, Any] = {
                "sample": some,
                "pass": [number] * len(some),
                "row": [number * len(place) + place[i] for i in some],
                "bytes": [stat[0] for stat in stats],
                "changed": [stat[1] for stat in stats],
            }
            if named:
                files = plan.data.files
                columns["path"] = [files[i] if files is not None else None for i in some]
                columns["label"] = plan.data.labels(some).tolist()
            yield pyarrow.table(columns)


def _stacked(column: Any) -> np.ndarray:
    return column if column.dtype != object else np.stack(list(column))


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("cnnrs.ray needs Ray: pip install 'cnnrs[ray]'") from error
    return ray


def _refuse_int8(precision: Precision | None) -> None:
    if precision == "int8":
        raise ValueError(
            'precision="int8" is not computed on Ray: its ranges are found on the first images of all, which no worker '
            "has; use cnnrs.preconv"
        )
