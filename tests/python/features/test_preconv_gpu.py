"""`preconv` on CUDA devices that are none: nothing races, nobody waits without need, and the numbers are the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cnnrs
from cnnrs.engine.recording import WARM_UP
from fake_cuda import FakeCuda
from gpu_batches import TRANSFORM, Large, batches, layers, preconv, rows

DEVICES = ["cuda:0", "cuda:1"]


def waits(cuda: FakeCuda) -> list[str]:
    """For what the host waited, but for rows, which must have landed."""
    return [one for one in cuda.waits if not one.startswith("Event.synchronize")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("engine", ["auto", "python"])
def test_rows_have_landed(fake_cuda: FakeCuda, tmp_path: Path, device: str, stored: bool, engine: Any) -> None:
    expected = rows(layers(), batches())
    found = preconv(batches(), layers().to(device), out=tmp_path / "f" if stored else None, engine=engine)
    assert torch.equal(found.features, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_returns_one_buffer_again_and_again(fake_cuda: FakeCuda, device: str) -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.zeros(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.kept.copy_(x)  # type: ignore[operator, no-any-return]

    rows = torch.arange(40.0).reshape(20, 2)
    data = [(rows[i : i + 4], torch.arange(4)) for i in range(0, 20, 4)]
    assert torch.equal(preconv(data, Buffered().to(device)).features, rows)


# -- nobody waits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_labels_on_the_device_are_fetched_once(fake_cuda: FakeCuda, folder: Path, tmp_path: Path, stored: bool) -> None:
    model = layers().cuda()
    loader = cnnrs.DataLoader(cnnrs.ImageFolder(folder, TRANSFORM), batch_size=2, device="cuda")
    fake_cuda.waits.clear()
    found = preconv(loader, model, out=tmp_path / "f" if stored else None)
    assert found.labels.tolist() == loader.dataset.targets and found.labels.device.type == "cpu"
    fetched = [one for one in waits(fake_cuda) if one.startswith("a copy cuda:0 -> cpu")]
    # Of 13 batches; in a folder, labels are the data set's.
    assert len([one for one in fetched if "session.py" in one or "samples.py" in one]) == (0 if stored else 1)


def test_labels_of_several_devices_and_of_one_buffer(fake_cuda: FakeCuda) -> None:
    buffer = torch.zeros(4, dtype=torch.int64, device="cuda")

    def data() -> Iterator[Any]:
        for number, (images, _) in enumerate(batches(3)):
            buffer.fill_(number)
            yield images, (buffer, buffer.to("cuda:1"), buffer.cpu())[number]

    assert preconv(data(), layers().cuda()).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_several_labels_on_the_device_are_looked_at_on_the_host(fake_cuda: FakeCuda) -> None:
    labels = torch.eye(4).repeat(3, 1).cuda()
    features = cnnrs.Features(torch.zeros(12, 2).cuda(), labels)
    fake_cuda.waits.clear()
    features.split(0.5)
    # Two parts are gathered; one look at what the labels are, one copy of them.
    assert len(fake_cuda.waits) <= 8


def test_no_batch_is_waited_for(fake_cuda: FakeCuda) -> None:
    """Whatever is done once may wait: what is done for every batch may not."""
    counts = []
    for count in (6, 12):
        model = layers().cuda()
        fake_cuda.waits.clear()
        preconv(batches(count), model, dtype="float16")
        counts.append(len(waits(fake_cuda)))
    assert counts[0] == counts[1]


def test_two_batches_are_under_way_while_the_host_takes_a_third(fake_cuda: FakeCuda) -> None:
    taken: list[int] = []

    def data() -> Iterator[Any]:
        for number, batch in enumerate(batches(6)):
            taken.append(number)
            yield batch

    synchronized: list[tuple[int, bool]] = []
    real = torch.cuda.Event.synchronize

    def synchronize(event: Any) -> None:
        synchronized.append((len(taken), event.blocking))
        real(event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.Event, "synchronize", synchronize)
        preconv(data(), layers().cuda(), engine="python")
    # Asleep: the loader's threads need the cores.
    assert synchronized == [(count, True) for count in (3, 4, 5, 6, 6, 6)]


# -- memory ------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A network on a device that has no room for many images."""

    def __init__(self, error: Exception, room: int = 3) -> None:
        super().__init__()
        self.layers = layers()
        self.error = error
        self.room = room
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise self.error
        return self.layers(x)  # type: ignore[no-any-return]


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_parts_of_a_batch_are_joined_on_the_host(fake_cuda: FakeCuda) -> None:
    model = Small(FULL).cuda()
    found = preconv(batches(2, 8), model)
    assert model.sizes == [8, 4, *[2] * 8]
    assert not [what for what, _ in fake_cuda.launches if what == "aten::cat"]
    expected = preconv(batches(2, 8), layers(), engine="python")
    # Another number of images at a time; sums of 2,904 products.
    assert torch.allclose(found.features, expected.features, rtol=0, atol=1e-4)


@pytest.mark.parametrize("error", [
    FULL, RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
], ids=str)  # fmt: skip
def test_every_way_to_say_that_memory_has_run_out_is_known(error: Exception) -> None:
    model = Small(error)
    assert len(preconv(batches(1, 8), model, engine="python")) == 8 and model.sizes == [8, 4, 2, 2, 2, 2]


def test_other_errors_are_the_models() -> None:
    model = Small(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        preconv(batches(1, 8), model, engine="python")
    assert model.sizes == [8]


def test_streams_are_made_once(fake_cuda: FakeCuda) -> None:
    model = layers().cuda()
    preconv(batches(), model)
    made = len(fake_cuda.streams)
    preconv(batches(), model)
    assert len(fake_cuda.streams) == made


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("kind", ["infinite", "NaN"])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_what_overflows_in_fp16_is_not_stored(fake_cuda: FakeCuda, device: str, kind: str, dtype: Any) -> None:
    with pytest.raises(ValueError, match="a feature is infinite or NaN: in float16"):
        preconv(batches(), Large(kind).to(device), precision="fp16", dtype=dtype)
    assert preconv(batches(), Large(kind).to(device), precision="bf16").features.isfinite().all()
    halves = [(images.half(), labels) for images, labels in batches()]
    with pytest.raises(ValueError, match="a feature is infinite or NaN: in float16"):
        preconv(halves, Large(kind).to(device).half(), dtype=dtype)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_what_float16_cannot_hold_is_an_error(fake_cuda: FakeCuda, device: str) -> None:
    with pytest.raises(ValueError, match=r"larger than float16 can hold \(65504\)"):
        preconv(batches(), Large("infinite").to(device), dtype="float16")


@pytest.mark.parametrize("set_newer", [False, True])
@pytest.mark.parametrize("precision", ["exact", "tf32", None])
def test_tf32_whichever_interface_the_user_has_set(fake_cuda: FakeCuda, precision: Any, set_newer: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch 2.9 brought the newer interface")
    seen: list[tuple[bool, bool]] = []

    class Looking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"))
            return x.flatten(1)

    before = matmul.fp32_precision, cudnn.conv.fp32_precision
    try:
        if set_newer:
            matmul.fp32_precision, cudnn.conv.fp32_precision = "tf32", "ieee"
        there = matmul.fp32_precision, cudnn.conv.fp32_precision
        preconv(batches(1), nn.Sequential(Looking(), nn.Linear(1728, 2)).cuda(), precision=precision, engine="python")
        as_set = there[0] == "tf32", there[1] == "tf32"
        assert seen == [{"exact": (False, False), "tf32": (True, True), None: as_set}[precision]]
        assert (matmul.fp32_precision, cudnn.conv.fp32_precision) == there
    finally:
        matmul.fp32_precision, cudnn.conv.fp32_precision = before


def test_kernels_are_not_chosen_by_the_clock(fake_cuda: FakeCuda) -> None:
    """Or a resumed run has other bits; it is the user's to say."""
    seen: list[bool] = []

    class Looking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cudnn.benchmark)
            return x.flatten(1)

    preconv(batches(1), nn.Sequential(Looking(), nn.Linear(1728, 2)).cuda(), engine="python")
    assert seen == [torch.backends.cudnn.benchmark] == [False]


@pytest.mark.parametrize(("precision", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("engine", ["auto", "python"])
def test_low_precision_is_autocast_with_weights_cast_once(
    fake_cuda: FakeCuda, precision: Any, kind: torch.dtype, engine: Any
) -> None:
    model = layers().cuda()
    before = [(p.data_ptr(), p.dtype, p.stride()) for p in model.parameters()]
    with torch.autocast("cpu", kind):
        expected = rows(layers(), batches())
    fake_cuda.launches.clear()
    found = preconv(batches(), model, precision=precision, engine=engine)
    assert found.features.dtype == kind and torch.equal(found.features, expected)
    assert [(p.data_ptr(), p.dtype, p.stride()) for p in model.parameters()] == before
    casts = [what for what, _ in fake_cuda.launches].count("aten::_to_copy")
    # Four weights once, the images of batches that are not replayed, the rows; or images, weights and rows every time.
    assert casts == (4 + (WARM_UP + 1) + 7 if engine == "auto" else 7 * (1 + 4 + 1))


# -- device= -----------------------------------------------------------------------------------------------------------


def test_a_module_is_on_the_device_for_the_time_of_the_call(fake_cuda: FakeCuda) -> None:
    places: list[Any] = []

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            places.append((x.device, self.layers[0].weight.device))
            self.calls += 1
            return self.layers(x)  # type: ignore[no-any-return]

    model = Looking()
    before = [(id(t), t.data_ptr()) for t in (*model.parameters(), *model.buffers())]
    found = preconv(batches(), model, device="cuda:1")
    assert set(places) == {(torch.device("cuda:1"), torch.device("cuda:1"))}
    assert [(id(t), t.data_ptr()) for t in (*model.parameters(), *model.buffers())] == before
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"} and model.calls == 7
    assert torch.equal(found.features, rows(model.layers, batches()))
    # And from there to the CPU.
    on_gpu = layers().cuda()
    on_cpu = preconv(batches(), layers(), engine="python").features
    assert torch.equal(preconv(batches(), on_gpu, device="cpu", engine="python").features, on_cpu)
    assert next(on_gpu.parameters()).is_cuda


def test_a_store_is_the_same_on_any_device(fake_cuda: FakeCuda, folder: Path, tmp_path: Path, capsys: Any) -> None:
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    model = layers()
    for device in ("cuda:1", None, "cuda:0"):
        found = preconv(data, model, out=tmp_path / "f", device=device, verbose=True)
        assert ("nothing to compute" in capsys.readouterr().out) == (device != "cuda:1")
    assert found.body is model and torch.equal(found.features, rows(model, cnnrs.DataLoader(data, batch_size=256)))


@pytest.mark.parametrize("device", [None, "cuda:1"])
def test_an_error_leaves_the_model_as_it_was(fake_cuda: FakeCuda, device: Any) -> None:
    model = Small(RuntimeError("no"), room=0)
    if device is None:
        model = model.cuda()
    before = [(p.data_ptr(), p.device, p.dtype, p.stride()) for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"^no$"):
        preconv(batches(), model, device=device, precision="bf16")
    assert [(p.data_ptr(), p.device, p.dtype, p.stride()) for p in model.parameters()] == before


def test_a_data_set_and_a_name(fake_cuda: FakeCuda, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnrs.data.mover import Mover

    crossed: list[Any] = []
    real = Mover._copy

    def watch(self: Mover, tensor: torch.Tensor, sources: list[torch.Tensor]) -> torch.Tensor:
        crossed.append((tensor.dtype, len(tensor), self.device))
        return real(self, tensor, sources)

    monkeypatch.setattr(Mover, "_copy", watch)
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    torch.manual_seed(0)
    found = preconv(data, "squeezenet1_1", weights=None, device="cuda", any_transform=True)
    place = torch.device("cuda:0")
    # All of the 26 photos at once, as bytes.
    assert crossed == [(torch.uint8, 26, place), (torch.int64, 26, place)]
    torch.manual_seed(0)
    expected = preconv(data, "squeezenet1_1", weights=None, engine="python", any_transform=True)
    # Kernels of another memory order: sums of up to 4,608 products of values around one, each rounded by 6e-8.
    assert torch.allclose(found.features, expected.features, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == data.targets


def test_bytes_of_the_users_loader_cross_too(fake_cuda: FakeCuda, folder: Path, monkeypatch: Any) -> None:
    loader = cnnrs.DataLoader(cnnrs.ImageFolder(folder, TRANSFORM), batch_size=8)
    expected = rows(layers(), loader)
    made = []
    real = cnnrs.data.mover.finish_on
    monkeypatch.setattr("cnnrs.data.mover.finish_on", lambda *a: made.append(a) or real(*a))
    found = preconv(loader, layers().cuda())
    assert len(made) == 1 and loader.device is None
    assert torch.equal(found.features, expected)


@pytest.mark.parametrize("device, words", [
    ("cuda:7", "there is no cuda:7: there are the devices cuda:0 to cuda:1"), ("gpu", "'gpu' is no device"),
])  # fmt: skip
def test_a_device_that_is_not_there(fake_cuda: FakeCuda, device: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        preconv(batches(), layers(), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_device_at_all() -> None:
    with pytest.raises(ValueError, match=r"there is no cuda: torch .* finds no usable CUDA device; see cnnrs info"):
        preconv(batches(), layers(), device="cuda")
