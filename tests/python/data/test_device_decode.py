"""`decode="gpu"` on CUDA devices that are none: which files go there, and that nothing but pixels differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

import cnnrs
from cnnrs._util.notes import forget_notes
from cnnrs.data import device_decode
from fake_cuda import FakeCuda
from fake_nvjpeg import FakeNvjpeg, fake_nvjpeg

BYTES = transforms.Compose([transforms.Resize(40), transforms.CenterCrop((36, 32)), transforms.PILToTensor()])
NUMBERS = transforms.Compose([transforms.Resize((24, 20)), transforms.ToTensor(), transforms.Normalize(0.5, 0.25)])
# Pillow rounds to bytes between the two directions and torchvision behind both: at most one level each.
LEVELS = 2
pytestmark = pytest.mark.filterwarnings("ignore:.*EXIF", "ignore:cnnrs.DataLoader (skips|cannot)")


@pytest.fixture
def jpegs(fake_cuda: FakeCuda) -> Iterator[FakeNvjpeg]:
    """The decoder."""
    with fake_nvjpeg() as fake:
        yield fake


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Eight JPEGs, one for each orientation, and four files that the device does not decode."""
    root = tmp_path / "mixed" / "class"
    root.mkdir(parents=True)
    exif = Image.Exif()
    for i in range(8):
        exif[0x0112] = i + 1
        picture(70 + 9 * i, 140 - 8 * i, i).save(root / f"{i}.jpg", quality=92, exif=exif, progressive=i == 3)
    picture(80, 90, 10).save(root / "a.png")
    picture(80, 90, 11).convert("L").save(root / "b.jpg")
    picture(80, 90, 12).convert("CMYK").save(root / "c.jpg")
    # Stored as RGB, which NVIDIA's decoder would take for YCbCr.
    picture(80, 90, 13).save(root / "d.jpg", keep_rgb=True)
    return root.parent


def batches(data: Any, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """On the CPU, where they are compared."""
    return [(x.cpu(), y.cpu()) for x, y in cnnrs.DataLoader(data, **({"batch_size": 5, "num_workers": 2} | options))]


def on_gpu(data: Any, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return batches(data, **({"decode": "gpu", "device": "cuda"} | options))


@pytest.mark.parametrize("exif", [False, True])
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_pixels(jpegs: FakeNvjpeg, mixed: Path, exif: bool, threads: int, device: str) -> None:
    data = cnnrs.ImageFolder(mixed, BYTES)
    expected = batches(data, exif=exif)
    for _ in range(2):
        found = on_gpu(data, exif=exif, num_workers=threads, device=device)
        for (x, y), (other, labels) in zip(found, expected, strict=True):
            assert x.dtype == torch.uint8 and x.shape == other.shape and torch.equal(y, labels)
            assert int((x.int() - other.int()).abs().max()) <= LEVELS
        # Those that the device does not decode are what they are anyway.
        assert torch.equal(torch.cat([x for x, _ in found])[8:], torch.cat([x for x, _ in expected])[8:])
    assert sorted(size for call in jpegs.calls for size in call) == sorted(
        [(70 + 9 * i, 140 - 8 * i) for i in range(8)] * 2
    )


@pytest.mark.parametrize(
    "steps",
    [
        [transforms.Resize((30, 26), InterpolationMode.BICUBIC)],
        [v2.Resize((30, 26), InterpolationMode.NEAREST)],
        [transforms.Resize(30, max_size=50), transforms.CenterCrop(60)],
        [transforms.Resize((30, 26)), transforms.Pad((1, 2), 7), transforms.Grayscale()],
        [transforms.CenterCrop(40), transforms.Grayscale(3)],
    ],
)
def test_transforms(jpegs: FakeNvjpeg, mixed: Path, steps: list[Any]) -> None:
    data = cnnrs.ImageFolder(mixed, transforms.Compose([*steps, transforms.PILToTensor()]))
    for (x, _), (other, _) in zip(on_gpu(data), batches(data), strict=True):
        difference = (x.int() - other.int()).abs()
        # Bicubic goes beyond black and white, where one of the two directions is cut off; gray is a sum of three. The
        # nearest pixel may be either neighbour where the middle falls between two, in a few rows or columns.
        assert int(difference.max()) <= 2 * LEVELS or float((difference > 0).float().mean()) < 0.05


@pytest.mark.parametrize("mode", ["edge", "reflect", "symmetric"])
def test_pads_that_mirror(jpegs: FakeNvjpeg, mixed: Path, mode: str) -> None:
    # Of some photos wider than they are.
    pad = transforms.Pad((3, 100, 110, 5), padding_mode=mode)
    data = cnnrs.ImageFolder(mixed, transforms.Compose([transforms.CenterCrop(90), pad, transforms.PILToTensor()]))
    for (x, _), (other, _) in zip(on_gpu(data), batches(data), strict=True):
        assert torch.equal(x, other)


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_is_pillows(jpegs: FakeNvjpeg, mixed: Path, channels: int) -> None:
    steps = [transforms.CenterCrop(40), transforms.Grayscale(channels), transforms.Grayscale(channels)]
    data = cnnrs.ImageFolder(mixed, transforms.Compose([*steps, transforms.PILToTensor()]))
    for (x, _), (other, _) in zip(on_gpu(data), batches(data), strict=True):
        assert torch.equal(x, other)


def test_a_part_of_a_photo_does_not_keep_all_of_it(
    jpegs: FakeNvjpeg, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, stack = set(), torch.stack

    def stacked(rows: list[torch.Tensor]) -> torch.Tensor:
        sizes.update(row.untyped_storage().nbytes() for row in rows[:8])
        return stack(rows)

    monkeypatch.setattr(device_decode.torch, "stack", stacked)
    steps = transforms.Compose([transforms.CenterCrop(20), transforms.PILToTensor()])
    on_gpu(cnnrs.ImageFolder(mixed, steps), batch_size=12)
    assert sizes == {3 * 20 * 20}


def test_numbers_are_made_of_the_bytes(jpegs: FakeNvjpeg, mixed: Path) -> None:
    data = cnnrs.ImageFolder(mixed, NUMBERS)
    for (x, _), (other, _) in zip(on_gpu(data), batches(data), strict=True):
        assert x.dtype == torch.float32 and float((x - other).abs().max()) <= LEVELS / 255 / 0.25 + 1e-6


def test_large_photos_are_decoded_a_few_at_a_time(
    jpegs: FakeNvjpeg, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cnnrs.ImageFolder(mixed, BYTES)
    expected = on_gpu(data, batch_size=12)
    assert [len(call) for call in jpegs.calls] == [8]
    monkeypatch.setattr(device_decode, "_PIXELS", 25_000)
    jpegs.calls.clear()
    assert torch.equal(on_gpu(data, batch_size=12)[0][0], expected[0][0])
    assert [len(call) for call in jpegs.calls] == [2, 2, 2, 2]


# -- files that fail ---------------------------------------------------------------------------------------------------


def spoiled(mixed: Path) -> list[str]:
    """Three of the files: cut short, no image, gone; the same name comes first in none of the batches."""
    bad = [mixed / "class" / name for name in ("1.jpg", "2.jpg", "6.jpg")]
    bad[0].write_bytes(bad[0].read_bytes()[:-800])
    bad[1].write_bytes(b"no image")
    bad[2].unlink()
    return [str(path) for path in bad]


def test_bad_files_are_named(jpegs: FakeNvjpeg, mixed: Path) -> None:
    data = cnnrs.ImageFolder(mixed, BYTES)
    bad = spoiled(mixed)
    loader = iter(cnnrs.DataLoader(data, 1, decode="gpu", device="cuda"))
    failed = []
    for path, _ in data.samples:
        try:
            next(loader)
        except OSError as error:
            assert path in str(error)
            failed.append(path)
    assert failed == bad


@pytest.mark.parametrize("size", [1, 5, 12])
def test_bad_files_are_skipped(jpegs: FakeNvjpeg, mixed: Path, size: int) -> None:
    data = cnnrs.ImageFolder(mixed, BYTES)
    data.samples = [(path, i) for i, (path, _) in enumerate(data.samples)]
    bad = spoiled(mixed)
    loader = cnnrs.DataLoader(data, size, decode="gpu", device="cuda", on_error="skip")
    found = [(x.cpu(), y.cpu()) for x, y in loader]
    assert sorted(path for path, _ in loader.errors) == bad
    expected = batches(data, batch_size=size, on_error="skip")
    for (x, y), (other, labels) in zip(found, expected, strict=True):
        assert torch.equal(y, labels) and int((x.int() - other.int()).abs().max()) <= LEVELS


def test_what_ends_too_early_is_read_as_far_as_it_goes_if_that_is_wanted(jpegs: FakeNvjpeg, mixed: Path) -> None:
    data = cnnrs.ImageFolder(mixed, BYTES)
    path = mixed / "class" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-800])
    found, expected = on_gpu(data, truncated="accept"), batches(data, truncated="accept")
    assert torch.equal(found[0][0][1], expected[0][0][1])


def test_what_the_device_refuses_is_decoded_on_the_cpu(jpegs: FakeNvjpeg, mixed: Path) -> None:
    data = cnnrs.ImageFolder(mixed, BYTES)
    jpegs.refuses = {(mixed / "class" / name).read_bytes() for name in ("0.jpg", "4.jpg")}
    forget_notes()
    with pytest.warns(UserWarning, match=r"refuses are decoded on the CPU, the first one .*0\.jpg: .*refused"):
        found = on_gpu(data, batch_size=12)
    expected = batches(data, batch_size=12)
    for i in (0, 4, 8):
        assert torch.equal(found[0][0][i], expected[0][0][i])
    assert int((found[0][0].int() - expected[0][0].int()).abs().max()) <= LEVELS


def test_what_the_device_cannot_resize_is_resized_on_the_cpu(
    jpegs: FakeNvjpeg, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize = v2.functional.resize

    def resized(image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if image.shape[1:] == (70, 140):
            raise RuntimeError("Too much shared memory required: 64256 vs 49152")
        return resize(image, *args, **kwargs)

    monkeypatch.setattr(v2.functional, "resize", resized)
    data = cnnrs.ImageFolder(mixed, BYTES)
    forget_notes()
    with pytest.warns(UserWarning, match=r"first one .*0\.jpg: Too much shared memory"):
        found = on_gpu(data)
    expected = batches(data)
    assert torch.equal(found[0][0][0], expected[0][0][0]) and not torch.equal(found[0][0], expected[0][0])


def test_limits(jpegs: FakeNvjpeg, mixed: Path) -> None:
    with pytest.raises(cnnrs.DecodeError, match="pixels"):
        on_gpu(cnnrs.ImageFolder(mixed, BYTES), max_pixels=5_000)
    with pytest.raises(cnnrs.DecodeError, match="bytes"):
        on_gpu(cnnrs.ImageFolder(mixed, BYTES), max_bytes=500)
    assert jpegs.calls == []


def test_no_memory_on_the_device_is_no_bad_file(
    jpegs: FakeNvjpeg, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = iter(cnnrs.DataLoader(cnnrs.ImageFolder(mixed, BYTES), 5, decode="gpu", device="cuda", on_error="skip"))
    jpegs.fails = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        next(loader)
    jpegs.fails = None
    # The next batch is the next one.
    assert len(next(loader)[0]) == 5


def test_no_memory_is_no_missing_decoder(jpegs: FakeNvjpeg, mixed: Path) -> None:
    jpegs.fails = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        on_gpu(cnnrs.ImageFolder(mixed, BYTES))


# -- what it needs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [None, "cpu"])
def test_without_a_device(mixed: Path, device: str | None) -> None:
    with pytest.raises(ValueError, match='decode="gpu" needs device="cuda"'):
        cnnrs.DataLoader(cnnrs.ImageFolder(mixed, BYTES), decode="gpu", device=device)
    loader = cnnrs.DataLoader(cnnrs.ImageFolder(mixed, BYTES))
    loader.decode = "gpu"
    with pytest.raises(ValueError, match='decode="gpu" needs device="cuda"'):
        next(iter(loader))


@pytest.mark.parametrize(
    "steps, named",
    [
        ([transforms.RandomResizedCrop(20), transforms.ToTensor()], "random_resized_crop"),
        ([transforms.Resize(20), transforms.ToTensor(), transforms.RandomErasing()], "erase"),
        ([transforms.Resize(20, InterpolationMode.LANCZOS), transforms.ToTensor()], "lanczos"),
        ([transforms.Resize(20), transforms.ToTensor(), transforms.GaussianBlur(3)], "GaussianBlur"),
        ([transforms.Resize(20)], "no ToTensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:cnnrs.DataLoader.* in Python")
def test_transforms_that_it_does_not_take_are_named(jpegs: FakeNvjpeg, mixed: Path, steps: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f'{named}.*leave decode="exact"'):
        on_gpu(cnnrs.ImageFolder(mixed, transforms.Compose(steps)))


@pytest.mark.parametrize("options", [{"cache": "ram"}, {"collate_fn": list}, {"batch_size": None}])
def test_options_that_it_does_not_take(jpegs: FakeNvjpeg, mixed: Path, options: Any) -> None:
    with pytest.raises(ValueError, match=f"leave out.*{next(iter(options))}="):
        on_gpu(cnnrs.ImageFolder(mixed, BYTES), **options)


def test_data_that_is_called(jpegs: FakeNvjpeg) -> None:
    with pytest.raises(ValueError, match='decode="gpu" is for data sets whose files'):
        on_gpu([(torch.zeros(3), 0)] * 3)


def test_without_nvjpeg(jpegs: FakeNvjpeg, mixed: Path) -> None:
    jpegs.fails = RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")
    with pytest.raises(RuntimeError, match=r"needs a torchvision that decodes JPEGs on CUDA.*not compiled with nvJPEG"):
        on_gpu(cnnrs.ImageFolder(mixed, BYTES))


# -- the loader is one as ever -----------------------------------------------------------------------------------------


def test_going_on_in_the_middle_of_an_epoch(jpegs: FakeNvjpeg, mixed: Path) -> None:
    data = cnnrs.ImageFolder(mixed, NUMBERS)

    def loader() -> cnnrs.DataLoader[Any]:
        return cnnrs.DataLoader(data, 3, shuffle=True, num_workers=2, decode="gpu", device="cuda")

    torch.manual_seed(3)
    first = loader()
    batches = iter(first)
    next(batches)
    state = first.state_dict()
    rest = [x.cpu() for x, _ in batches]
    again = loader()
    again.load_state_dict(state)
    assert len(rest) == 3 and all(torch.equal(x, y.cpu()) for x, (y, _) in zip(rest, again, strict=True))


def test_ctrl_c_loses_the_batch_that_was_to_come(
    jpegs: FakeNvjpeg, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cnnrs.ImageFolder(mixed, BYTES)
    data.samples = [(path, i) for i, (path, _) in enumerate(data.samples[:6])]
    # The next batch is begun beside each, whenever it is read.
    monkeypatch.setattr(device_decode.DeviceLoader, "ready", lambda *_: True)
    loader = iter(cnnrs.DataLoader(data, 1, num_workers=1, decode="gpu", device="cuda"))
    next(loader)
    decoded, sizes = device_decode._decoded, []

    def interrupted(photos: Any, device: Any) -> Any:
        sizes.append(len(photos))
        if len(sizes) == 1:
            raise KeyboardInterrupt
        return decoded(photos, device)

    monkeypatch.setattr(device_decode, "_decoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    assert [int(y) for _, y in loader] == [1, 3, 4, 5]


def test_features_are_stored_as_others(jpegs: FakeNvjpeg, mixed: Path, tmp_path: Path, capsys: Any) -> None:
    data = cnnrs.ImageFolder(mixed, NUMBERS)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 12))
    nn.init.eye_(model[2].weight)

    def preconv(**options: Any) -> cnnrs.Features:
        return cnnrs.preconv(cnnrs.DataLoader(data, 5, device="cuda", **options), model, tmp_path / "f", device="cuda")

    exact = preconv()
    found = preconv(decode="gpu")
    assert "recomputing the features, because the transform changed" in capsys.readouterr().out
    assert len(jpegs.calls) > 0 and found.paths == exact.paths
    assert not torch.equal(found.features, exact.features)
    assert float((found.features - exact.features).abs().max()) <= LEVELS / 255 / 0.25
    jpegs.calls.clear()
    assert torch.equal(preconv(decode="gpu").features, found.features) and jpegs.calls == []
    assert "up to date" in capsys.readouterr().out
    # A new photo is decoded as those were.
    new = tmp_path / "new.jpg"
    picture(77, 91, 2).save(new)
    found.nearest(new, 1)
    assert jpegs.calls == [[(77, 91)]]


@pytest.mark.gpu
@pytest.mark.parametrize("exif", [False, True])
def test_nvidias_decoder(mixed: Path, exif: bool) -> None:
    data = cnnrs.ImageFolder(mixed, BYTES)
    spoiled(mixed)
    found, expected = (one(data, exif=exif, on_error="skip") for one in (on_gpu, batches))
    for (x, y), (other, labels) in zip(found, expected, strict=True):
        assert torch.equal(y, labels)
        # Colours are stored at half the resolution and spread otherwise than by libjpeg; a turn would be 30 and more.
        assert all(float((a.float() - b.float()).abs().mean()) <= 6 for a, b in zip(x, other, strict=True))
