"""What crosses to Rust by name: unknown names and keys are errors, and each kind of error has its exception."""

from __future__ import annotations

import copy
import io
import pickle
import struct
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cnnrs
from cnnrs import _cnnrs, _records
from cnnrs.engine.losses import Totals
from cnnrs.errors import DecodeKind
from cnnrs.model.lowering import lower
from image_doors import apply_op, decode_image

NLL: dict[str, Any] = {"kind": "nll", "weight": None, "ignore_index": -100}
SGD: dict[str, Any] = {
    "parameter": 0, "momentum_buffer": None, "used": False, "lr": 0.1, "momentum": 0.0, "dampening": 0.0,
    "weight_decay": 0.0, "nesterov": False, "maximize": False,
}  # fmt: skip
ADAM: dict[str, Any] = {
    "parameter": 0, "step": torch.zeros(()), "exp_avg": torch.zeros(2, 2), "exp_avg_sq": torch.zeros(2, 2),
    "max_exp_avg_sq": None, "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0,
    "maximize": False, "decoupled": False,
}  # fmt: skip
EPOCH: dict[str, Any] = {"number": 0, "phase": "training", "accumulate": 1, "after": None}
TASK: dict[str, Any] = {"loss": NLL, "sgd": [], "adam": [], "clip": None, "workers": 1, "seed": 0, "unseen": False}
READ: dict[str, Any] = {
    "decode": "exact", "truncated": "error", "exif": False, "limits": {"pixels": None, "bytes": None},
    "deep": "read", "paged": "leave",
}  # fmt: skip
TRANSFORM: dict[str, Any] = {"ops": [], "finish": {"kind": "float"}, "pillow13": True}


def train(epoch: Any = EPOCH, task: Any = TASK) -> Any:
    """An epoch without batches."""
    lowered = lower(nn.Sequential(nn.Linear(2, 2)))
    return _cnnrs.fit_cpu(epoch, lowered.graph, lowered.tensors, task, _cnnrs.CpuPlans(), iter([]))


def loader(transform: Any = TRANSFORM, read: Any = READ) -> _cnnrs.Loader:
    """One without a thread."""
    return _cnnrs.Loader(transform, read, 0, 0, _cnnrs.Memory(1))


def op(**spec: Any) -> Any:
    """One operation on one pixel."""
    record: Any = spec
    return apply_op(b"\0\0\0", 1, 1, record, "pillow13")


def with_task(**changes: Any) -> Any:
    """An epoch of another task."""
    return train(task=TASK | changes)


UNKNOWN = {
    "loss": (lambda: with_task(loss={"kind": "hinge"}), "loss 'hinge' is unknown, known are 'mse', 'bce_with_logits',"),
    "key of a loss": (
        lambda: with_task(loss={"kind": "mse", "weight": None}),
        "loss 'mse': unknown key 'weight', known are 'kind'",
    ),
    "missing key of a loss": (
        lambda: with_task(loss={"kind": "nll", "weight": None}),
        "loss 'nll': key 'ignore_index' is missing among 'kind', 'weight'",
    ),
    "clip": (
        lambda: with_task(clip={"kind": "abs", "most": 1.0}),
        "clip 'abs' is unknown, known are 'norm', 'value'",
    ),
    "key of a clip": (
        lambda: with_task(clip={"kind": "norm", "most": 1.0, "p": 2}),
        "clip 'norm': unknown key 'p', known are 'kind', 'most'",
    ),
    "key of SGD": (
        lambda: with_task(sgd=[SGD | {"eps": 0.0}]),
        "task: sgd: a row of SGD: unknown key 'eps', known are 'momentum_buffer',",
    ),
    "key of Adam": (
        lambda: with_task(adam=[ADAM | {"amsgrad": True}]),
        "task: adam: a row of Adam: unknown key 'amsgrad', known are 'lr',",
    ),
    "key of a task": (lambda: with_task(threads=1), "task: unknown key 'threads', known are 'clip', 'loss',"),
    "phase": (
        lambda: train(EPOCH | {"phase": "test"}),
        "epoch: phase 'test' is unknown, known are 'training', 'validation'",
    ),
    "key of an epoch": (lambda: train(EPOCH | {"epochs": 1}), "epoch: unknown key 'epochs', known are 'number',"),
    "operation": (lambda: op(kind="blur"), "image operation 'blur' is unknown, known are 'resize', 'resize_shorter',"),
    "key of an operation": (
        lambda: op(kind="invert", p=1.0),
        "image operation 'invert': unknown key 'p', known are 'kind'",
    ),
    "filter": (
        lambda: op(kind="resize", height=1, width=1, filter="cubic"),
        "image operation 'resize': filter 'cubic' is unknown, known are 'nearest', 'bilinear',",
    ),
    "padding": (
        lambda: op(kind="pad", border=[0] * 4, fill=[0] * 3, mode="wrap"),
        "image operation 'pad': mode 'wrap' is unknown, known are 'constant', 'edge', 'reflect', 'symmetric'",
    ),
    "operation within": (
        lambda: op(kind="random_apply", p=1.0, ops=[{"kind": "blur"}]),
        "image operation 'blur' is unknown",
    ),
    "erasure within": (
        lambda: loader(TRANSFORM | {"ops": [ERASE, {"kind": "invert"}]}),
        "only the last operation can be 'erase'",
    ),
    "finish": (
        lambda: loader(TRANSFORM | {"finish": {"kind": "half"}}),
        "finish 'half' is unknown, known are 'uint8', 'float', 'normalize', 'table'",
    ),
    "key of a transform": (lambda: loader(TRANSFORM | {"seed": 1}), "transform: unknown key 'seed', known are 'ops',"),
    "decode": (
        lambda: loader(read=READ | {"decode": "fast"}),
        "read options: decode 'fast' is unknown, known are 'exact', 'scaled'",
    ),
    "truncated": (
        lambda: loader(read=READ | {"truncated": "skip"}),
        "read options: truncated 'skip' is unknown, known are 'error', 'accept'",
    ),
    "key of limits": (
        lambda: loader(read=READ | {"limits": {"pixels": None, "bytes": None, "width": 1}}),
        "limits: unknown key 'width', known are 'pixels', 'bytes'",
    ),
    "kind of a graph": (
        lambda: graph("Conv9d", {}),
        "operation 'Conv9d' is unknown, known are 'Input', 'Conv2d',",
    ),
    "key of a graph": (
        lambda: graph("Flatten", {"start": 1, "end": -1, "dim": 1}),
        "one (Flatten): unknown key 'dim', known are 'start', 'end'",
    ),
    "type": (
        lambda: _cnnrs.copy_rows("there", ROWS, [1], "int8", []),
        "type of features 'int8' is unknown, known are 'bfloat16', 'float16', 'float32', 'float64'",
    ),
}  # fmt: skip
ROWS: _records.RowFile = {"path": "here", "journal": None, "total": 1, "resume": False}
ERASE: dict[str, Any] = {"kind": "erase", "p": 1.0, "scale": (0.1, 0.2), "ratio": (1.0, 1.0), "value": [0.0]}


def graph(kind: Any, attributes: dict[str, Any]) -> _cnnrs.Graph:
    """Of one operation."""
    return _cnnrs.Graph([("input", "Input", [], {}), ("one", kind, [0], attributes)], 1, [])


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_names_and_keys_are_errors_that_say_the_known_ones(what: str) -> None:
    work, words = UNKNOWN[what]
    with pytest.raises(ValueError) as caught:
        work()
    assert str(caught.value).startswith(words)


def test_what_is_no_record_and_what_has_the_wrong_type_names_its_place() -> None:
    with pytest.raises(TypeError, match="loss: a dict expected, got tuple"):
        with_task(loss=("mse",))
    with pytest.raises(TypeError, match="image operation 'resize': height: "):
        op(kind="resize", height="1", width=1, filter="box")
    with pytest.raises(ValueError, match="no tensor 9"):
        with_task(sgd=[SGD | {"parameter": 9}])


def test_the_kinds_of_operations_are_those_that_types_know() -> None:
    assert _cnnrs.Graph.kinds == list(get_args(_records.OpKind))


def test_totals_cross_the_border_as_they_are() -> None:
    assert Totals(**train()) == Totals()
    before = Totals(1.5, 3.0, 2, 4, 5, 6, 0.5, 0)
    epoch: Any = EPOCH | {"phase": "validation"}

    class Engine:
        """Never called."""

        def forward(self, inputs: Any, targets: Any, training: bool) -> tuple[float, float, int | None, int, int]:
            raise AssertionError

        def backward(self) -> None: ...

        def update(self) -> None: ...

    assert Totals(**_cnnrs.fit_python(epoch, Engine(), iter([]), before.by_name())) == before


# -- errors ------------------------------------------------------------------------------------------------------------


def jpeg() -> bytes:
    """A small one, of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def png() -> bytes:
    """Whose compressed pixels are not."""
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    data = file.getvalue()
    at = data.index(b"IDAT") + 4
    return data[:at] + b"\xff" * 8 + data[at + 8 :]


KINDS: dict[DecodeKind, bytes] = {
    "unknown": b"",
    "unsupported": struct.pack("<2sIIII", b"BM", 99, 0, 54, 13) + bytes(99),
    "truncated": jpeg()[:-200],
    "damaged": png(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_undecodable_image_has_its_kind(kind: DecodeKind) -> None:
    with pytest.raises(cnnrs.DecodeError) as caught:
        decode_image(KINDS[kind])
    assert caught.value.kind == kind
    for twin in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert (twin.kind, str(twin)) == (kind, str(caught.value))


def test_files_over_a_limit_are_too_large(tmp_path: Path) -> None:
    path = tmp_path / "one.jpg"
    path.write_bytes(jpeg())
    for limits in ({"pixels": 9, "bytes": None}, {"pixels": None, "bytes": 9}):
        given: Any = limits
        ((_, _, _, _, _, error, fault),) = _cnnrs.check_files([path], lambda done: None, 1, given)
        assert isinstance(error, cnnrs.DecodeError)
        assert (error.kind, fault) == ("too_large", "limit")
    assert set(get_args(DecodeKind)) == {*KINDS, "too_large"}
    assert cnnrs.DecodeError("of many files").kind is None


@pytest.mark.parametrize("folder", ["truncated", "the file is truncated", "limit"])
def test_the_name_of_a_folder_says_nothing_about_its_files(tmp_path: Path, folder: str) -> None:
    root = tmp_path / folder
    (root / "cat").mkdir(parents=True)
    (root / "cat" / "damaged.png").write_bytes(png())
    (root / "cat" / "cut.jpg").write_bytes(KINDS["truncated"])
    report = cnnrs.check(root, verbose=False)
    assert [Path(path).name for path, _ in report.corrupt] == ["damaged.png"]
    assert [Path(path).name for path, _ in report.truncated] == ["cut.jpg"]
    with pytest.raises(cnnrs.DecodeError) as caught:
        list(cnnrs.DataLoader(cnnrs.ImageFolder(root), 1, num_workers=0))
    assert caught.value.kind == "truncated"


def test_memory_that_is_not_there_is_a_memory_error() -> None:
    rows = iter([(torch.zeros(1, 4), [(0, 1)], [])])
    with pytest.raises(MemoryError, match=r"no memory for \d+ rows of features .*: use out= to write to disk"):
        _cnnrs.extract_rows(rows, None, 1 << 52)


def test_what_cannot_be_is_a_fault_of_ours() -> None:
    with pytest.raises(RuntimeError, match=r"^batch 7 is not .*: this is a fault of cnnrs, please report it$"):
        loader().poll(7)
