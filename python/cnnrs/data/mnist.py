"""MNIST from its four IDX files: torchvision's ``MNIST``, read in one step and usable without PIL."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.dlpack import from_dlpack

from cnnrs import _cnnrs
from cnnrs.data.image_list import VisionDataset

FILES = tuple(f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
# For a mirror to answer, and between two packets of it.
_SECONDS = 30


class MNIST(VisionDataset):
    """The MNIST digits.

    A sample is (image, digit): a 28x28 PIL image in mode L, or what ``transform`` makes of it, and an int. A
    ``cnnrs.DataLoader`` does not go through PIL for ``ToTensor`` and ``Normalize`` and returns the same numbers.

    Args:
        root: the folder with the IDX files, raw or ``.gz``; they may also be in ``root/MNIST/raw``, where torchvision
            puts them.
        train: the 60,000 training digits, or the 10,000 test digits.
        transform: called with the PIL image.
        target_transform: called with the digit.
        download: whether to download files that are missing (to ``root/MNIST/raw``, checksums verified).

    Attributes:
        data: (N, 28, 28) uint8 tensor, 0..255.
        targets: (N,) int64 tensor, 0..9.
        classes: "0 - zero" .. "9 - nine".

    Raises:
        FileNotFoundError: a file is missing; names all four files and the folders.
        cnnrs.DecodeError: a file is not a complete IDX file.
        ConnectionError: ``download=True`` reaches no mirror.

    Example:
        >>> digits = MNIST("data", train=True, transform=transform)  # doctest: +SKIP
    """

    classes: ClassVar[list[str]] = [
        f"{digit} - {name}"
        for digit, name in enumerate(
            ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        )
    ]

    def __init__(
        self,
        root: str | Path,
        train: bool = True,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(root, transform, target_transform)
        self.train = train
        if download:
            self.download()
        split = "train" if train else "t10k"
        images, labels = self._find(f"{split}-images-idx3-ubyte"), self._find(f"{split}-labels-idx1-ubyte")
        if images is None or labels is None:
            raise FileNotFoundError(
                f"MNIST is not in {self.root}. Looked for {', '.join(FILES)} (each also with .gz) in "
                f"{' and '.join(self._folders())}. Put them there, or use download=True."
            )
        self.data: torch.Tensor = from_dlpack(_cnnrs.read_idx(images, False))
        self.targets: torch.Tensor = from_dlpack(_cnnrs.read_idx(labels, True)).long()
        if len(self.data) != len(self.targets):
            raise ValueError(
                f"{images} holds {len(self.data)} images, {labels} holds {len(self.targets)} labels: "
                "they do not belong together"
            )

    @property
    def raw_folder(self) -> str:
        """Where torchvision keeps the files, and downloads go."""
        return os.path.join(self.root, "MNIST", "raw")

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class name -> digit."""
        return {name: i for i, name in enumerate(self.classes)}

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        from PIL import Image

        image: Any = Image.fromarray(self.data[index].numpy())
        target: Any = int(self.targets[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def __len__(self) -> int:
        return len(self.data)

    def extra_repr(self) -> str:
        """The split, for ``repr``."""
        return f"Split: {'Train' if self.train is True else 'Test'}"

    def download(self) -> None:
        """Downloads the files that are missing, from torchvision's mirrors, and checks their MD5 sums.

        Raises:
            ConnectionError: no mirror answers with the right file; says what each of them did.
        """
        from torchvision.datasets import MNIST as Published

        for filename, md5 in Published.resources:
            if self._find(filename.removesuffix(".gz")) is None:
                os.makedirs(self.raw_folder, exist_ok=True)
                _download([mirror + filename for mirror in Published.mirrors], self.raw_folder, filename, md5)

    def _folders(self) -> list[str]:
        return [self.raw_folder, os.fspath(self.root)]

    def _find(self, name: str) -> str | None:
        candidates = (os.path.join(folder, name + ending) for folder in self._folders() for ending in ("", ".gz"))
        return next((path for path in candidates if os.path.isfile(path)), None)


def _download(urls: list[str], folder: str, filename: str, md5: str) -> None:
    failures = []
    for url in urls:
        try:
            _fetch(url, folder, filename, md5)
        except (OSError, ValueError, RuntimeError, HTTPException) as error:
            failures.append(f"{url}: {error}")
        else:
            return
    raise ConnectionError(
        f"cannot download {filename}: {'; '.join(failures)}. Without network, put the file into {folder} yourself."
    )


def _fetch(url: str, folder: str, filename: str, md5: str) -> None:
    from torchvision.datasets.utils import calculate_md5, download_url

    # Under another name until the sum is right: an interrupted download must not look like a file.
    part = os.path.join(folder, f"{filename}.{os.getpid()}.part")
    if os.path.exists(part):
        # Of a process of that number that was killed: torchvision would take it for the file.
        os.remove(part)
    try:
        with _DOWNLOADS, _timeout(_SECONDS):
            download_url(url, folder, os.path.basename(part))
        if (found := calculate_md5(part)) != md5:
            raise ValueError(f"the MD5 sum is {found}, expected {md5}")
        os.replace(part, os.path.join(folder, filename))
    finally:
        if os.path.exists(part):
            os.remove(part)


# The default timeout is the process's: two threads that change it would leave each other's behind.
_DOWNLOADS = threading.Lock()


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Without it torchvision waits for ever for a mirror that does not answer, and never ask the next."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
