"""What needs a GPU is marked, so that `scripts/gpu-check.sh` finds it where there is one."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
#: A skip of its own would hide a test from `pytest -m gpu`.
SKIPPED = re.compile(r"skipif\(\s*not torch\.cuda\.is_available")


def test_what_needs_a_gpu_is_marked() -> None:
    files = [path for path in TESTS.rglob("*.py") if path != Path(__file__)]
    assert [path.name for path in files if SKIPPED.search(path.read_text())] == []
    assert any("pytest.mark.gpu" in path.read_text() for path in files)
