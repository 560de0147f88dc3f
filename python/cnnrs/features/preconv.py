"""Compute the frozen convolutional features once; train only the head, as often as you like."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from cnnrs._util.devices import usable
from cnnrs.engine.choice import Engine
from cnnrs.features import distributed
from cnnrs.features.extract import Extractor
from cnnrs.features.features import Features
from cnnrs.features.precision import Precision, type_name
from cnnrs.features.preparation import source_of
from cnnrs.features.session import Session
from cnnrs.features.store import Store
from cnnrs.model.backbone import resolve
from cnnrs.model.modes import frozen, on_device


def preconv(
    data: Iterable[Any] | Dataset[Any],
    model: nn.Module | str,
    out: str | os.PathLike[str] | None = None,
    *,
    layer: str | None = None,
    pool: str | None = None,
    weights: Any = "DEFAULT",
    batch_size: int | None = None,
    num_workers: int | None = None,
    device: str | torch.device | None = None,
    engine: Engine = "auto",
    precision: Precision | None = None,
    dtype: str | torch.dtype | np.dtype[Any] | None = None,
    passes: int = 1,
    seed: int = 0,
    any_transform: bool = False,
    overwrite: bool = False,
    check: bool = True,
    verbose: bool = True,
) -> Features:
    """Run ``model`` once over ``data`` and keep what it returns: (N, ...) features and (N,) labels.

    The model runs in eval mode without gradients; its parameters, batch-norm statistics and train/eval flags are as
    before afterwards. Batches are moved to the model's device; the features come back to the CPU.

    Args:
        data: a loader or any iterable of (inputs, targets), or a dataset (read ``batch_size`` at a time). Images
            without a transform get the one that the weights want, where that is known.
        model: the frozen part, for example ``vgg.features``: (N, 3, H, W) float32 to (N, ...) float16, bfloat16, 32 or
            64; or a name, as for :func:`cnnrs.backbone`.
        out: folder to keep the features in: ``features.npy``, ``labels.npy``, ``meta.json``. Kill it at any time: the
            next call computes only the rows that are missing. A later call computes only images that are new or
            changed, and everything when the transform or the versions are others; it says so in one line. Features
            of another model are not replaced unless ``overwrite`` is set. None keeps the features in memory. With a
            loader made with ``rank`` and ``world_size``, all processes of ``torchrun`` call this with the same folder,
            share the work and get all features.
        layer: path of the module whose output is taken, ``"features.29"`` for example; see :func:`cnnrs.backbone`.
        pool: ``"avg"`` or ``"max"`` over all positions, ``"cls"`` for the first token, None for everything.
        weights: of a model given by name; see :func:`cnnrs.backbone`.
        batch_size: images at a time when ``data`` is a dataset; None: 32, on CUDA 256.
        num_workers: threads that read images when ``data`` is a dataset; None: all cores.
        device: where to compute, ``"cuda"`` for example: the model is there for the time of the call. None: where it
            is.
        engine: "cpu" computes float32 images on the CPU in native code, equal to PyTorch up to float rounding;
            "python" calls the module. "auto" takes the first that can; where it calls a large convolutional network on
            the CPU, all batches go to it in the order of memory that is faster on the first one. "torch" runs the
            layers through libtorch, and needs the package ``cnnrs-libtorch``.
        precision: "exact" (no TF32 on a GPU; no Winograd convolution on a CPU, whose rounding is a little coarser),
            "tf32", or "bf16" and "fp16" by autocast; on a CPU with AVX512-BF16 engine "cpu" computes "bf16" where it
            can run the model; "int8" on a CPU: ranges are found on the first 256 images. Both: see ``docs/preconv.md``,
            the features are near those in float32, not equal to them. None: as torch is set.
        dtype: type to keep features in, "float32", "float16" or "bfloat16"; None: what the model returns. A value that
            float16 cannot hold is an error, and so is one that is infinite or NaN with ``precision="fp16"``.
        passes: how many times all images are augmented and computed: K * N rows, pass by pass.
        seed: of the augmentation in a folder or with passes, which then depends on seed, pass and image only. One pass
            in memory is what the loader gives, which draws as it always does.
        any_transform: accept a transform that is not the one the weights were trained with.
        overwrite: throw away what ``out`` holds of another model, or of this one with other weights.
        check: two images of the first batch also go through the module itself. Where its features are not those of the
            engine, it is called instead, and a note says why.
        verbose: say what is stored or recomputed, and show a bar on terminals and in notebooks.

    Returns:
        :class:`Features`. It unpacks: ``conv_feat, labels = ...``. In a folder, and with passes, the rows are in the
        order of the data set; in memory in the order the loader gives.

    Raises:
        ValueError: no samples; images of different sizes; an unknown engine, layer or type; a device that is not
            there; a transform that is not that of the weights.
        TypeError: batches that are no pairs.
        FileExistsError: ``out`` holds something else than features, or those of another model.
        OSError: the disk is full: what is computed is safe, and the next call goes on from there.
        RuntimeError: shapes or devices that do not fit, in PyTorch's words.
        UnsupportedModelError: engine="torch" or "cpu" for a model that it cannot run, or computes something else of;
            precision="int8" for one that engine "cpu" cannot run, or of which no layer would compute in int8.

    >>> import torch, cnnrs
    >>> batches = [(torch.rand(4, 3, 8, 8), torch.arange(4))] * 2
    >>> features, labels = cnnrs.preconv(batches, torch.nn.Conv2d(3, 5, 3))
    >>> features.shape, labels.tolist()
    (torch.Size([8, 5, 6, 6]), [0, 1, 2, 3, 0, 1, 2, 3])
    """
    if isinstance(data, (str, os.PathLike)):
        raise TypeError(
            f"data must be a loader or a data set, got a path: cnnrs.ImageFolder({os.fspath(data)!r}, transform)"
        )
    if not isinstance(passes, SupportsIndex) or operator.index(passes) < 1:
        raise ValueError(f"passes must be at least 1, a whole number, got {passes!r}")
    if not isinstance(seed, SupportsIndex):
        raise TypeError(f"seed must be a whole number, got {seed!r}")
    place = None if device is None else usable(device)
    body = resolve(model, layer, pool, weights)
    with frozen(body), on_device(body, place):
        passes, seed = operator.index(passes), operator.index(seed)
        source = source_of(data, body, batch_size, num_workers, any_transform)
        extractor = Extractor(body, engine, precision, type_name(dtype), verbose, check)
        shared = out is not None and distributed.is_shared(source.data)
        # Processes of one job need not have the same instructions.
        extractor.may_be_native = not shared
        session = Session(source, body, extractor, verbose, overwrite)
        if out is None:
            return session.in_memory(passes, seed)
        if shared:
            return distributed.in_folder(session, Store(out), passes, seed)
        return session.in_folder(Store(out), passes, seed)
