"""A folder of class folders as a data set: torchvision's ``ImageFolder``, scanned by threads."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cnnrs.data.image_list import ImageList, VisionDataset
from cnnrs.data.scan import IMG_EXTENSIONS, choose_classes, find_classes, make_dataset, scan
from cnnrs.image.reading import Reader


class ImageFolder(ImageList):
    """Images in one folder per class: ``root/dog/xxx.png``, ``root/cat/nsdf3.png``, also in folders below those.

    A sample is (image, class number): a PIL image in mode RGB, or what ``transform`` makes of it, and an int. All
    attributes, the order of the samples and the errors are those of ``torchvision.datasets.ImageFolder``; a
    ``cnnrs.DataLoader`` reads the files itself, in threads, and returns the same numbers.

    Args:
        root: the folder that holds the class folders.
        transform: called with the PIL image (torchvision's transforms, v1 or v2, or any function).
        target_transform: called with the class number.
        loader: called with the path instead of opening it as a PIL image in mode RGB.
        is_valid_file: called with a path, decides whether it is a sample, instead of the extension.
        allow_empty: whether a class folder may have no sample.
        classes: only these class folders, numbered in this order; all of them, sorted, without it.
        skip_hidden: whether folders and files are left out whose names begin with a dot (``.ipynb_checkpoints``, the
            ``._photo.jpg`` of a Mac). Without it they count, as in torchvision; hidden class folders are warned about.
        extensions: the endings of files that are samples, in lower case; None: torchvision's.
            ``cnnrs.photo_extensions()`` has those that the command line takes: GIF, JFIF, and AVIF and HEIC where they
            can be read here.
        scale: how samples of more than 8 bits (16-bit gray, floats) become 0 to 255. "none", as Pillow and torchvision
            do it: what is above 255 is white, fractions are cut off. "full": 0 to the largest value of the type is
            black to white (65,535; 4,095 for 12 bits; 1.0 for floats). "percentile": the 0.5th to the 99.5th percentile
            of each image. Files of 8 bits are as they are.
        page: which page is taken of files that have several (TIFF, GIF, WebP, animated PNG), from 0 on. Of JPEGs, and
            of files that have one page, this is taken.

    A link to a folder that it lies in is not followed, with a warning: torchvision lists the same files 40 times over,
    and with two such links in one folder does not come to an end.

    Attributes:
        classes: the sorted class names.
        class_to_idx: class name -> class number.
        samples: (path, class number) of every sample; ``imgs`` is the same list.
        targets: the class number of every sample.

    Raises:
        FileNotFoundError: ``root`` does not exist, has no class folder, or a class folder has no image.

    Example:
        >>> dataset = ImageFolder("cat_and_dog/train", transform)  # doctest: +SKIP
        >>> train, valid = dataset.split(0.2, transforms=(train_transform, valid_transform))  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
        loader: Callable[[str], Any] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        allow_empty: bool = False,
        *,
        classes: Sequence[str] | None = None,
        skip_hidden: bool = False,
        extensions: Iterable[str] | None = None,
        scale: str = "none",
        page: int = 0,
    ) -> None:
        VisionDataset.__init__(self, root, transform, target_transform)
        self.skip_hidden = skip_hidden
        if classes is None:
            found, class_to_idx = self.find_classes(self.root)
        else:
            found, class_to_idx = choose_classes(self.root, classes)
        endings = _endings(extensions, is_valid_file)
        samples = self.make_dataset(
            self.root,
            class_to_idx=class_to_idx,
            extensions=endings,
            is_valid_file=is_valid_file,
            allow_empty=allow_empty,
            # A subclass that has torchvision's signature goes on working.
            **({"skip_hidden": True} if skip_hidden else {}),
        )
        self.classes = found
        self.class_to_idx = class_to_idx
        self._keep(samples, loader, Reader(scale, page))
        self.extensions = endings

    @classmethod
    def flat(
        cls,
        root: str | Path,
        transform: Callable[..., Any] | None = None,
        loader: Callable[[str], Any] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        *,
        skip_hidden: bool = False,
        extensions: Iterable[str] | None = None,
        scale: str = "none",
        page: int = 0,
    ) -> ImageList:
        """The images below ``root`` without classes, label -1: a folder of photos to be classified.

        Raises:
            FileNotFoundError: ``root`` does not exist or has no image below it.
        """
        root = os.path.expanduser(root)
        if not os.path.isdir(root):
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", root)
        endings = _endings(extensions, is_valid_file)
        samples, _ = scan([os.fspath(root)], [-1], endings, skip_hidden)
        if is_valid_file is not None:
            samples = [sample for sample in samples if is_valid_file(sample[0])]
        if not samples:
            known = ", ".join(endings or IMG_EXTENSIONS)
            raise FileNotFoundError(f"Found no valid file in {root}. Supported extensions: {known}")
        images = ImageList(samples, transform, loader=loader, scale=scale, page=page)
        images.root = root
        return images

    @staticmethod
    def make_dataset(
        directory: str | Path,
        class_to_idx: dict[str, int],
        extensions: tuple[str, ...] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        allow_empty: bool = False,
        skip_hidden: bool = False,
    ) -> list[tuple[str, int]]:
        """The samples below ``directory``; override it to find them elsewhere."""
        if class_to_idx is None:
            raise ValueError("The class_to_idx parameter cannot be None.")
        return make_dataset(directory, class_to_idx, extensions, is_valid_file, allow_empty, skip_hidden)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The class names and numbers; override it to use some of the folders only, or other numbers."""
        return find_classes(directory, self.skip_hidden)


def _endings(extensions: Iterable[str] | None, is_valid_file: Callable[[str], bool] | None) -> tuple[str, ...] | None:
    if extensions is None:
        return IMG_EXTENSIONS if is_valid_file is None else None
    if is_valid_file is not None:
        raise ValueError("is_valid_file decides which files are samples: give it, or extensions, not both")
    found = (extensions,) if isinstance(extensions, str) else tuple(extensions)
    return tuple(ending.lower() for ending in found)
