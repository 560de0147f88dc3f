"""Memory that steps free is used again by the next ones, and goes back to the system when no more come."""

from __future__ import annotations

import os
import resource
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnrs._util import kept_memory
from forks import Fork


def large_pages() -> str:
    """When the system gives them."""
    try:
        return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "[never]"


#: MiB in large pages, within and behind.
LARGE = """
from pathlib import Path
import torch
from cnnrs._util import kept_memory

def held():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages")) / 1024

before = held()
with kept_memory.kept_memory():
    blocks = [torch.ones(1 << 20) for _ in range(50)]
    found = held() - before
    del blocks
kept_memory.give_back()
print(found, held() - before)
"""


def test_freed_memory_is_kept_within_only() -> None:
    with kept_memory.kept_memory(), kept_memory.kept_memory():
        assert len(kept_memory._users) in (0, 2)
    with pytest.raises(ValueError, match="x"), kept_memory.kept_memory():
        raise ValueError("x")
    assert not kept_memory._users


@pytest.mark.skipif(kept_memory._malloc() is None, reason="another C library, or its malloc is set up by the user")
class TestFreedMemory:
    """What was freed inside goes back to the system a moment later, unless somebody wants it again."""

    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(kept_memory, "LINGERS", 0.3)
        # What other tests have freed would be used again.
        kept_memory._free(kept_memory._malloc())
        yield
        wait_until(lambda: kept_memory._lingering is None)

    def test_lingers(self) -> None:
        before = resident()
        with kept_memory.kept_memory():
            blocks = [torch.ones(1 << 20) for _ in range(50)]
            del blocks
        assert resident() - before > 150
        with kept_memory.kept_memory():
            time.sleep(0.5)
        assert resident() - before > 150
        wait_until(lambda: resident() - before < 50)

    def test_goes_back_at_once_for_whoever_asks(self) -> None:
        before = resident()
        with kept_memory.kept_memory():
            blocks = [torch.ones(1 << 20) for _ in range(50)]
            del blocks
            kept_memory.give_back()
            assert resident() - before > 150
        kept_memory.give_back()
        assert resident() - before < 50 and kept_memory._lingering is None
        kept_memory.give_back()

    @pytest.mark.skipif("[never]" in large_pages(), reason="the system has no large pages")
    def test_comes_in_large_pages(self, tmp_path: Path) -> None:
        # In a process that has freed nothing before.
        program = tmp_path / "large.py"
        program.write_text(LARGE)
        done = Fork(str(program)).wait()
        assert done.returncode == 0, done.stderr
        found, left = map(float, done.stdout.split())
        # Of 200 MiB; fewer where the system's memory is in pieces.
        assert found >= 32 and left < 32

    def test_is_had_where_address_space_is_scarce(self) -> None:
        limits = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
        try:
            with kept_memory.kept_memory():
                assert torch.ones(1 << 20).sum() == 1 << 20
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)

    @pytest.mark.parametrize("within", [False, True])
    def test_is_no_matter_of_a_forked_process(self, within: bool) -> None:
        with kept_memory.kept_memory():
            if within:
                child = forked()
        if not within:
            child = forked()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_goes_back_at_once_without_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: threading.Timer) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Timer, "start", refuse)
        before = resident()
        with kept_memory.kept_memory():
            blocks = [torch.ones(1 << 20) for _ in range(50)]
            del blocks
        assert resident() - before < 50 and not kept_memory._users


def test_whoever_is_interrupted_at_the_door_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if kept_memory._malloc() is None:
        pytest.skip("without glibc")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kept_memory, "_set", interrupt)
        patch.setattr(kept_memory, "_lingering", None)
        with kept_memory.kept_memory():
            pass
    assert not kept_memory._users


def forked() -> int:
    """A child process that frees a block; it ends with 0 where that goes back to the system."""
    with warnings.catch_warnings():
        # Threads of PyTorch's: the child computes nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        before = resident()
        block = np.ones(100 << 20, np.float32)
        held = resident() - before
        del block
        left = resident() - before
        # By an exception, out of what the parent has begun.
        kept_memory._end(kept_memory._malloc(), object())
        os._exit(0 if held > 390 and left < 10 and not kept_memory._users else 1)
    return child


def resident() -> float:
    """MiB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
