"""Processes that need not wait for torch: one that has imported it all forks for every program."""

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
_COMMANDS = ("bench", "check", "features", "info", "predict", "summary", "train")
_CONTEXT.set_forkserver_preload(["torch", "torchvision", *(f"cnnrs.app.cli.{name}" for name in _COMMANDS)])


def _run(program: str, arguments: list[str], files: list[str], folder: str, environment: dict[str, str]) -> None:
    for descriptor, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


class Fork:
    """A module or a script that runs; for what does not depend on how the interpreter starts.

    Args:
        program: name of the module or path of the script.
        arguments: its own.
        environment: variables beside those of this process.
    """

    def __init__(self, program: str, *arguments: str, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [os.path.join(self._folder.name, name) for name in ("stdout", "stderr")]
        for name in self._files:
            Path(name).touch()
        self.args = [program, *arguments]
        variables = {**os.environ, **environment}
        self._process = _CONTEXT.Process(
            target=_run, args=(program, list(arguments), self._files, os.getcwd(), variables)
        )
        self._process.start()

    def wait(self, timeout: float = 120, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
        """What `subprocess.run` returns."""
        with self._folder:
            self._process.join(timeout)
            if self._process.exitcode is None:
                self._process.kill()
                self._process.join()
                raise subprocess.TimeoutExpired(self.args, timeout)
            out, err = (Path(name).read_text(encoding=encoding) for name in self._files)
            return subprocess.CompletedProcess(self.args, self._process.exitcode, out, err)


def forked(*arguments: str, timeout: float = 120, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """`python -m cnnrs` with these arguments."""
    return Fork("cnnrs", *arguments).wait(timeout, encoding)
