"""What can be seen of a data set in seconds, before hours are spent on it; ``check`` reads everything."""

from __future__ import annotations

import os
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from cnnrs._util.text import shown
from cnnrs.data.copies import copies, in_two_classes
from cnnrs.data.headers import open_header, tiff_kind
from cnnrs.data.report import FEW
from cnnrs.image.reading import Span, span

# Pixels of as many files with more than 8 bits are looked at.
_LOOKED_AT = 32
# Above so many photos of the largest class per photo of the smallest, accuracy says little about the small ones.
_UNEQUAL = 10
_HEAD = 64
_CHUNK = 256


class _Seen(NamedTuple):
    """What a file's first bytes say."""

    depth: str | None = None
    pages: int = 1
    has_alpha: bool = False
    is_cmyk: bool = False
    more_channels: str = ""


def glance(
    samples: Sequence[tuple[str, int]],
    classes: Sequence[str],
    *,
    scale: str = "none",
    page: int = 0,
) -> list[str]:
    """What is wrong with a data set, one line each, the worst first: labels, classes, copies, pixels that are lost.

    The first bytes of every file are read (other headers than JPEG's by Pillow), contents only of files of equal size,
    and the pixels of 32 of the files with more than 8 bits. Files that cannot be read are passed over.

    Args:
        samples: (path, class number) of every photo.
        classes: the names of the classes.
        scale: how samples of more than 8 bits will be read.
        page: which page will be read.

    Returns:
        Warnings; none is good news.

    Example:
        >>> glance([("a.jpg", 0), ("b.jpg", 1)], ["cat", "dog"])
        ['2 classes have fewer than 5 photos (cat 1, dog 1): too few to learn from and to measure with']
    """
    paths = [path for path, _ in samples]
    # Threads for slow disks; one task per file would cost more than the file.
    chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(thread_name_prefix="cnnrs-glance") as pool:
        tiffs: dict[tuple[bytes, ...], _Seen] = {}
        found = pool.map(lambda chunk: [(path, _look(path, tiffs)) for path in chunk], chunks)
        seen = {path: one for chunk in found for path, one in chunk}
    groups = copies(paths)
    return [
        *_twice(groups, samples, classes), *_counts(samples, classes),
        *_deep(seen, scale), *_pages(seen, page), *_channels(seen),
    ]  # fmt: skip


# -- labels and classes ------------------------------------------------------------------------------------------------


def _twice(groups: list[list[str]], samples: Sequence[tuple[str, int]], classes: Sequence[str]) -> Iterable[str]:
    labels = {path: classes[number] for path, number in samples if 0 <= number < len(classes)}
    if wrong := in_two_classes(groups, labels):
        example = _pair(wrong[0], labels)
        yield f"{_photos(len(wrong), 'is', 'are')} in two classes ({example}): one of the labels is wrong"
    if others := [group for group in groups if group not in wrong]:
        more = sum(map(len, others)) - len(others)
        example = " = ".join(map(shown, others[0][:2]))
        yield f"{_photos(more, 'is a copy', 'are copies')} of others, byte for byte ({example})"


def _pair(group: list[str], kinds: dict[str, str]) -> str:
    """Two equal files of different kinds."""
    first = next(path for path in group if path in kinds)
    other = next(path for path in group if kinds.get(path, kinds[first]) != kinds[first])
    return f"{shown(first)} = {shown(other)}"


def _counts(samples: Sequence[tuple[str, int]], classes: Sequence[str]) -> Iterable[str]:
    counted = Counter(number for _, number in samples)
    counts = {name: counted[number] for number, name in enumerate(classes)}
    few = {name: count for name, count in counts.items() if count < FEW}
    if few:
        names = _some([f"{shown(name)} {count}" for name, count in few.items()])
        has = "class has" if len(few) == 1 else "classes have"
        yield f"{len(few)} {has} fewer than {FEW} photos ({names}): too few to learn from and to measure with"
    there = {name: count for name, count in counts.items() if count}
    if there and max(there.values()) >= _UNEQUAL * min(there.values()):
        most, least = max(there, key=there.__getitem__), min(there, key=there.__getitem__)
        yield (
            f"classes are unequal: {shown(most)} has {there[most]:,} photos, {shown(least)} {there[least]:,}; look at "
            "the accuracy of each class, not only at that of all photos"
        )


# -- pixels ------------------------------------------------------------------------------------------------------------


def _deep(seen: dict[str, _Seen], scale: str) -> Iterable[str]:
    if scale == "percentile":
        return
    deep: dict[str, list[str]] = {}
    for path, one in seen.items():
        if one.depth is not None:
            deep.setdefault(one.depth, []).append(path)
    for kind, paths in deep.items():
        looked = {path: found for path in _spread(paths) if (found := _span(path)) is not None}
        lost = {path: found for path, found in looked.items() if found.loss(scale)}
        if not lost:
            continue
        example = next(iter(lost))
        loss = lost[example].loss(scale)
        of = f"{len(lost)} of the {len(looked)} that were looked at" if len(looked) < len(paths) else f"{len(lost)}"
        yield (
            f"{_photos(len(paths), 'has', 'have')} more than 8 bits ({kind}), and {of} would be {loss} "
            f'({shown(example)}: {lost[example]}); --scale percentile (scale="percentile") keeps their values'
        )


def _pages(seen: dict[str, _Seen], page: int) -> Iterable[str]:
    several = {path: one.pages for path, one in seen.items() if one.pages > 1}
    short = {path: count for path, count in several.items() if count <= page}
    if short:
        example = next(iter(short))
        yield (
            f"{_photos(len(short), 'has', 'have')} several pages, but no page {page}, and cannot be read "
            f"({shown(example)} has 0 to {short[example] - 1})"
        )
    if several and not page:
        example = next(iter(several))
        yield (
            f"{_photos(len(several), 'has', 'have')} several pages ({shown(example)} has {several[example]}): the "
            "first is taken; --page 1 (page=1) takes the next"
        )


def _channels(seen: dict[str, _Seen]) -> Iterable[str]:
    layered = [path for path, one in seen.items() if one.has_alpha]
    # That of a screenshot hides nothing.
    clear = next(filter(_is_clear, _spread(layered)), None)
    if clear is not None:
        yield (
            f"{_photos(len(layered), 'has', 'have')} an alpha channel, which is dropped: what it makes transparent is "
            f"seen ({shown(clear)})"
        )
    if more := {path: one.more_channels for path, one in seen.items() if one.more_channels}:
        example = next(iter(more))
        yield f"{_photos(len(more), 'is', 'are')} read as {more[example]} ({shown(example)})"
    if printed := [path for path, one in seen.items() if one.is_cmyk]:
        yield (
            f"{_photos(len(printed), 'is', 'are')} in CMYK, which becomes RGB without a colour profile "
            f"({shown(printed[0])})"
        )


def _look(path: str, tiffs: dict[tuple[bytes, ...], _Seen]) -> _Seen:
    """What a file's first bytes say, of a TIFF those of one like it that was opened before."""
    try:
        # Somebody would have to write into a pipe.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return _Seen()
        with open(path, "rb") as file:
            head = file.read(_HEAD).ljust(_HEAD, b"\0")
            file.seek(0)
            kind = tiff_kind(file)
    except (OSError, struct.error):
        # Whatever is wrong with it, the loader says it.
        return _Seen()
    if kind in tiffs:
        return tiffs[kind]
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[37:41] != b"acTL":
        bits, color = head[24], head[25]
        return _Seen(None if bits < 16 else "16-bit colour" if color else "16-bit gray", has_alpha=color in (4, 6))
    moves = head[12:16] == b"VP8X" and head[20] & 2
    if head[8:12] == b"WEBP" and not moves:
        flags = {b"VP8X": head[20], b"VP8L": head[24]}.get(head[12:16], 0)
        return _Seen(has_alpha=bool(flags & 16))
    if not head.startswith((b"II", b"MM", b"GIF8", b"\x89PNG", b"RIFF", b"P5", b"P6")):
        return _Seen()
    try:
        header = open_header(path, exif=False)
    except Exception:
        # As above.
        return _Seen()
    more = header.unusual if header.mode == "RGB" else ""
    seen = _Seen(header.depth, header.pages, header.mode in ("RGBA", "LA", "PA"), header.mode == "CMYK", more)
    if kind is not None:
        tiffs[kind] = seen
    return seen


def _spread(paths: list[str]) -> list[str]:
    """Some of many, from all over."""
    return paths[:: -(-len(paths) // _LOOKED_AT) or 1]


def _span(path: str) -> Span | None:
    try:
        return span(path)
    except Exception:
        # As above.
        return None


def _is_clear(path: str) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            least, _ = image.convert("RGBA").getchannel("A").getextrema()
            return isinstance(least, int) and least < 255
    except Exception:
        # As above.
        return False


# -- words -------------------------------------------------------------------------------------------------------------


def _photos(count: int, one: str, several: str) -> str:
    return f"1 photo {one}" if count == 1 else f"{count:,} photos {several}"


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
