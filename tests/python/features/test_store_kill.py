"""SIGKILL at any moment: the next run computes only what is missing, and the files are those of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forks import Fork

KILLS = 50
BATCH = 2
# Batches that a kill can cost: one in flight on the device, one being written or flushed, and what waits for the disk,
# which here is fast enough.
UNSAFE = 5


@pytest.mark.parametrize("engine", ["python", "cpu"])
def test_fifty_random_kills(folder: Path, tmp_path: Path, engine: str) -> None:
    server = Path(__file__).parents[1] / "support" / "kill_server.py"
    done = Fork(str(server), str(folder), str(tmp_path), str(KILLS), "7", ENGINE=engine).wait(280)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= KILLS and all(report["equal"])
    # Two passes of 26 images; or of the 13 that are new, where a job begins with the features of the others.
    assert set(report["rows"]) == {52, 26}
    for rows, computed, kills in zip(report["rows"], report["computed"], report["lost"], strict=True):
        assert rows <= computed
        # Engine `cpu` counts what is read, ahead of what is computed. Every run may call the model once more,
        # where somebody drew random numbers meanwhile.
        assert engine == "cpu" or computed <= rows + kills * UNSAFE * BATCH + (kills + 1) * BATCH
    # The kills hit what they were meant to hit: files in the making.
    assert sum(count for state, count in report["states"].items() if "partial" in state) >= KILLS // 4
