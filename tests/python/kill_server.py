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

NAMES = ("features.npy", "labels.npy", "meta.json")


class Slow(nn.Module):
    """A network that takes its time and counts the images it has seen, in a file that survives its death."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten())
        self.pause = pause

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(float(os.environ.get("PAUSE", "0")))
        with open(os.environ["SEEN"], "ab") as seen:
            seen.write(b"x" * len(x))
        return self.layers(x)


def job(images: str, out: str, seen: str, pause: float, passes: int) -> None:
    os.environ.update(SEEN=os.fspath(seen), PAUSE=str(pause))
    augment = transforms.Compose(
        [transforms.RandomResizedCrop(20), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    data = cnnrs.ImageFolder(images, augment)
    cnnrs.preconv(data, Slow(0), out=out, batch_size=2, num_workers=1, engine="python", passes=passes, verbose=False)


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


def main(images: str, work: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    place = Path(work)
    _, status = os.waitpid(fork(images, place / "whole", place / "seen", 0.0, 2), 0)
    assert status == 0
    expected = contents(place / "whole")
    rows = (place / "seen").stat().st_size
    # How long an undisturbed job takes with the pause the killed ones have.
    begin = time.perf_counter()
    _, status = os.waitpid(fork(images, place / "timed", place / "seen", 0.002, 2), 0)
    took = time.perf_counter() - begin
    done = finished = 0
    report = {"rows": rows, "states": {}, "computed": [], "equal": [], "lost": []}
    while done < kills:
        out, seen = place / f"out-{finished}", place / f"seen-{finished}"
        attempts = 0
        while True:
            pid = fork(images, out, seen, 0.002, 2)
            time.sleep(rng.uniform(0, 1.1 * took))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if status == 0:
                break
            assert os.WIFSIGNALED(status), f"a job failed by itself: {status}"
            done += 1
            attempts += 1
            state = ",".join(sorted(path.name for path in out.iterdir())) if out.exists() else "nothing"
            report["states"][state] = report["states"].get(state, 0) + 1
            if attempts > 40:
                break
        if status != 0:
            _, status = os.waitpid(fork(images, out, seen, 0.0, 2), 0)
            assert status == 0
        report["equal"].append(contents(out) == expected)
        report["computed"].append(seen.stat().st_size)
        report["lost"].append(attempts)
        shutil.rmtree(out)
        finished += 1
    report["kills"] = done
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
