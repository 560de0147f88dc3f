"""Forks jobs that fill a store and kills them with SIGKILL at random moments: `test_store_kill.py` starts it.

One process imports torch once; every job is a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torchvision import transforms

import cnnrs
from cnnrs._cnnrs import parse_journal


class Slow(nn.Module):
    """A network that takes its time and counts the images it has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(slowly(x))


def slowly(images: torch.Tensor) -> torch.Tensor:
    """Takes its time, and counts the images in a file that survives the death of the process."""
    time.sleep(float(os.environ.get("PAUSE", "0")))
    with open(os.environ["SEEN"], "ab") as seen:
        seen.write(b"x" * (len(images) if images.dim() == 4 else 1))
    return images


def job(images: str, out: str, seen: str, pause: float, passes: int) -> None:
    os.environ.update(SEEN=os.fspath(seen), PAUSE=str(pause))
    steps = [transforms.RandomResizedCrop(20), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    model: nn.Module = Slow()
    engine = os.environ["ENGINE"]
    if engine == "cpu":
        # No Python runs in that network: the images are late instead.
        model, steps = model.layers, [*steps, slowly]
    data = cnnrs.ImageFolder(images, transforms.Compose(steps))
    cnnrs.preconv(data, model, out=out, batch_size=2, num_workers=1, engine=engine, passes=passes, verbose=False)


def fork(*arguments: object) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            job(*arguments)  # type: ignore[arg-type]
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def recorded(out: Path) -> int:
    """How many rows count as safe by now. A torn last record stays, for the next job to meet."""
    journal = out / "features.journal"
    return sum(rows for _, rows, _, _ in parse_journal(journal.read_bytes())[1]) if journal.exists() else 0


def main(images: str, work: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    place = Path(work)
    _, status = os.waitpid(fork(images, place / "whole", place / "seen", 0.0, 2), 0)
    assert status == 0
    expected = contents(place / "whole")
    # Two passes of 26 images.
    rows = 52
    # Every third job begins with the features of some of the images, which it may use again.
    some = place / "some"
    for path in sorted(Path(images).rglob("*.*"))[::2]:
        (some / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, some / path.parent.name)
    _, status = os.waitpid(fork(str(some), place / "old", place / "seen-old", 0.0, 2), 0)
    assert status == 0
    shutil.copytree(place / "old", place / "updated")
    _, status = os.waitpid(fork(images, place / "updated", place / "seen-updated", 0.0, 2), 0)
    assert status == 0
    update, update_rows = contents(place / "updated"), rows // 2
    # How long an undisturbed job takes with the pause the killed ones have.
    begin = time.perf_counter()
    _, status = os.waitpid(fork(images, place / "timed", place / "seen", 0.002, 2), 0)
    took = time.perf_counter() - begin
    done = finished = 0
    report = {"states": {}, "computed": [], "missing": [], "equal": []}
    while done < kills:
        out, seen = place / f"out-{finished}", place / f"seen-{finished}"
        attempts = 0
        is_update = finished % 3 == 2
        if is_update:
            shutil.copytree(place / "old", out)
        while True:
            missing = min(rows - recorded(out), update_rows if is_update else rows)
            seen.write_bytes(b"")
            # The last one is left alone.
            pid = fork(images, out, seen, 0.002 if attempts < 40 else 0.0, 2)
            if attempts < 40:
                time.sleep(rng.uniform(0, 1.1 * took))
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            report["missing"].append(missing)
            report["computed"].append(seen.stat().st_size)
            if status == 0:
                break
            assert os.WIFSIGNALED(status), f"a job failed by itself: {status}"
            done += 1
            attempts += 1
            state = ",".join(sorted(path.name for path in out.iterdir())) if out.exists() else "nothing"
            report["states"][state] = report["states"].get(state, 0) + 1
        report["equal"].append(contents(out) == (update if is_update else expected))
        shutil.rmtree(out)
        finished += 1
    report["kills"] = done
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
