"""`cnnrs check --fix`: only files that were read and found broken are moved, and none is ever deleted."""

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from cnnrs import _cnnrs, check
from cnnrs.app.cli import main
from fruit import fruit


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("how", ["move", "delete"])
def test_what_is_moved_can_be_put_back(how: str, bad_fruit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(bad_fruit)
    assert main(["check", str(bad_fruit), "--fix", how]) == 0
    undo = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  undo: "))
    assert len(contents(bad_fruit)) == 6
    assert contents(bad_fruit).items() <= before.items()
    subprocess.run(undo.removeprefix("  undo: "), shell=True, check=True)
    assert contents(bad_fruit) == before


@contextmanager
def file_handles(free: int) -> Iterator[None]:
    """Inside, the process may open so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    # Lower numbers that are free would count as well.
    fill = [os.dup(0)]
    while fill[-1] < used:
        fill.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (fill[-1] + 1 + free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in fill:
            os.close(handle)


@pytest.mark.parametrize("free", [1, 2, 3, 6])
def test_too_few_file_handles(free: int, bad_fruit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The process's own trouble says nothing about a photo."""
    for i in range(60):
        shutil.copy(bad_fruit / "berry" / "00.jpg", bad_fruit / "berry" / f"more{i}.jpg")
    good = {name: data for name, data in contents(bad_fruit).items() if name not in ("plum/00.jpg", "plum/01.jpg")}
    Image.init()
    with file_handles(free):
        code = main(["check", str(bad_fruit), "--fix", "delete", "--threads", "64"])
    printed = capsys.readouterr()
    assert good.items() <= contents(bad_fruit).items()
    if code == 2:
        assert "file handles" in printed.err or "Too many open files" in printed.err
        assert len(contents(bad_fruit)) == len(good) + 2


def test_folders_are_not_empty_for_want_of_file_handles(bad_fruit: Path) -> None:
    folders = [str(bad_fruit / name) for name in ("berry", "plum")]
    with file_handles(0), pytest.raises(OSError, match="Too many open files") as caught:
        _cnnrs.scan_folders(folders, [0, 1])
    assert caught.value.errno == errno.EMFILE and caught.value.filename in folders


def fault(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("again", [False, True])
def test_one_fault_of_the_disk_stops_it(
    number: int, again: bool, bad_fruit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the first reading or in the second: nothing is moved."""
    before = contents(bad_fruit.parent)
    real, calls = _cnnrs.check_files, [0]

    def failing(paths: list[str], *rest: object) -> list[tuple[object, ...]]:
        calls[0] += 1
        found = real(paths, *rest)  # type: ignore[arg-type]
        if calls[0] == 1 + again:
            found[0] = (None, 0, 0, 0, 0, fault(number, str(paths[0])), "unreadable")
        return found  # type: ignore[return-value]

    monkeypatch.setattr(_cnnrs, "check_files", failing)
    assert main(["check", str(bad_fruit), "--fix", "delete"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("cnnrs check: ")
    assert "nothing was moved" in message or "file handles" in message
    assert contents(bad_fruit.parent) == before


def test_pillow_without_file_handles(
    bad_fruit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A photo that only Pillow decodes, when Pillow cannot open anything."""
    Image.effect_noise((20, 20), 90).save(bad_fruit / "berry" / "rare.jpg", format="JPEG2000")
    before = contents(bad_fruit.parent)

    def failing(*_: object, **__: object) -> None:
        raise fault(errno.EMFILE, "rare.jpg")

    monkeypatch.setattr(Image, "open", failing)
    assert main(["check", str(bad_fruit), "--fix", "delete"]) == 2
    assert "file handles" in capsys.readouterr().err
    assert contents(bad_fruit.parent) == before


def test_a_link_that_leads_nowhere_is_not_broken(bad_fruit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bad_fruit / "berry" / "away.jpg").symlink_to("/nowhere/at all.jpg")
    assert main(["check", str(bad_fruit), "--fix", "delete"]) == 2
    message = capsys.readouterr().err
    assert "nothing was moved" in message and "away.jpg" in message
    assert (bad_fruit / "plum" / "00.jpg").exists()


def test_large_is_not_broken(bad_fruit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.effect_noise((30, 30), 90).save(bad_fruit / "berry" / "large.jpg", format="JPEG2000")
    assert main(["check", str(bad_fruit), "--fix", "delete"]) == 1
    assert (bad_fruit / "berry" / "large.jpg").exists() and not (bad_fruit / "plum" / "00.jpg").exists()


def test_names_do_not_decide(tmp_path: Path) -> None:
    """Folders and contents that say "truncated" are not truncated files."""
    root = fruit(tmp_path / "truncated" / "ends early", 2)
    (root / "plum" / "text.jpg").write_bytes(b"truncated")
    photo = (root / "plum" / "00.jpg").read_bytes()
    (root / "plum" / "cut.jpg").write_bytes(photo[: len(photo) // 2])
    report = check(root)
    assert [Path(path).name for path, _ in report.corrupt] == ["text.jpg"]
    assert [Path(path).name for path, _ in report.truncated] == ["cut.jpg"]


def test_trash_of_one_class_folder_is_no_class(bad_fruit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(bad_fruit / "plum"), "--fix", "delete", "--json"]) == 0
    fixed = json.loads(capsys.readouterr().out)["fixed"]
    assert [Path(one["to"]) for one in fixed] == [
        bad_fruit.with_name("fruit.cnnrs-trash") / "plum" / name for name in ("00.jpg", "01.jpg")
    ]
    assert sorted(path.name for path in bad_fruit.iterdir()) == ["berry", "plum"]
