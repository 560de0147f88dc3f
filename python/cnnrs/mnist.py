"""MNIST from its four IDX files: torchvision's `MNIST`, read in one step and usable without PIL."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.dlpack import from_dlpack

from cnnrs import _cnnrs
from cnnrs.folder import VisionDataset

FILES = tuple(f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))


class MNIST(VisionDataset):
    """The MNIST digits.

    A sample is (image, digit): a 28x28 PIL image in mode L, or what `transform` makes of it, and an int. A
    `cnnrs.DataLoader` does not go through PIL for `ToTensor` and `Normalize` and returns the same numbers.

    Args:
        root: The folder with the IDX files, raw or `.gz`; they may also be in `root/MNIST/raw`, where torchvision
            puts them.
        train: The 60,000 training digits, or the 10,000 test digits.
        transform: Called with the PIL image.
        target_transform: Called with the digit.
        download: Whether to download files that are missing (to `root/MNIST/raw`, checksums verified).

    Attributes:
        data: (N, 28, 28) uint8 tensor, 0..255.
        targets: (N,) int64 tensor, 0..9.
        classes: "0 - zero" .. "9 - nine".

    Raises:
        FileNotFoundError: When a file is missing; names all four files and the folders.
        cnnrs.DecodeError: When a file is not a complete IDX file.
        ConnectionError: When `download=True` reaches no mirror.

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
        """The split, for `repr`."""
        return f"Split: {'Train' if self.train is True else 'Test'}"

    def download(self) -> None:
        """Downloads the files that are missing, from torchvision's mirrors, and checks their MD5 sums.

        Raises:
            ConnectionError: When no mirror answers with the right file; says what each of them did.
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
            _fetch(url, os.path.join(folder, filename), md5)
        except (OSError, ValueError) as error:
            failures.append(f"{url}: {error}")
        else:
            return
    raise ConnectionError(
        f"cannot download {filename}: {'; '.join(failures)}. Without network, put the file into {folder} yourself."
    )


def _fetch(url: str, path: str, md5: str) -> None:
    from tqdm.auto import tqdm

    digest = hashlib.md5(usedforsecurity=False)
    # Under another name until the sum is right: an interrupted download must not look like a file.
    part = f"{path}.{os.getpid()}.part"
    request = urllib.request.Request(url, headers={"User-Agent": "cnnrs"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response, open(part, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=os.path.basename(path), disable=None) as bar:
                while block := response.read(1 << 16):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
        if digest.hexdigest() != md5:
            raise ValueError(f"the MD5 sum is {digest.hexdigest()}, expected {md5}")
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
