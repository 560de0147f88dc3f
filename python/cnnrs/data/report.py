"""What ``check`` found, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from cnnrs._util.text import shown
from cnnrs.data.photos import LeftOut
from cnnrs.image.reading import Span

# How many entries of a list ``repr`` shows.
SHOWN = 3
#: A class of fewer photos has too few to learn from and to measure with.
FEW = 5


@dataclass
class Report:
    """What ``check`` found: plain lists of paths, in the order of the scan.

    Attributes:
        root: the folder.
        files: how many image files there are.
        classes: class folder -> number of images; {} in a flat folder.
        left_out: files that are no samples, counted by ending, with the reason and one example.
        corrupt: (path, reason) of files that are no image, are damaged, or are over the limits.
        truncated: (path, reason) of files that end too early; ``truncated="accept"`` reads them.
        unreadable: (path, reason) of files and folders that vanished, may not be read, or that the disk does not give,
            and of pipes, sockets and devices.
        wrong_extension: (path, format) of files whose name promises another format; they load all the same.
        modes: Pillow's mode -> number of images.
        unusual_modes: (path, mode) of images that are neither RGB nor gray (L); they are converted to RGB, alpha and
            further channels are dropped.
        deep: (path, kind, lowest, highest value) of 16-bit, 32-bit and float images whose values are lost when they are
            read as they come: what is above 255 is white; ``scale="percentile"`` keeps them. Of 16-bit colours, those
            that are nearly black.
        pages: (path, number of pages) of files with several; the first is taken, unless ``page`` says otherwise.
        sizes: (width, height) -> number of images.
        rotated: (path, orientation) of images with an EXIF orientation other than 1; torchvision does not turn them.
        duplicates: lists of files with equal contents.
        in_two_classes: those of ``duplicates`` that lie in folders of different classes.
        empty_classes: class folders without an image.
        hidden: folders and files that begin with a dot; what is in them is no sample.
        slow: files that only Pillow can decode; they load, one at a time.
    """

    root: str
    files: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    truncated: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    wrong_extension: list[tuple[str, str]] = field(default_factory=list)
    modes: dict[str, int] = field(default_factory=dict)
    unusual_modes: list[tuple[str, str]] = field(default_factory=list)
    deep: list[tuple[str, str, float, float]] = field(default_factory=list)
    pages: list[tuple[str, int]] = field(default_factory=list)
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    rotated: list[tuple[str, int]] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    in_two_classes: list[list[str]] = field(default_factory=list)
    empty_classes: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every file loads."""
        return not (self.corrupt or self.truncated or self.unreadable)

    @property
    def imbalance(self) -> float:
        """Images of the largest class per image of the smallest that has any; 1.0 for equal classes."""
        counts = [count for count in self.classes.values() if count]
        return max(counts) / min(counts) if counts else 1.0

    @property
    def small_classes(self) -> dict[str, int]:
        """Classes with fewer than 5 images, but not without any, and how many they have."""
        return {name: count for name, count in self.classes.items() if 0 < count < FEW}

    def __repr__(self) -> str:
        return self.text()

    def text(self, most: int = SHOWN) -> str:
        """The report as ``print`` shows it, with at most ``most`` findings of each kind."""
        bad = len(self.corrupt) + len(self.truncated) + len(self.unreadable)
        lines = [
            f"{shown(self.root)}: {self.files:,} images, {f'{bad:,} cannot be loaded' if bad else 'all can be loaded'}"
        ]
        if self.classes:
            counts = ", ".join(f"{shown(name)} {count:,}" for name, count in list(self.classes.items())[:8])
            more = f" and {len(self.classes) - 8} more" if len(self.classes) > 8 else ""
            lines.append(f"  classes: {counts}{more} (largest : smallest = {self.imbalance:.1f})")
        if self.sizes:
            areas = sorted(self.sizes, key=lambda size: size[0] * size[1])
            (w, h), (wide, high) = areas[0], areas[-1]
            lines.append(f"  sizes: {len(areas):,} different, {w} x {h} to {wide} x {high}")
        if self.modes:
            lines.append("  modes: " + ", ".join(f"{mode} {count:,}" for mode, count in self.modes.items()))
        spans = [(path, Span(kind, low, high)) for path, kind, low, high in self.deep]
        for name, found in (
            ("corrupt", [reason for _, reason in self.corrupt]),
            ("truncated", [reason for _, reason in self.truncated]),
            ("unreadable", [reason for _, reason in self.unreadable]),
            ("wrong extension", [f"{path} is {kind}" for path, kind in self.wrong_extension]),
            ("unusual modes", [f"{path} is {mode}" for path, mode in self.unusual_modes]),
            ("lost without --scale percentile", [f"{path} is {span}, {span.loss()}" for path, span in spans]),
            ("several pages", [f"{path} has {count}, the first is taken" for path, count in self.pages]),
            ("rotated by EXIF", [f"{path} ({orientation})" for path, orientation in self.rotated]),
            ("duplicates", [" = ".join(paths) for paths in self.duplicates]),
            ("the same photo in two classes", [" = ".join(paths) for paths in self.in_two_classes]),
            ("empty classes", self.empty_classes),
            (f"classes of fewer than {FEW}", [f"{name} has {count}" for name, count in self.small_classes.items()]),
            ("hidden", self.hidden),
            ("decoded by Pillow only", self.slow),
            ("left out", [str(one) for one in self.left_out]),
        ):
            if found:
                more = f"; {len(found) - most:,} more" if len(found) > most else ""
                lines.append(f"  {name} ({len(found):,}): {'; '.join(map(shown, found[:most]))}{more}")
        return "\n".join(lines)
