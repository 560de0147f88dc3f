"""Threads, processes and signals around a `DataLoader`."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from PIL import Image
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import datasets, transforms

from cnnrs.data.folder import ImageFolder, ImageList
from cnnrs.data.loader import DataLoader

TUTORIAL = transforms.Compose(
    [
        transforms.Resize((32, 32)),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)
Check = Callable[..., None]
pytestmark = pytest.mark.filterwarnings("ignore:cnnrs.DataLoader.* in Python")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_threads_end_with_the_iterator(folder: Path) -> None:
    # In a process of its own: other tests' iterators may still be on their way out.
    code = """
        import sys, time
        from pathlib import Path
        import torch
        from torchvision import transforms
        from cnnrs.data.folder import ImageFolder
        from cnnrs.data.loader import DataLoader

        def name(task):
            try:
                return (task / "comm").read_text()
            except OSError:
                return "gone meanwhile"

        def threads():
            return sum(name(task).startswith("cnnrs-") for task in Path("/proc/self/task").iterdir())

        def settles(expected):
            # A thread has its name only once it runs: a look in between sees fewer than there are.
            deadline = time.monotonic() + 10
            seen = []
            while seen[-3:] != [expected] * 3 and time.monotonic() < deadline:
                time.sleep(0.02)
                seen.append(threads())
            return seen[-1] == expected

        transform = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
        dataset = ImageFolder(sys.argv[1], transform)
        loader = DataLoader(dataset, 2, num_workers=5)
        iterator = iter(loader)
        print(threads(), "before somebody asks")
        next(iterator)
        print(settles(5), "at work")
        del iterator
        print(settles(0), "iterator dropped")
        for _ in loader:
            break
        print(settles(0), "loop left")
        iterator = iter(loader)
        list(iterator)
        print(settles(0), "epoch over, iterator kept")
        dataset.samples[3] = ("/nowhere.jpg", 0)
        try:
            list(loader)
        except FileNotFoundError:
            pass
        print(settles(0), "after an error")
    """
    assert run(code, str(folder)).splitlines() == [
        "0 before somebody asks",
        "True at work",
        "True iterator dropped",
        "True loop left",
        "True epoch over, iterator kept",
        "True after an error",
    ]


def test_two_iterators_at_once(folder: Path, assert_equal: Check) -> None:
    loader = DataLoader(ImageFolder(folder, TUTORIAL), 4, num_workers=2)
    pairs = list(zip(loader, loader, strict=True))
    expected = list(TorchDataLoader(datasets.ImageFolder(folder, TUTORIAL), 4))
    assert_equal([a for a, _ in pairs], expected)
    assert_equal([b for _, b in pairs], expected)


def test_the_loader_pickles(folder: Path, assert_equal: Check) -> None:
    loader = DataLoader(ImageFolder(folder, TUTORIAL), 4, shuffle=True, num_workers=2)
    list(loader)
    again = pickle.loads(pickle.dumps(loader))
    torch.manual_seed(3)
    expected = list(loader)
    torch.manual_seed(3)
    assert_equal(list(again), expected)


def run(code: str, *arguments: str, timeout: float = 120) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_after_a_fork(folder: Path) -> None:
    # An iterator in mid-epoch, a new one, and a loader whose tensors are held: all usable in the child.
    code = """
        import os, sys, warnings
        import torch
        from torchvision import transforms
        from cnnrs.data.folder import ImageFolder
        from cnnrs.data.loader import DataLoader
        torch.set_num_threads(1)
        transform = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
        dataset = ImageFolder(sys.argv[1], transform)
        loader = DataLoader(dataset, 4, num_workers=3)
        expected = [images.clone() for images, _ in loader]
        iterator = iter(loader)
        held = next(iterator)[0]
        child = os.fork()
        rest = [images for images, _ in iterator]
        whole = [images for images, _ in loader]
        good = len(rest) == 6 and len(whole) == 7
        good = good and all(map(torch.equal, [held, *rest], expected)) and all(map(torch.equal, whole, expected))
        if child == 0:
            os._exit(0 if good else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(good, status)
    """
    assert run(code, str(folder)) == "True 0\n"


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_inside_torchs_worker_processes(folder: Path, tmp_path: Path, context: str) -> None:
    code = """
        import sys
        import torch
        from torch.utils.data import DataLoader as TorchDataLoader, Dataset
        from torchvision import transforms
        from cnnrs.data.folder import ImageFolder
        from cnnrs.data.loader import DataLoader

        class Nested(Dataset):
            def __init__(self, root):
                transform = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
                self.loader = DataLoader(ImageFolder(root, transform), 26, num_workers=2)
                next(iter(self.loader))
            def __len__(self):
                return 4
            def __getitem__(self, index):
                return next(iter(self.loader))[0]

        if __name__ == "__main__":
            nested = Nested(sys.argv[1])
            for images in TorchDataLoader(nested, 1, num_workers=2, multiprocessing_context=sys.argv[2]):
                assert torch.equal(images[0], nested[0])
            print("done")
    """
    # A file: spawned processes import it, which they cannot do with the text behind -c.
    script = tmp_path / "nested.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script), str(folder), context], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_ctrl_c_stops_the_wait_and_leaves_no_thread(tmp_path: Path) -> None:
    # Photos that take seconds per batch; the signal arrives in the middle of one.
    (tmp_path / "class").mkdir()
    picture(1300, 1700, 0).save(tmp_path / "class" / "0.jpg", quality=95)
    for i in range(1, 400):
        os.link(tmp_path / "class" / "0.jpg", tmp_path / "class" / f"{i}.jpg")
    code = """
        import os, signal, sys, threading, time
        from pathlib import Path
        import torch
        from torchvision import transforms
        from cnnrs.data.folder import ImageFolder
        from cnnrs.data.loader import DataLoader

        def threads():
            found = 0
            for task in Path("/proc/self/task").iterdir():
                try:
                    found += (task / "comm").read_text().startswith("cnnrs-")
                except OSError:
                    pass
            return found

        transform = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
        dataset = ImageFolder(sys.argv[1], transform)
        for num_workers in (2, 0):
            late = []
            for _ in range(3):
                iterator = iter(DataLoader(dataset, 400, num_workers=num_workers))
                sent = []
                def interrupt():
                    sent.append(time.monotonic())
                    os.kill(os.getpid(), signal.SIGINT)
                threading.Timer(0.3, interrupt).start()
                try:
                    next(iterator)
                except KeyboardInterrupt:
                    late.append(time.monotonic() - sent[0])
                del iterator
                deadline = time.monotonic() + 10
                while threads() and time.monotonic() < deadline:
                    time.sleep(0.002)
            # A slice of the wait (50 ms), or without threads the photo it is at (about 30 ms); a batch takes 5 s. The
            # promise is 100 ms; the best of three, because other programs run as well.
            print(len(late), min(late) < 0.1 or late, threads())
    """
    assert run(code, str(tmp_path)) == "3 True 0\n3 True 0\n"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat(folder: Path, tmp_path: Path) -> None:
    code = """
        import sys
        from torchvision import transforms
        from cnnrs.data.folder import ImageFolder
        from cnnrs.data.loader import DataLoader

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096

        transform = transforms.Compose(
            [transforms.Resize((64, 64)), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )
        dataset = ImageFolder(sys.argv[1], transform)
        # A file that fails leaves nothing behind either.
        open(dataset.samples[4][0], "w").close()
        loaders = [
            DataLoader(dataset, 4, shuffle=True, num_workers=2, on_error="skip"),
            DataLoader(dataset, 4, shuffle=True, num_workers=2, on_error="skip", cache=sys.argv[2]),
            DataLoader(dataset, 4, shuffle=True, num_workers=2, on_error="skip", cache="ram"),
        ]
        after = []
        for i in range(100):
            for loader in loaders:
                for _ in loader:
                    pass
            if i in (9, 99):
                after.append(resident())
        # 300 epochs; a leak of one batch (200 KB) each would be 53 MB.
        print((after[1] - after[0]) >> 20)
    """
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    assert int(run(code, str(root), str(tmp_path / "cache"))) < 8


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_peak_is_the_batches_in_flight(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    picture(60, 60, 0).save(tmp_path / "class" / "0.png")
    for i in range(1, 640):
        os.link(tmp_path / "class" / "0.png", tmp_path / "class" / f"{i}.png")
    code = """
        import re, sys
        import torch
        from torchvision import transforms
        from cnnrs.data.folder import ImageFolder
        from cnnrs.data.loader import DataLoader

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

        dataset = ImageFolder(sys.argv[1], transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()]))
        list(DataLoader(dataset, 1, sampler=[0]))
        before = peak()
        for images, _ in DataLoader(dataset, 32, num_workers=2, prefetch_factor=2):
            pass
        batch = 32 * 3 * 224 * 224 * 4
        print((peak() - before) / batch)
    """
    # prefetch_factor + 1 in flight and the one that the consumer holds, and the threads' images.
    assert float(run(code, str(tmp_path))) < 2 + 1 + 1 + 1


def test_several_loaders_at_once(folder: Path, assert_equal: Check) -> None:
    dataset = ImageFolder(folder, TUTORIAL)
    expected = list(DataLoader(dataset, 4, num_workers=0))
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        found[i] = [batch for _ in range(3) for batch in DataLoader(dataset, 4, num_workers=2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert_equal(found[i], expected * 3)


def test_other_python_threads_run_during_the_wait(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    for i in range(8):
        picture(900, 1200, i).save(tmp_path / "class" / f"{i}.jpg")
    loader = DataLoader(ImageFolder(tmp_path, TUTORIAL), 8, num_workers=1)
    ticks = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.002)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    next(iter(loader))
    end = time.monotonic()
    stop.set()
    thread.join()
    during = [t for t in ticks if begin < t < end]
    # The batch takes tens of milliseconds; without the GIL the ticker has a turn every 2 ms.
    assert len(during) >= (end - begin) / 0.02


def test_a_signal_handler_of_the_user_still_runs(folder: Path) -> None:
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        iterator = iter(DataLoader(ImageFolder(folder, TUTORIAL), 26, num_workers=1))
        os.kill(os.getpid(), signal.SIGUSR1)
        next(iterator)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [1]


@pytest.mark.parametrize("options", [{}, {"num_workers": 0}, {"num_workers": 2}, {"on_error": "skip"}], ids=str)
def test_one_iterator_for_several_threads(options: dict[str, Any], tmp_path: Path) -> None:
    """Every batch goes to one of them, and images keep their labels."""
    samples = []
    for i in range(200):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (9, 9), (i, i, i)).save(path)
        samples.append((str(path), i))
    dataset = ImageList(samples, transforms.PILToTensor())
    for batch_size in (1, 3):
        iterator = iter(DataLoader(dataset, batch_size, shuffle=True, **options))
        found: list[tuple[int, int]] = []
        threads = [threading.Thread(target=_collect, args=(iterator, found)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [(i, i) for i in range(200)]


def _collect(iterator: Any, found: list[tuple[int, int]]) -> None:
    for images, labels in iterator:
        found += zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)
