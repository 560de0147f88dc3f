"""``decode="gpu"``: JPEGs become pixels on a CUDA device, and what the device does not decode on the CPU as ever."""

from __future__ import annotations

import io
import os
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from cnnrs import _cnnrs
from cnnrs._util.devices import is_out_of_memory
from cnnrs._util.notes import note_once
from cnnrs._util.regular import opened
from cnnrs.data.mover import Mover
from cnnrs.data.read_options import ReadOptions
from cnnrs.image.on_device import OnDevice

# Decoded at a time, which takes three bytes each: a whole batch of large photos may be more than a device has.
_PIXELS = 1 << 27
# Without max_bytes: as in src/image/decode/limits.rs.
_BYTES = 1 << 30
_END = b"\xff\xd9"
# EXIF's orientations as (whether rows become columns, the dimensions that are flipped afterwards).
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    1: (False, ()), 2: (False, (-1,)), 3: (False, (-2, -1)), 4: (False, (-2,)),
    5: (True, ()), 6: (True, (-1,)), 7: (True, (-2, -1)), 8: (True, (-2,)),
}  # fmt: skip


def check_place(decode: str, device: torch.device | None) -> None:
    """Raises a ``ValueError`` where JPEGs are to be decoded on a device and none is named."""
    if decode == "gpu" and (device is None or device.type != "cuda"):
        raise ValueError(
            f'decode="gpu" needs device="cuda", where photos are decoded and delivered, got device={device}: '
            'name it, or leave decode="exact"'
        )


@dataclass(frozen=True)
class _Photo:
    """A JPEG that a device decodes: its path, (n,) bytes, (height, width), and EXIF's orientation."""

    path: str
    data: torch.Tensor
    size: tuple[int, int]
    orientation: int


def _photo(path: str | os.PathLike[str], read: ReadOptions) -> _Photo | None:
    """None: who decodes it on the CPU knows it, or says what is wrong with it."""
    from PIL.JpegImagePlugin import JpegImageFile

    most_pixels, most_bytes = read.limits
    try:
        with opened(path) as file:
            length = os.fstat(file.fileno()).st_size
            if length > (most_bytes or _BYTES):
                return None
            # Its header only.
            image = JpegImageFile(file)
            scan = file.tell()
            width, height = image.size
            # Others than YCbCr, which NVIDIA's decoder takes all for.
            kind = image.mode, image.bits, [one[0] for one in image.layer], image.info.get("adobe_transform", 1)
            if kind != ("RGB", 8, [1, 2, 3], 1) or (most_pixels and width * height > most_pixels):
                return None
            orientation = image.getexif().get(0x0112, 1)
            data = bytearray(length)
            file.seek(0)
            # One that ends too early becomes an image on the device without a word. Behind a scan's start two such
            # bytes can be nothing else; previews, which have them too, come before it.
            if file.readinto(data) != length or data.rfind(_END) < scan:  # type: ignore[attr-defined]
                return None
    except Exception:
        return None
    bits = torch.frombuffer(data, dtype=torch.uint8)
    return _Photo(os.fspath(path), bits, (height, width), orientation if orientation in _TURNS else 1)


def _note_refused(photo: _Photo, error: RuntimeError) -> None:
    note_once(
        "gpu",
        f'decode="gpu": photos that the device refuses are decoded on the CPU, the first one {photo.path}: {error}',
    )


def _decoded(photos: Sequence[_Photo], device: torch.device) -> list[torch.Tensor | None]:
    """(3, H, W) uint8 images on the device, whose current stream may use them; None for those it refuses."""
    try:
        images = _decode([photo.data for photo in photos], device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        if len(photos) > 1:
            # It does not say which.
            return [image for photo in photos for image in _decoded([photo], device)]
        _note_refused(photos[0], error)
        return [None]
    return [image if image.shape[1:] == photo.size else None for image, photo in zip(images, photos, strict=True)]


def _decode(data: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    # The decoder writes on a stream of its own into memory of this one, without asking whether that is still read. Its
    # own end it waits for.
    torch.cuda.current_stream(device).synchronize()
    images: list[torch.Tensor] = decode_jpeg(data, ImageReadMode.RGB, device)
    return images


def _check_decoder(device: torch.device) -> None:
    """Raises a ``RuntimeError`` where torchvision cannot decode on the device at all."""
    import torchvision
    from PIL import Image

    sound = io.BytesIO()
    Image.new("RGB", (16, 16)).save(sound, "JPEG")
    try:
        _decode([torch.frombuffer(bytearray(sound.getvalue()), dtype=torch.uint8)], device)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeError(
            f'decode="gpu" needs a torchvision that decodes JPEGs on CUDA (nvJPEG). {torchvision.__version__} says: '
            f'{error}. Install the CUDA build that goes with torch {torch.__version__}, or leave decode="exact"'
        ) from error


@dataclass
class _Work:
    """A batch: what is read of each file, the rows so far, and the places whose rows the CPU makes, by ticket."""

    photos: list[Future[_Photo | None]]
    batch: tuple[Sequence[int], Sequence[int], Sequence[Any]]
    rows: list[torch.Tensor | None] = field(default_factory=list)
    waiting: deque[tuple[int, list[int]]] = field(default_factory=deque)
    dropped: set[int] = field(default_factory=set)


class DeviceLoader:
    """Stands in for the extension's loader of the same transform, which makes what the device does not.

    Args:
        inner: that loader; gives bytes.
        steps: of :func:`cnnrs.image.on_device.steps_of`.
        read: how files are read.
        threads: that read files ahead.
        mover: whose device it is. ``poll`` is called on its stream.
    """

    def __init__(
        self, inner: _cnnrs.Loader, steps: Sequence[OnDevice], read: ReadOptions, threads: int, mover: Mover
    ) -> None:
        self._inner, self._steps, self._read, self._mover = inner, steps, read, mover
        self._work: dict[int, _Work] = {}
        self._tickets = 0
        self._turned = False
        self._pool = ThreadPoolExecutor(threads, "cnnrs-read") if threads else None
        if self._pool is not None:
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        with mover.aside():
            _check_decoder(mover.device)

    def submit_files(
        self, indices: Sequence[int], positions: Sequence[int], paths: Sequence[str | os.PathLike[str]]
    ) -> int:
        """As the extension's."""
        self._tickets += 1
        self._work[self._tickets] = _Work([self._begin(path) for path in paths], (indices, positions, paths))
        return self._tickets

    def _begin(self, path: str | os.PathLike[str]) -> Future[_Photo | None]:
        if self._pool is not None:
            return self._pool.submit(_photo, path, self._read)
        done: Future[_Photo | None] = Future()
        done.set_result(_photo(path, self._read))
        return done

    def ready(self, ticket: int) -> bool:
        """Whether all files are read."""
        return all(photo.done() for photo in self._work[ticket].photos)

    def poll(self, ticket: int) -> tuple[str, Any]:
        """("batch", (N, C, H, W) uint8 on the device, without what was dropped), or "failed" as the extension's."""
        work = self._work[ticket]
        if not work.rows:
            self._decode(work)
        while work.waiting:
            number, places = work.waiting[0]
            kind, value = self._inner.poll(number)
            if kind == "failed":
                return kind, [(places[i], error) for i, error in value]
            # Of one size as one tensor, in which what was dropped has a row.
            rows: Any = from_dlpack(value) if kind == "batch" else tuple(from_dlpack(row) for row in value)
            left = places if kind == "batch" else [place for place in places if place not in work.dropped]
            for place, row in zip(left, self._mover.take(self._mover.start(rows)), strict=True):
                work.rows[place] = row
            work.waiting.popleft()
        self.discard(ticket)
        made = [row for place, row in enumerate(work.rows) if row is not None and place not in work.dropped]
        return "batch", torch.stack(made) if made else torch.empty(0)

    def _decode(self, work: _Work) -> None:
        photos = [one.result() for one in work.photos]
        work.photos, work.rows = [], [None] * len(photos)
        self._leave(work, [i for i, photo in enumerate(photos) if photo is None])
        refused: list[int] = []
        for places in _cut(photos):
            some = [photo for i in places if (photo := photos[i]) is not None]
            for i, photo, image in zip(places, some, _decoded(some, self._mover.device), strict=True):
                # Its bytes are no longer needed.
                photos[i] = None
                work.rows[i] = None if image is None else self._row(image, photo)
                if work.rows[i] is None:
                    refused.append(i)
        self._leave(work, refused)

    def _row(self, image: torch.Tensor, photo: _Photo) -> torch.Tensor | None:
        """None: a kernel does not know such sizes, as CUDA's of resizing where 32 pixels are to become of thousands."""
        self._turned |= photo.orientation != 1
        try:
            image = self._made(image, photo.orientation if self._read.exif else 1)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            _note_refused(photo, error)
            return None
        # A part of a photo would keep all of it.
        return image.contiguous()

    def _made(self, image: torch.Tensor, orientation: int) -> torch.Tensor:
        is_transposed, flipped = _TURNS[orientation]
        image = image.transpose(-2, -1) if is_transposed else image
        image = image.flip(flipped) if flipped else image
        for step in self._steps:
            image = step(image)
        return image

    def _leave(self, work: _Work, places: list[int]) -> None:
        """To the CPU, all of whose threads begin at once."""
        if places:
            indices, positions, paths = work.batch
            chosen = [indices[i] for i in places], [positions[i] for i in places], [paths[i] for i in places]
            work.waiting.append((self._inner.submit_files(*chosen), places))

    def retry(self, ticket: int, sample: int, pixels: tuple[int, int, int, bytes]) -> None:
        """As the extension's."""
        number, places = self._work[ticket].waiting[0]
        self._inner.retry(number, places.index(sample), pixels)

    def drop_samples(self, ticket: int, samples: Sequence[int]) -> None:
        """As the extension's."""
        work = self._work[ticket]
        number, places = work.waiting[0]
        self._inner.drop_samples(number, [places.index(i) for i in samples])
        work.dropped.update(samples)

    def discard(self, ticket: int) -> None:
        """As the extension's."""
        work = self._work.pop(ticket, None)
        for number, _ in work.waiting if work is not None else ():
            self._inner.discard(number)

    def saw_turned(self) -> bool:
        """As the extension's."""
        return self._turned or self._inner.saw_turned()


def _cut(photos: Sequence[_Photo | None]) -> list[list[int]]:
    """The places of photos that are decoded together."""
    parts: list[list[int]] = []
    room = 0
    for place, photo in enumerate(photos):
        if photo is None:
            continue
        pixels = photo.size[0] * photo.size[1]
        if not parts or pixels > room:
            parts.append([])
            room = _PIXELS
        parts[-1].append(place)
        room -= pixels
    return parts
