"""SIGKILL at any moment: the next run computes only what is missing, and the files are those of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forks import Fork

KILLS = 50
BATCH = 2


@pytest.mark.parametrize("engine", ["python", "cpu"])
def test_fifty_random_kills(folder: Path, tmp_path: Path, engine: str) -> None:
    server = Path(__file__).parents[1] / "support" / "kill_server.py"
    done = Fork(str(server), str(folder), str(tmp_path), str(KILLS), "7", ENGINE=engine).wait(280)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= KILLS and all(report["equal"])
    # What the journal says is safe is never computed again, however slow the disk was. Every run may call the model
    # once more, where somebody drew random numbers meanwhile.
    for computed, missing in zip(report["computed"], report["missing"], strict=True):
        assert computed <= missing + BATCH
    # It says so of much: of the rows that there are when a job goes on.
    assert min(report["missing"]) < 26
    # The kills hit what they were meant to hit: files in the making.
    assert sum(count for state, count in report["states"].items() if "partial" in state) >= KILLS // 4
