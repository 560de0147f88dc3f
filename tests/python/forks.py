"""`python -m cnnrs` without waiting for torch: a process that has imported it all forks for every command."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torchvision", "cnnrs.cli"])


def _run(arguments: list[str], files: list[str], folder: str, environment: dict[str, str]) -> None:
    for descriptor, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["cnnrs", *arguments]
    runpy.run_module("cnnrs", run_name="__main__", alter_sys=True)


def forked(*arguments: str, timeout: float = 120, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` returns; for what does not depend on how the interpreter starts."""
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        for name in files:
            Path(name).touch()
        process = _CONTEXT.Process(target=_run, args=(list(arguments), files, os.getcwd(), dict(os.environ)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["cnnrs", *arguments], timeout)
        out, err = (Path(name).read_text(encoding=encoding) for name in files)
        return subprocess.CompletedProcess(["cnnrs", *arguments], process.exitcode, out, err)
