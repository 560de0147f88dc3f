"""The path of accelerators, the same code on a CPU: one batch in flight, halving, precision, writing meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import transforms

import cnnrs
from cnnrs._util import kept_memory
from cnnrs.features.extract import Pipeline

TRANSFORM = transforms.Compose([transforms.Resize((24, 24)), transforms.ToTensor()])
# Another number of images at a time may take another kernel: sums of 27 products of values below 1, 2**-24 each.
ROUNDING = 27 * 2**-24


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten())


class Small(nn.Module):
    """A network on a device that has no room for many images."""

    def __init__(self, room: int, inplace: bool = False) -> None:
        super().__init__()
        self.layers = layers()
        self.room = room
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.layers(x)


@pytest.mark.skipif(kept_memory._malloc() is None, reason="another C library, or its malloc is set up by the user")
def test_what_a_batch_frees_stays_while_the_call_lasts() -> None:
    users = []

    class Looking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            users.append(len(kept_memory._users))
            return x.flatten(1)

    before = len(kept_memory._users)
    cnnrs.preconv([(torch.rand(2, 3, 4, 4), torch.arange(2))] * 2, Looking(), engine="python", verbose=False)
    assert users == [before + 1] * 2 and len(kept_memory._users) == before


@pytest.mark.parametrize("out", [None, "f"])
def test_batches_are_halved_when_memory_runs_out(folder: Path, tmp_path: Path, capsys: Any, out: str | None) -> None:
    model = Small(3)
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    place = None if out is None else tmp_path / out
    found = cnnrs.preconv(data, model, out=place, batch_size=16, engine="python")
    assert model.sizes == [16, 8, 4, 2, *[2] * 7, *[2] * 5]
    text = capsys.readouterr().out
    for size in (16, 8, 4):
        assert f"preconv: cpu has no memory for {size} images at a time, going on with {size // 2}" in text
    expected = cnnrs.preconv(data, layers(), batch_size=2)
    assert torch.allclose(found.features, expected.features, rtol=0, atol=ROUNDING)
    assert torch.equal(found.labels, expected.labels) and found.paths == expected.paths


def test_one_image_that_does_not_fit_is_an_error(folder: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), Small(0), batch_size=4, engine="python", verbose=False)


def test_what_happened_to_the_images_before_does_not_matter(folder: Path) -> None:
    """Batches of 26, of which the last part is smaller than half."""
    model = Small(7)
    found = cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), model, batch_size=26, engine="python", verbose=False)
    assert model.sizes == [26, 13, 6, 6, 6, 6, 2]
    expected = cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), layers(), batch_size=6)
    assert torch.allclose(found.features, expected.features, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("precision", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("engine", ["auto", "python"])
def test_precision_is_autocast(folder: Path, precision: Any, kind: torch.dtype, engine: Any) -> None:
    model = layers()
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    found = cnnrs.preconv(data, model, batch_size=13, precision=precision, engine=engine)
    with torch.no_grad(), torch.autocast("cpu", kind):
        expected = torch.cat([model(images) for images, _ in cnnrs.DataLoader(data, batch_size=13)])
    assert found.features.dtype == kind and torch.equal(found.features, expected)
    kept = cnnrs.preconv(data, model, batch_size=13, precision=precision, engine=engine, dtype="float32")
    assert torch.equal(kept.features, expected.float())


def test_precision_that_makes_no_sense(folder: Path) -> None:
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    with pytest.raises(
        ValueError, match="precision must be one of 'exact', 'tf32', 'bf16', 'fp16', 'int8', got 'int4'"
    ):
        cnnrs.preconv(data, layers(), precision="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize(("engine", "precision"), [("torch", "bf16"), ("torch", "fp16"), ("cpu", "fp16")])
def test_autocast_is_of_the_module_itself(folder: Path, engine: Any, precision: Any) -> None:
    with pytest.raises(ValueError, match=f"precision='{precision}' is autocast of the module itself"):
        cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), layers(), precision=precision, engine=engine)


def test_the_store_knows_the_precision(folder: Path, tmp_path: Path, capsys: Any) -> None:
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    for precision, message in ((None, ""), ("bf16", "because another precision is asked for"), ("bf16", "up to date")):
        cnnrs.preconv(data, layers(), out=tmp_path / "f", precision=precision)  # type: ignore[arg-type]
        assert message in capsys.readouterr().out


def test_the_next_batch_is_launched_before_the_last_one_is_handed_over() -> None:
    events: list[str] = []

    class Watched(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            events.append(f"launch {int(x[0, 0])}")
            return x

    items = ((torch.full((2, 1), float(i)), [(2 * i, 2)], str(i)) for i in range(4))
    for features, runs, tag in Pipeline(Watched(), torch.device("cpu")).run(items):
        assert runs == [(2 * int(tag), 2)] and features[0, 0] == int(tag)
        events.append(f"over {tag}")
    assert events == [
        "launch 0", "launch 1", "over 0", "launch 2", "over 1", "launch 3", "over 2", "over 3",
    ]  # fmt: skip


@pytest.mark.parametrize("stored", [False, True])
def test_a_model_that_returns_one_buffer_again_and_again(tmp_path: Path, stored: bool) -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.zeros(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.kept.copy_(x)

    rows = torch.arange(24.0).reshape(12, 2)
    batches = [(rows[i : i + 4], torch.arange(4)) for i in range(0, 12, 4)]
    out = tmp_path / "f" if stored else None
    assert torch.equal(cnnrs.preconv(batches, Buffered(), out=out, verbose=False).features, rows)


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS.append(SIZE_OF[0]())
        time.sleep(0.1)
        return x.mean(dim=(2, 3))


CALLS: list[int] = []
SIZE_OF: list[Any] = []


def test_rows_are_written_while_the_next_batch_is_computed(folder: Path, tmp_path: Path) -> None:
    journal = tmp_path / "f" / "features.journal"
    CALLS.clear()
    SIZE_OF[:] = [lambda: journal.stat().st_size if journal.exists() else 0]
    cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), Slow(), out=tmp_path / "f", batch_size=4, engine="python")
    # The first rows are handed over when the second batch has been launched; a tenth of a second later they are safe.
    assert len(CALLS) == 7 and CALLS[0] == CALLS[1] and CALLS[1] < CALLS[4] < CALLS[6]


@pytest.mark.parametrize("engine", ["torch", "python"])
def test_weights_and_settings_are_as_before(folder: Path, engine: Any) -> None:
    model = layers()
    pointers = [(p.data_ptr(), p.stride()) for p in model.parameters()]
    settings = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), model, engine=engine, precision="tf32")
    assert [(p.data_ptr(), p.stride()) for p in model.parameters()] == pointers
    assert settings == (
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    )  # fmt: skip


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, "exact", "tf32", "bf16", "fp16"])
def test_cuda_computes_what_the_module_computes(folder: Path, tmp_path: Path, precision: Any) -> None:
    model = layers().cuda()
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    strides = [p.stride() for p in model.parameters()]
    found = cnnrs.preconv(data, model, out=tmp_path / "f", batch_size=8, precision=precision)
    expected = cnnrs.preconv(data, layers(), batch_size=8)
    # Bits of the mantissa: 23, 23 or 10, 10, 7, 10; sums of 27 products of values below 1.
    bits = {None: 10, "exact": 21, "tf32": 10, "bf16": 7, "fp16": 10}[precision]
    assert torch.allclose(found.features.float(), expected.features, rtol=0, atol=27 * 2.0 ** -(bits + 1))
    assert [p.stride() for p in model.parameters()] == strides


@pytest.mark.gpu
def test_cuda_halves_for_real(folder: Path, capsys: Any) -> None:
    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            free, _ = torch.cuda.mem_get_info()
            # Four images want more than there is.
            torch.empty(len(x) * (free // 4 + 2**28), dtype=torch.uint8, device=x.device)
            return self.layers(x)

    found = cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), Greedy().cuda(), batch_size=4)
    assert len(found) == 26 and "has no memory for 4 images at a time" in capsys.readouterr().out
