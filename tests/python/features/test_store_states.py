"""Every file of a store in every state, under every operation: right rows, or one sentence; never other rows."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import cnnrs
from cnnrs.app.cli import main
from cnnrs.features.npy import HEADER, Layout, layout_of
from cnnrs.features.store import Store, is_ours

ROWS = 6
PICTURES = torch.rand(ROWS, 1, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 1, 4, 1, 5, 9])
FILES = (
    "features.npy", "labels.npy", "meta.json", "features.npy.partial", "labels.npy.partial", "meta.json.partial",
    "meta.json.pending", "features.journal", "features.npy.previous", "features.journal.previous", "features.journal.1",
)  # fmt: skip


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())


def computed(out: Path | None, seed: int = 0, labels: torch.Tensor = LABELS) -> cnnrs.Features:
    loader = cnnrs.DataLoader(TensorDataset(PICTURES, labels), batch_size=2)
    return cnnrs.preconv(loader, model(seed), out=out, engine="python", overwrite=True, verbose=False)


@pytest.fixture(scope="module")
def right() -> torch.Tensor:
    return computed(None).features


def complete(out: Path, seed: int = 0) -> None:
    computed(out, seed)


def interrupted(out: Path, seed: int = 0) -> None:
    """Two of three batches are safe; a complete store of another model is there, and rows of an earlier attempt."""
    computed(out, seed + 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            computed(out, seed, LABELS[:4].repeat(2)[:ROWS])
        for name in ("features.npy", "features.journal"):
            partial = out / (f"{name}.partial" if name.endswith("npy") else name)
            shutil.copy(partial, out / f"{name}.previous")
        with pytest.raises(KeyboardInterrupt):
            computed(out, seed)
    journal = out / "features.journal"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:3]))


def pending(out: Path, seed: int = 0) -> None:
    """Killed between the last write of a commit and its renaming."""
    computed(out, seed + 10)
    with pytest.MonkeyPatch.context() as patch:
        real = os.replace

        def stops(old: Path, new: Path) -> None:
            real(old, new)
            if new.name == "meta.json.pending":
                raise KeyboardInterrupt

        patch.setattr(os, "replace", stops)
        with pytest.raises(KeyboardInterrupt):
            computed(out, seed)


def cut(count: Callable[[int], int]) -> Callable[[Path, Path], None]:
    def apply(path: Path, _: Path) -> None:
        if path.exists():
            os.truncate(path, max(0, count(path.stat().st_size)))

    return apply


def garbage(path: Path, _: Path) -> None:
    path.write_bytes(b"\x93NUMPY\x01\x00\xf6\x00{'descr': '<f4', 'shape': ((((\n" * 40)


def older(path: Path, others: Path) -> None:
    if (others / path.name).exists():
        shutil.copy(others / path.name, path)


def folder(path: Path, _: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def pipe(path: Path, _: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


STATES: dict[str, Callable[[Path, Path], None]] = {
    "absent": lambda path, _: path.unlink(missing_ok=True),
    "empty": lambda path, _: path.write_bytes(b"") and None,
    "one byte": cut(lambda size: 1),
    "within the header": cut(lambda size: min(size, 100)),
    "half": cut(lambda size: size // 2),
    "all but one byte": cut(lambda size: size - 1),
    "garbage": garbage,
    "nested too deep": lambda path, _: path.write_bytes(b"[" * 200_000) and None,
    "older": older,
    "a folder": folder,
    "a pipe": pipe,
}


def opened(out: Path, right: torch.Tensor, seed: int = 0) -> bool:
    """Whether the store opens, and with the rows of one model."""
    try:
        found = cnnrs.load_features(out)
    except (FileNotFoundError, ValueError) as error:
        assert str(out) in str(error) and "\n" not in str(error)
        return False
    # A commit that nobody has finished leaves what was there before.
    assert torch.equal(found.features, right) or torch.equal(found.features, computed(None, seed + 10).features)
    assert torch.equal(found.labels, LABELS)
    return True


@pytest.fixture(scope="module", params=[complete, interrupted, pending])
def kinds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `whole` and `older`, left by two models."""
    root = tmp_path_factory.mktemp("stores")
    request.param(root / "whole")
    request.param(root / "older", 1)
    return root


@pytest.mark.parametrize("name", FILES)
def test_every_state_of_every_file(
    tmp_path: Path, kinds: Path, right: torch.Tensor, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for state, apply in STATES.items():
        if apply is older and not (kinds / "older" / name).exists():
            continue
        out = tmp_path / "f"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kinds / "whole", out)
        apply(out / name, kinds / "older")
        opened(out, right)
        # `verify` begins with what `info` says.
        assert main(["features", "verify", str(out)]) in (0, 1, 2), state
        assert "Traceback" not in "".join(capsys.readouterr())
        try:
            found = computed(out)
        except FileExistsError as error:
            # Where the complete rows can be opened, a folder beside them disturbs nobody.
            assert state in ("a folder", "a pipe")
            assert "is no file, but features are kept under this name: remove it" in str(error)
            continue
        assert torch.equal(found.features, right) and torch.equal(found.labels, LABELS), state
        assert opened(out, right), state
        left = {path.name for path in out.iterdir()}
        assert left >= {"features.npy", "labels.npy", "meta.json"} and all(map(is_ours, left))
        assert computed(out).folder == out


def test_no_flipped_bit_gives_other_rows(tmp_path: Path, right: torch.Tensor) -> None:
    """All bits of the header, some of all else; opening refuses, and the next call mends."""
    out = tmp_path / "f"
    computed(out)
    bits = [
        ("features.npy", 8 * HEADER),
        ("labels.npy", 8 * 176),
        ("meta.json", 8 * (out / "meta.json").stat().st_size),
    ]
    for name, count in bits:
        path = out / name
        whole = path.read_bytes()
        places = range(count) if name == "features.npy" else range(0, count, 29)
        for bit in [*places, *range(8 * HEADER, 8 * len(whole), 997)]:
            data = bytearray(whole)
            if bit >= 8 * len(data):
                continue
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            with pytest.raises((ValueError, FileNotFoundError), match=r"damaged|is in format|holds no complete"):
                cnnrs.load_features(out)
            if name == "features.npy" and bit < 8 * HEADER:
                with pytest.raises(ValueError, match="damaged: its header or its size"):
                    cnnrs.load_features(out, verify=False)
            if bit % 727 == 0:
                found = computed(out)
                assert torch.equal(found.features, right) and torch.equal(found.labels, LABELS), (name, bit)
                assert opened(out, right)
        path.write_bytes(whole)


def test_no_flipped_bit_of_a_break_gives_other_rows(tmp_path: Path, right: torch.Tensor) -> None:
    interrupted(tmp_path / "whole")
    out = tmp_path / "f"
    for name in ("features.npy.partial", "features.journal", "features.npy.previous", "features.journal.previous"):
        bits = 8 * (tmp_path / "whole" / name).stat().st_size
        for bit in range(0, bits, max(1, bits // 12) | 1):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(tmp_path / "whole", out)
            data = bytearray((out / name).read_bytes())
            data[bit // 8] ^= 1 << bit % 8
            (out / name).write_bytes(data)
            found = computed(out)
            assert torch.equal(found.features, right) and torch.equal(found.labels, LABELS), (name, bit)


def test_a_header_alone_is_mended_without_the_model(tmp_path: Path, right: torch.Tensor) -> None:
    out = tmp_path / "f"
    computed(out)
    whole = (out / "features.npy").read_bytes()
    (out / "features.npy").write_bytes(whole[:20] + b"!" + whole[21:])
    loader = cnnrs.DataLoader(TensorDataset(PICTURES, LABELS), batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnrs.features.session.Session.compute", lambda *_: pytest.fail("nothing is missing"))
        found = cnnrs.preconv(loader, model(), out=out, engine="python", verbose=False)
    assert torch.equal(found.features, right) and (out / "features.npy").read_bytes() == whole


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("head", [nn.Identity(), nn.Flatten(0, -1)])
def test_headers_are_those_that_are_written(tmp_path: Path, dtype: str, head: nn.Module) -> None:
    """The layout has the writer's bytes, for rows of any number of dimensions."""
    data = TensorDataset(PICTURES[:, 0, 0, :1] if isinstance(head, nn.Flatten) else PICTURES, LABELS)
    found = cnnrs.preconv(cnnrs.DataLoader(data, batch_size=2), head, out=tmp_path, dtype=dtype, verbose=False)
    layout = Layout(tuple(found.features.shape), dtype)
    data_bytes = (tmp_path / "features.npy").read_bytes()
    assert data_bytes.startswith(layout.header()) and len(data_bytes) == layout.file_bytes
    assert layout_of(tmp_path / "features.npy") == layout
    assert torch.equal(cnnrs.load_features(tmp_path).features, found.features)


def room(limit: int) -> Any:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit >= 0 else soft, hard))
    return soft, hard


@pytest.mark.parametrize("make", [None, interrupted, pending])
def test_a_disk_that_is_full_at_any_byte(tmp_path: Path, right: torch.Tensor, make: Any) -> None:
    """No file may become longer than `limit`; what that leaves is mended by the next call."""
    for limit in (0, 1, 100, 200, 256, 400, 700, 1000, 1200, 1300):
        out = tmp_path / str(limit)
        if make is not None:
            make(out)
        before = room(limit)
        try:
            try:
                computed(out)
            except OSError as error:
                assert str(out) in str(error), error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        opened(out, right)
        found = computed(out)
        assert torch.equal(found.features, right) and torch.equal(found.labels, LABELS) and opened(out, right)


def test_a_disk_that_is_nearly_full(tmp_path: Path, right: torch.Tensor) -> None:
    """A real file system with room for some pages, where the machine allows to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        for pages in range(5):
            for path in disk.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            (disk / "others").write_bytes(bytes(65536 - 4096 * pages))
            try:
                computed(disk / "f")
            except OSError as error:
                assert str(disk) in str(error), error
            (disk / "others").unlink()
            assert torch.equal(computed(disk / "f").features, right)
            assert opened(disk / "f", right)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
