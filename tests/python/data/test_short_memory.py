"""Memory that a file, a transform or a batch asks for and the system does not have is a `MemoryError`."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, write_idx

HEAD = """
    import resource, sys
    import numpy as np
    import torch
    from torchvision import transforms
    import cnnrs
    from cnnrs import _cnnrs

    def limit(megabytes):
        # On top of what is mapped already.
        mapped = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (mapped + megabytes * 2**20,) * 2)

    def attempt(work):
        try:
            return type(work()).__name__
        except Exception as error:
            return type(error).__name__

    root = sys.argv[1]
"""


def run(code: str, root: Path) -> list[str]:
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads /proc")
    script = textwrap.dedent(HEAD) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout.split()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images" / "class").mkdir(parents=True)
    for i in range(4):
        picture(40 + i, 50, i).save(tmp_path / "images" / "class" / f"{i}.png")
    return tmp_path


def test_batches_that_do_not_fit(root: Path) -> None:
    """More than there is, and more than an address can say; then the loader works on."""
    code = """
        def first(size, batch_size=4, num_workers=2, **keywords):
            steps = [transforms.CenterCrop(size), transforms.ToTensor()]
            data = cnnrs.ImageFolder(root + "/images", transforms.Compose(steps))
            return lambda: next(iter(cnnrs.DataLoader(data, batch_size, num_workers=num_workers, **keywords)))

        first(8)()
        limit(700)
        print(attempt(first(8000)), attempt(first(8000, num_workers=0)), attempt(first(8000, on_error="skip")))
        print(attempt(first(2**31 - 1)), attempt(first(8)))
    """
    assert run(code, root) == ["MemoryError"] * 4 + ["list"]


def test_files_that_do_not_fit(root: Path) -> None:
    with open(root / "images" / "class" / "large.png", "wb") as file:
        file.truncate(2**30 - 1)
    write_idx(root / "small", np.zeros((2, 2, 2)))
    with open(root / "large", "wb") as file:
        file.write((root / "small").read_bytes())
        file.truncate(2**30)
    code = """
        data = cnnrs.ImageFolder(root + "/images", transforms.ToTensor())
        loader = cnnrs.DataLoader(data, 1, sampler=[4, 0], num_workers=2)
        next(iter(cnnrs.DataLoader(data, 1)))
        limit(300)
        iterator = iter(loader)
        print(attempt(lambda: next(iterator)), attempt(lambda: next(iterator)))
        print(attempt(lambda: _cnnrs.read_idx(root + "/large", False)))
        # Nothing is said of a file that the process has no memory for.
        print(attempt(lambda: cnnrs.check(root + "/images", verbose=False, num_workers=1)))
    """
    assert run(code, root) == ["MemoryError", "list", "MemoryError", "OSError"]
