"""Formats that Pillow reads only where something is installed beside it, or where it is new enough."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec


@dataclass(frozen=True)
class Plugin:
    """What reads the files of some format.

    Attributes:
        name: of the format.
        endings: of such files, in lower case, with their dot.
        brands: how their contents begin, behind ``ftyp``.
        install: the line that installs it.
    """

    name: str
    endings: tuple[str, ...]
    brands: tuple[bytes, ...]
    install: str

    @property
    def is_there(self) -> bool:
        """Whether such files can be read in this environment."""
        if self is HEIF:
            return find_spec("pillow_heif") is not None
        from PIL import features

        # An older Pillow does not know the name.
        return "avif" in features.modules and bool(features.check("avif"))


#: Photos of an iPhone.
HEIF = Plugin(
    "HEIC", (".heic", ".heif", ".hif"), (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
    "pip install pillow-heif",
)  # fmt: skip
#: Part of Pillow's wheels since 11.3.
AVIF = Plugin("AVIF", (".avif",), (b"avif", b"avis"), 'pip install --upgrade "pillow>=11.3"')
PLUGINS = (HEIF, AVIF)


def installed() -> tuple[str, ...]:
    """The endings of such files that can be read here."""
    return tuple(ending for plugin in PLUGINS if plugin.is_there for ending in plugin.endings)


def by_ending(name: str) -> Plugin | None:
    """What reads files of this name; None where nothing special is needed."""
    ending = os.path.splitext(name)[1].lower()
    return next((plugin for plugin in PLUGINS if ending in plugin.endings), None)


def wanted(path: str) -> Plugin | None:
    """What has to be installed to read a file, by its contents; None where that would not help."""
    try:
        # Somebody would have to write into a pipe.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return None
    return next(
        (plugin for plugin in PLUGINS if head[4:8] == b"ftyp" and head[8:] in plugin.brands and not plugin.is_there),
        None,
    )


def register() -> None:
    """Has Pillow read HEIC where pillow-heif is installed: it does not by itself."""
    if HEIF.is_there:
        _register()


@cache
def _register() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()
