"""What becomes of a store in every kind of trouble: breaks, damage, full disks, bad files, two at a time."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import threading
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cnnrs
from cnnrs.features.npy import Layout
from cnnrs.features.store import Store
from stores import ROUNDING, TRANSFORM, Counting, computed, fresh, run, said

# -- trouble -----------------------------------------------------------------------------------------------------------


class Interrupted(Counting):
    """Stops after some images, once."""

    def __init__(self, after: int) -> None:
        super().__init__()
        os.environ["CNNRS_TEST_STOP"] = str(after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if sum(sys.modules["stores"].SEEN) >= int(os.environ.get("CNNRS_TEST_STOP", "1000000")):
            raise KeyboardInterrupt
        return super().forward(x)


def interrupted(images: Path, out: Path, after: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(images, out, Interrupted(after), **options)
    del os.environ["CNNRS_TEST_STOP"]


def resumed(images: Path, out: Path, **options: Any) -> cnnrs.Features:
    model = Interrupted(1_000_000)
    return run(images, out, model, **options)


def test_ctrl_c_keeps_what_is_there(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resumed(images, tmp_path / "whole")
    computed()
    out = tmp_path / "f"
    interrupted(images, out, after=16)
    before = computed()
    assert not (out / "meta.json").exists()
    with pytest.raises(FileNotFoundError, match="no complete features"):
        cnnrs.load_features(out)
    resumed(images, out)
    # One batch was in flight when the exception came.
    assert before == 16 and computed() in (10, 14)
    assert "rows, 1" in said(capsys)
    for name in ("features.npy", "labels.npy", "meta.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_images_that_change_during_a_break(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    interrupted(images, out, after=16)
    safe = 12
    computed()
    victim = sorted(images.rglob("*.png"))[0]
    Image.new("RGB", (40, 40), (200, 2, 3)).save(victim)
    (images / "aaa").mkdir()
    Image.new("RGB", (30, 30), (9, 99, 199)).save(images / "aaa" / "blue.png")
    found = resumed(images, out)
    assert computed() <= 27 - safe + 1
    assert torch.allclose(found.features, fresh(images, model=Interrupted(10**6)).features, rtol=0, atol=ROUNDING)


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 0x10]))


def test_a_damaged_store(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    # Blocks of 5 rows, so that one of them is not everything.
    monkeypatch.setattr(
        Layout, "blocks", lambda self: [(at, min(5, self.shape[0] - at)) for at in range(0, self.shape[0], 5)]
    )
    out = tmp_path / "f"
    first = run(images, out)
    right = first.features.clone()
    computed()
    flip(out / "features.npy", 256 + 7 * 6 * 11 * 11 * 4)
    with pytest.raises(ValueError, match=r"features\.npy is damaged: 5 of 26 rows .* in rows 5 to 9; preconv computes"):
        cnnrs.load_features(out)
    found = run(images, out)
    assert computed() == 5 and said(capsys) == f"{out}: computing 5 rows, 21 are there"
    assert torch.allclose(found.features, right, rtol=0, atol=ROUNDING)
    os.truncate(out / "features.npy", 5000)
    with pytest.raises(ValueError, match="damaged: 26 of 26"):
        cnnrs.load_features(out)
    assert torch.equal(run(images, out).features, right) and computed() == 26
    flip(out / "labels.npy", 140)
    with pytest.raises(ValueError, match=r"labels\.npy is damaged"):
        cnnrs.load_features(out)
    assert torch.equal(run(images, out).labels, first.labels) and computed() == 0
    assert torch.equal(cnnrs.load_features(out).labels, first.labels)
    flip(out / "meta.json", 300)
    with pytest.raises(FileNotFoundError, match=r"meta\.json is damaged"):
        cnnrs.load_features(out)
    assert torch.equal(run(images, out).features, right)
    assert torch.equal(cnnrs.load_features(out).features, right)
    (out / "features.npy").unlink()
    assert torch.equal(run(images, out).features, right)


def test_damage_to_what_an_interrupted_run_left(images: Path, tmp_path: Path) -> None:
    resumed(images, tmp_path / "whole")
    rng = np.random.default_rng(0)
    for trial in range(12):
        out = tmp_path / f"f{trial}"
        computed()
        interrupted(images, out, after=20)
        for name in ("features.npy.partial", "features.journal"):
            size = (out / name).stat().st_size
            if trial % 3 == 2:
                os.truncate(out / name, int(rng.integers(size)))
            else:
                flip(out / name, int(rng.integers(size)))
        found = resumed(images, out)
        whole, again = cnnrs.load_features(tmp_path / "whole"), cnnrs.load_features(out)
        for one in (found, again):
            assert torch.allclose(one.features, whole.features, rtol=0, atol=ROUNDING)
            assert torch.equal(one.labels, whole.labels) and one.paths == whole.paths
        assert (out / "labels.npy").read_bytes() == (tmp_path / "whole" / "labels.npy").read_bytes()


def test_another_format(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "f"
    run(images, out)
    (out / "meta.json").write_text(json.dumps({"format": 1, "shape": [26], "paths": []}))
    with pytest.raises(ValueError, match=r"is in format 1, this cnnrs reads format 2: call preconv again"):
        cnnrs.load_features(out)
    said(capsys)
    run(images, out)
    assert said(capsys) == f"{out}: recomputing the features, because they are stored in format 1, not 2"


def test_a_disk_without_room(images: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: the real calls fail, first the reservation of the file."""
    out = tmp_path / "f"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"0 of 26 rows are safe.*Make room and call preconv again") as caught:
            run(images, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC) and "features.npy.partial" in str(caught.value.filename)
    computed()
    assert torch.equal(run(images, out).features, fresh(images).features)


def test_a_disk_that_fills_up_on_the_way(images: Path, tmp_path: Path) -> None:
    """Rows that are safe stay so: here the commit records are what finds no more room."""
    out = tmp_path / "f"
    interrupted(images, out, after=12)
    size = (out / "features.npy.partial").stat().st_size
    done = computed()
    # The rows have their place reserved; nothing beyond it, and the labels and meta.json are written afterwards.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((out / "features.journal").stat().st_size + 200, hard))
    try:
        with pytest.raises(OSError, match=r"of 26 rows are safe"):
            resumed(images, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done == 12 and (out / "features.npy.partial").stat().st_size == size
    found = resumed(images, out)
    assert torch.equal(found.features, fresh(images, model=Interrupted(10**6)).features)


def test_a_full_file_system(images: Path, tmp_path: Path) -> None:
    """A real, tiny file system where the machine allows to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        with pytest.raises(OSError, match="rows are safe") as caught:
            run(images, disk / "f")
        assert caught.value.errno == errno.ENOSPC
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert torch.equal(run(images, disk / "f").features, fresh(images).features)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        computed()
        # Reading needs no writing.
        assert torch.equal(run(images, disk / "f").features, fresh(images).features) and computed() == 0
        # Nor does it when times and folders are others.
        os.utime(images / "bee" / "1.jpg")
        moved = images.rename(images.with_name("moved"))
        found = run(moved, disk / "f")
        assert torch.equal(found.features, fresh(moved).features) and computed() == 0
        assert all(path.startswith(str(moved)) for path in found.paths or [""])
        # Its mapping keeps the file system in use.
        del found
        moved.rename(images)
        with pytest.raises(PermissionError, match=r"features cannot be written to .* give out= a folder that can be"):
            run(images, disk / "f", Counting(2.0), overwrite=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    first = run(images, out)
    out.chmod(0o555)
    try:
        computed()
        assert torch.equal(run(images, out).features, first.features) and computed() == 0
        # Nor does it when times and folders are others.
        os.utime(images / "bee" / "1.jpg")
        moved = images.rename(images.with_name("moved"))
        found = run(moved, out)
        assert torch.equal(found.features, fresh(moved).features) and computed() == 0
        assert all(path.startswith(str(moved)) for path in found.paths or [""])
        moved.rename(images)
        with pytest.raises(PermissionError, match="give out= a folder that can be written"):
            run(images, out, Counting(2.0))
    finally:
        out.chmod(0o755)


def test_files_that_are_gone(images: Path, tmp_path: Path) -> None:
    data = cnnrs.ImageFolder(images, TRANSFORM)
    (images / "bee" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.jpg"):
        cnnrs.preconv(data, Counting(), out=tmp_path / "f", engine="python")
    loader = cnnrs.DataLoader(data, batch_size=4, on_error="skip")
    for _ in range(2):
        assert len(cnnrs.preconv(loader, Counting(), out=tmp_path / "f", engine="python")) == 25


def test_files_that_cannot_be_read_are_left_out(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    bad = [images / "ant" / "broken.jpg", images / "bee" / "1.jpg", images / "cat" / "broken.png"]
    for path in bad:
        path.write_bytes(b"no image")
    data = cnnrs.ImageFolder(images, TRANSFORM)
    with pytest.raises(cnnrs.DecodeError, match="broken"):
        cnnrs.preconv(data, Counting(), out=out, batch_size=4, engine="python")
    computed()
    for count in (None, 0):
        loader = cnnrs.DataLoader(data, batch_size=4, on_error="skip")
        with pytest.warns(UserWarning, match="skips files") if count is None else nullcontext():
            found = cnnrs.preconv(loader, Counting(), out=out, engine="python")
        assert len(found) == 25 and not {str(path) for path in bad} & set(found.paths or [])
        assert count is None or computed() == count
        computed()
    good = cnnrs.ImageList([sample for sample in data.samples if Path(sample[0]) not in bad], TRANSFORM)
    right = cnnrs.preconv(good, Counting(), batch_size=4, engine="python")
    assert torch.allclose(found.features, right.features, rtol=0, atol=ROUNDING)
    assert torch.equal(found.labels, right.labels) and found.paths == right.paths
    skipped = json.loads((out / "meta.json").read_text())["skipped"]
    assert sorted(path for path, _, _ in skipped) == sorted(map(str, bad))
    computed()
    Image.new("RGB", (30, 30), (9, 99, 199)).save(bad[0])
    loader = cnnrs.DataLoader(data, batch_size=4, on_error="skip")
    assert len(cnnrs.preconv(loader, Counting(), out=out, engine="python")) == 26
    assert computed() == 1


# -- two at a time -----------------------------------------------------------------------------------------------------


INSIDE, GOES_ON = threading.Event(), threading.Event()


class Waiting(Counting):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sys.modules[__name__].INSIDE.set()
        sys.modules[__name__].GOES_ON.wait(20)
        return super().forward(x)


def test_two_at_a_time_compute_once(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, results = tmp_path / "f", []
    INSIDE.clear(), GOES_ON.clear()

    def work() -> None:
        results.append(run(images, out, Waiting()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    threads[0].start()
    assert INSIDE.wait(20)
    threads[1].start()
    # The second one says that it waits.
    deadline = 400
    text = ""
    while "another process is writing features there, waiting for it" not in text and deadline:
        threading.Event().wait(0.05)
        text += capsys.readouterr().out
        deadline -= 1
    assert deadline
    GOES_ON.set()
    for thread in threads:
        thread.join(60)
    assert computed() == 26 and len(results) == 2
    assert torch.equal(results[0].features, results[1].features)
    assert "26 features are up to date" in said(capsys)


MEMORY = """
import resource, sys, torch, cnnrs
from torch import nn
from torch.utils.data import TensorDataset
torch.set_num_threads(1)
rows = int(sys.argv[1])
model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
# An expanded tensor: a data set that takes no memory, so that what is measured is the store's.
data = TensorDataset(torch.rand(1, 1, 28, 28).expand(rows, 1, 28, 28), torch.zeros(1, dtype=torch.int64).expand(rows))
loader = cnnrs.DataLoader(data, batch_size=50)
cnnrs.preconv(loader, model, out=sys.argv[2], engine=sys.argv[3], verbose=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("engine", ["cpu", "torch", "python"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, engine: str) -> None:
    def peak(rows: int, out: Path) -> float:
        command = [sys.executable, "-c", MEMORY, str(rows), str(out), engine]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert (out / "features.npy").stat().st_size == 256 + rows * 4 * 28 * 28 * 4
        return int(done.stdout) / 1024

    few = peak(1_000, tmp_path / "few")
    # 9,000 rows more are 108 MiB of features; their identities in memory and in the journal are a few MiB. Rows may
    # wait for a disk that is busy, up to half a GiB: not three times.
    many = []
    while not many or (min(many) - few >= 25 and len(many) < 3):
        many.append(peak(10_000, tmp_path / f"many{len(many)}"))
    assert min(many) - few < 25, (few, many)


def test_stores_are_known_by_their_journal(tmp_path: Path) -> None:
    """A torn last record, and one whose text was changed, end what counts."""
    store = Store(tmp_path)
    store.start({"plan": "p", "key": {}, "passes": 1})
    path = tmp_path / "features.journal"
    whole = path.read_bytes()
    record = b'{"rows":[[0,2,5]],"ids":["a","b"]}'
    line = b"%08x %s\n" % (zlib.crc32(record), record)
    for tail, count in (
        (b"", 0),
        (line, 1),
        (line + line[:20], 1),
        (line + line.replace(b"5", b"6"), 1),
        (line * 2, 2),
    ):
        path.write_bytes(whole + tail)
        journal = store.journal()
        assert journal is not None and journal.runs == [(0, 2, 5, ["a", "b"])] * count
        assert path.read_bytes() == whole + line * count
