"""Every kind of file: the pixels are Pillow's, or the file is refused, so that a loader asks Pillow."""

from __future__ import annotations

import itertools
import os
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_parity import by_pillow, by_us, outcome
from torchvision import datasets
from torchvision.transforms import v2

import cnnrs
import image_files
import image_matrix
import image_matrix_tiff
from cnnrs import DataLoader, ImageFolder
from image_doors import decode_image
from image_files import chunk, encoded

# How many files of each format are read without Pillow, at least: the others must not hide what is common.
LEAST = {"tiff": 350, "png": 1500, "gif": 600, "bmp": 450, "pnm": 500, "webp": 480, "jpeg": 270}


@pytest.mark.parametrize("format", image_matrix.CASES)
def test_every_kind_of_file_is_read_as_pillow_reads_it_or_not_at_all(format: str) -> None:
    seen: Counter[str] = Counter()
    for name, data in image_matrix.CASES[format](np.random.default_rng(0)):
        ours = outcome(by_us, data)
        if ours is None:
            seen["refused"] += 1
            continue
        theirs = outcome(by_pillow, data)
        assert theirs is not None, f"{name}: Pillow refuses it"
        assert ours.shape == theirs.shape and np.array_equal(ours, theirs), name
        seen["equal"] += 1
    assert seen["equal"] >= LEAST[format], seen


def tagged(**tags: Any) -> bytes:
    plain = {name: values[0] for name, values in image_matrix_tiff.TIFF_TAGS.items()}
    return image_matrix_tiff.tiff_of(plain | tags, np.random.default_rng(0))


def left_to_pillow() -> dict[str, bytes]:
    """Files that cnnrs once showed otherwise than Pillow, or did not know."""
    rgb = image_files.picture(37, 21, np.random.default_rng(1))
    return {
        "bits from the other end": tagged(kind=(1, 1, 1, 1, ()), fill_order=2),
        "a palette and more": tagged(kind=(3, 1, 8, 2, (0,))),
        "white is zero in 16 bits": tagged(kind=(0, 1, 16, 1, ())),
        "white is zero in floats": tagged(kind=(0, 3, 32, 1, ())),
        "a fourth sample, predicted": tagged(kind=(2, 1, 8, 4, (0,)), compression=5, predictor=2),
        "a fourth sample in tiles": tagged(kind=(2, 1, 8, 4, (0,)), pieces=(16, 16)),
        "planes": tagged(kind=(2, 1, 8, 3, ()), planar=2),
        "JPEG inside": encoded(rgb, "TIFF", compression="jpeg"),
        "12 bits": tagged(kind=(1, 1, 12, 1, ())),
    }


def test_a_loader_asks_pillow_for_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    for name, data in left_to_pillow().items():
        with pytest.raises(OSError, match="not supported"):
            decode_image(data)
        (tmp_path / "class" / f"{name}.tif").write_bytes(data)
    transform = v2.Compose([v2.Resize((21, 37)), v2.ToImage()])
    expected = torch.stack([image for image, _ in datasets.ImageFolder(tmp_path, transform)])
    ((images, _),) = DataLoader(ImageFolder(tmp_path, transform), 20)
    assert torch.equal(images, expected)
    assert not cnnrs.check(tmp_path).corrupt


# -- limits and memory -------------------------------------------------------------------------------------------------


def test_pillows_limit_counts_as_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "class").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "class" / "1.png")
    dataset = ImageFolder(tmp_path, v2.ToImage())
    # An error above twice the limit, 599 pixels here, as Pillow's.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(OSError, match="over the limit of 1198 pixels"):
        list(DataLoader(dataset))
    assert [path for path, _ in cnnrs.check(tmp_path).corrupt] == [str(tmp_path / "class" / "1.png")]
    for most in (600, None, 10**30):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        assert len(list(DataLoader(dataset))) == 1


SIDE = 13_000


def claims() -> dict[str, bytes]:
    """A few bytes each that announce 169 million pixels, within the limit, and do not have them."""
    idat = chunk(b"IDAT", zlib.compress(bytes(30))) + chunk(b"IEND", b"")
    files = {}
    for bits, color, adam7 in ((8, 2, 0), (8, 2, 1), (16, 6, 0), (1, 0, 1)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, bits, color, 0, 0, adam7))
        files[f"png {bits} {color} {adam7}"] = b"\x89PNG\r\n\x1a\n" + header + idat
    for progressive in (False, True):
        jpeg = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG", progressive=progressive))
        struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5, SIDE, SIDE)
        files[f"jpeg, progressive {progressive}"] = bytes(jpeg)
    gif = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    frame = gif.index(b",", 13 + 3 * (2 << (gif[10] & 7)))
    struct.pack_into("<HH", gif, frame + 5, SIDE, SIDE)
    files["gif"] = bytes(gif)
    rgb = image_files.picture(16, 16, np.random.default_rng(0))
    lossy, lossless = (bytearray(encoded(rgb, "WEBP", lossless=lossless)) for lossless in (False, True))
    struct.pack_into("<HH", lossy, 26, SIDE, SIDE)
    lossless[21:25] = (SIDE - 1 | (SIDE - 1) << 14).to_bytes(4, "little")
    files |= {"webp": bytes(lossy), "webp lossless": bytes(lossless)}
    for compression, bits, samples in itertools.product((1, 5, 8, 32773), (1, 8), (1, 3)):
        fields = {256: SIDE, 257: SIDE, 258: (bits,) * samples, 259: compression, 262: samples // 2 + 1, 277: samples}
        data = image_matrix_tiff.COMPRESSED[compression](bytes(90))
        files[f"tiff {compression} {bits} {samples}"] = image_matrix_tiff.tiff(
            fields | {278: SIDE}, [data], tiled=False
        )
    for bits in (1, 8, 16, 24, 32):
        head = bytes(8) if bits <= 8 else b""
        files[f"bmp {bits}"] = image_files.bmp((SIDE, SIDE), bits, 0, bytes(16), head=head, colors=len(head) // 4)
    files["bmp run lengths"] = image_files.bmp((SIDE, SIDE), 8, 1, b"\xff\0" * 8, head=bytes(1024), colors=256)
    for kind in b"123456":
        files[f"pnm P{kind - 48}"] = b"P%c %d %d %s" % (kind, SIDE, SIDE, b"" if kind in b"14" else b"255 ") + b"1 1 0 "
    return files


PEAK = """
import sys
from image_doors import decode_image
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
for line in sys.stdin:
    data = bytes.fromhex(line)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    try:
        decode_image(data)
    except OSError as error:
        print(peak() - before, error)
    else:
        print("decoded")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of memory is read from Linux")
def test_memory_is_taken_as_data_arrives() -> None:
    files = claims()
    assert all(len(data) < 2200 for data in files.values())
    lines = "\n".join(data.hex() for data in files.values())
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        cwd=Path(image_files.__file__).parent,  # where a script of `-c` imports from
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for name, answer in zip(files, done.stdout.splitlines(), strict=True):
        kilobytes = re.match(r"(\d+) .*(truncated|broken|cannot be decoded)", answer)
        # 500 megabytes are announced.
        assert kilobytes and int(kilobytes[1]) < 4096, (name, answer)


SHORT = """
import resource, sys
from torchvision.transforms import v2
from cnnrs import DataLoader, ImageFolder
def load(step):
    dataset = ImageFolder(sys.argv[1], v2.Compose([step, v2.ToImage()]))
    return list(DataLoader(dataset, 2, num_workers=0))
load(v2.CenterCrop(8))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
for step in sys.argv[2:]:
    try:
        load(eval(step))
    except MemoryError:
        print(step)
assert load(v2.CenterCrop(8))
"""
STEPS = [
    "v2.Resize(10**6)",
    "v2.Resize((10**6, 10))",
    "v2.Resize((10, 10**9))",
    "v2.Pad(10**5)",
    "v2.CenterCrop(10**5)",
    "v2.RandomCrop(10**5, pad_if_needed=True)",
    "v2.RandomResizedCrop(10**5)",
]


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
def test_short_memory_is_a_memory_error(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    for i in range(2):
        image_files.picture(500, 375, np.random.default_rng(i)).save(tmp_path / "class" / f"{i}.jpg")
    command = [sys.executable, "-c", SHORT, str(tmp_path), *STEPS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == STEPS, done.stderr
