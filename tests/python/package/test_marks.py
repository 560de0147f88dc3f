"""What needs a GPU is marked, so that `scripts/gpu-check.sh` finds it where there is one."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
#: A skip of its own would hide a test from `pytest -m gpu`.
SKIPPED = re.compile(r"skipif\(\s*not torch\.cuda\.is_available")


def test_what_needs_a_gpu_is_marked() -> None:
    texts = {path.name: path.read_text() for path in TESTS.rglob("*.py") if path != Path(__file__)}
    assert [name for name, text in texts.items() if SKIPPED.search(text)] == []
    marked = [name for name, text in texts.items() if "pytest.mark.gpu" in text]
    assert "test_cuda_graph.py" in marked
    # The script leaves these files out.
    assert [name for name in marked if re.search("^from hypothesis", texts[name], re.M)] == []
