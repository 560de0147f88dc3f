"""Files that are there twice."""

from __future__ import annotations

import filecmp
import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

# Of the beginning and of the end: two photos of one size that share these are read to the end.
_BYTES = 4096
_CHUNK = 256


def copies(paths: Iterable[str]) -> list[list[str]]:
    """Groups of two or more files with equal contents, in the order of the paths.

    Only files of equal size are opened, and only those that begin and end alike are read. Files that cannot be read are
    in no group.

    Example:
        >>> copies(["a.jpg", "b.jpg"])  # there are no such files
        []
    """
    sizes: dict[int, list[str]] = {}
    for path in dict.fromkeys(paths):
        try:
            found = os.stat(path)
        except OSError:
            continue
        # Somebody would have to write into a pipe.
        if stat.S_ISREG(found.st_mode):
            sizes.setdefault(found.st_size, []).append(path)
    suspects = [(size, path) for size, group in sizes.items() if len(group) > 1 for path in group]
    alike: dict[tuple[int, bytes], list[str]] = {}
    # Threads for slow disks; one task per file would cost more than the file.
    chunks = [suspects[i : i + _CHUNK] for i in range(0, len(suspects), _CHUNK)]
    with ThreadPoolExecutor(thread_name_prefix="cnnrs-copies") as pool:
        read = pool.map(lambda chunk: [_ends(*suspect) for suspect in chunk], chunks)
        for (size, path), ends in zip(suspects, (one for chunk in read for one in chunk), strict=True):
            if ends is not None:
                alike.setdefault((size, ends), []).append(path)
    return [group for paths in alike.values() if len(paths) > 1 for group in equal(paths)]


def equal(paths: Sequence[str]) -> list[list[str]]:
    """Groups of two or more files that are equal byte by byte.

    Raises:
        OSError: one of them cannot be read.
    """
    groups: list[list[str]] = []
    for path in paths:
        for group in groups:
            if filecmp.cmp(group[0], path, shallow=False):
                group.append(path)
                break
        else:
            groups.append([path])
    return [group for group in groups if len(group) > 1]


def in_two_classes(groups: Iterable[list[str]], class_of: dict[str, str]) -> list[list[str]]:
    """The groups of equal files that lie in different classes: one of the labels is wrong.

    Args:
        groups: lists of paths.
        class_of: the class of each path that has one.
    """
    return [group for group in groups if len({class_of[path] for path in group if path in class_of}) > 1]


def _ends(size: int, path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            head = file.read(_BYTES)
            file.seek(max(size - _BYTES, 0))
            return head + file.read(_BYTES)
    except OSError:
        return None
