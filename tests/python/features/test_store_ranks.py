"""Processes of `torchrun` that fill one store together: the bytes are those of one process."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import transforms

import cnnrs
from forks import Fork

WORKER = Path(__file__).parents[1] / "support" / "rank_worker.py"


def start(images: Path, out: Path, world: int, **environment: str) -> list[tuple[int, str, str]]:
    """(exit status, what it printed, its errors) of every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    running = [Fork(str(WORKER), str(images), str(out), RANK=str(rank), **own) for rank in range(world)]
    return [(ended.returncode, ended.stdout, ended.stderr) for ended in [one.wait() for one in running]]


def same(out: Path, whole: Path) -> bool:
    names = ("features.npy", "labels.npy", "meta.json")
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    return all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)


def seen(tmp_path: Path, name: str) -> list[int]:
    return [path.stat().st_size for path in sorted(tmp_path.glob(f"{name}-*"))]


def test_ranks_share_the_work(folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    (images / "ant" / "broken.jpg").write_bytes(b"no image")
    ((status, _, errors),) = start(images, tmp_path / "whole", 1)
    assert status == 0, errors
    ranks = start(images, tmp_path / "f", 2, SEEN=str(tmp_path / "seen"))
    assert [status for status, _, _ in ranks] == [0, 0], ranks
    assert same(tmp_path / "f", tmp_path / "whole")
    # 13 batches of two in each of two passes, every other one: about half for each, all of them once.
    counts = seen(tmp_path, "seen")
    assert sum(counts) == 52 and min(counts) >= 20
    lines = [line for _, text, _ in ranks for line in text.splitlines() if line.startswith("rank")]
    assert len({line.split(", ")[1] for line in lines}) == 1 and all(": 52 rows" in line for line in lines)
    # Again: nothing to compute, for any number of processes.
    again = start(images, tmp_path / "f", 2, SEEN=str(tmp_path / "again"))
    assert [status for status, _, _ in again] == [0, 0], again
    assert seen(tmp_path, "again") == [] and "52 features are up to date" in again[0][1]


def test_what_a_failed_run_left_is_used(folder: Path, tmp_path: Path) -> None:
    start(folder, tmp_path / "whole", 1)
    ranks = start(folder, tmp_path / "f", 2, SEEN=str(tmp_path / "seen"), FAIL="1")
    # torch aborts a process whose partner is gone first.
    assert all(status != 0 for status, _, _ in ranks)
    assert all("rank 1: ValueError: no more" in errors for _, _, errors in ranks)
    safe = sum(seen(tmp_path, "seen"))
    ((status, text, errors),) = start(folder, tmp_path / "f", 1, SEEN=str(tmp_path / "rest"))
    assert status == 0, errors
    assert same(tmp_path / "f", tmp_path / "whole") and "rows are there" not in text
    (rest,) = seen(tmp_path, "rest")
    # The batch that failed was counted, and one more was in flight.
    assert 52 - safe <= rest <= 52 - safe + 4 and safe >= 26


def test_ranks_that_see_other_images_are_told(folder: Path, tmp_path: Path) -> None:
    ranks = start(folder, tmp_path / "f", 2, OTHER="1")
    # torch aborts a process whose partner is gone first.
    assert all(status != 0 for status, _, _ in ranks)
    assert all("rank 1 sees other images, another model or other options than rank 0" in text for _, _, text in ranks)


def test_a_share_without_a_process_group_is_refused(folder: Path, tmp_path: Path) -> None:
    data = cnnrs.ImageFolder(folder, transforms.Compose([transforms.Resize((24, 24)), transforms.ToTensor()]))
    loader = cnnrs.DataLoader(data, batch_size=4, rank=1, world_size=2)
    with pytest.raises(ValueError, match=r"needs a process group to share a folder: start with torchrun"):
        cnnrs.preconv(loader, nn.Conv2d(3, 4, 3), out=tmp_path / "f")
    assert not (tmp_path / "f").exists()
    # In memory a share is a share.
    found = cnnrs.preconv(loader, nn.Conv2d(3, 4, 3))
    assert len(found) == 13 and found.paths == [data.samples[i][0] for i in range(1, 26, 2)]
    assert isinstance(found.features, torch.Tensor)
