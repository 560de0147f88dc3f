"""Torchvision's decoder of JPEGs on CUDA, for devices that are none: Pillow decodes, in the same order of streams.

The real one (torchvision/csrc/io/image/cuda) takes memory of the current stream, writes there on a stream of its own
without waiting for the current one, and has the host wait until all is written.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFile


class FakeNvjpeg:
    """Decodes on the devices of a :class:`fake_cuda.FakeCuda`.

    Attributes:
        calls: sizes (height, width) of the images of every call, without the first, which tries whether it works.
        refuses: JPEGs with these bytes are errors, as all are that Pillow cannot read at all.
        fails: what every call raises; None: nothing.
    """

    def __init__(self) -> None:
        self.calls: list[list[tuple[int, int]]] = []
        self.refuses: set[bytes] = set()
        self.fails: Exception | None = None

    def __call__(self, data: list[torch.Tensor], mode: Any, device: torch.device) -> list[torch.Tensor]:
        if self.fails is not None:
            raise self.fails
        current = torch.cuda.current_stream(device)
        assert current.query(), "what the current stream still reads would be overwritten"
        pixels = [self._pixels(one.numpy().tobytes()) for one in data]
        if [(one.shape[1], one.shape[2]) for one in pixels] != [(16, 16)]:
            self.calls.append([(one.shape[1], one.shape[2]) for one in pixels])
        made = [torch.empty(one.shape, dtype=torch.uint8, device=device) for one in pixels]
        own = torch.cuda.Stream(device)
        with torch.cuda.stream(own):
            for there, one in zip(made, pixels, strict=True):
                there.copy_(one.pin_memory(), non_blocking=True)
        own.synchronize()
        return made

    def _pixels(self, data: bytes) -> torch.Tensor:
        try:
            if data in self.refuses:
                raise OSError("refused")
            # As far as it goes, without a word.
            with mock.patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", True):
                image = Image.open(io.BytesIO(data)).convert("RGB")
        except OSError as error:
            raise RuntimeError(f"Error while decoding JPEG images: {error}") from None
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@contextmanager
def fake_nvjpeg() -> Iterator[FakeNvjpeg]:
    """Inside, torchvision decodes with it."""
    fake = FakeNvjpeg()
    with mock.patch.object(torchvision.io, "decode_jpeg", fake):
        yield fake
