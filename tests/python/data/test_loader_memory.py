"""Whose memory a batch is: buffers are used again, never under a tensor that somebody holds."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import transforms

from cnnrs.data.folder import ImageFolder
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


def test_a_held_batch_is_never_overwritten(folder: Path) -> None:
    loader = DataLoader(ImageFolder(folder, TUTORIAL), 4, num_workers=2)
    held = [batch[0] for _ in range(4) for batch in loader]
    copies = [images.clone() for images in held]
    for _ in range(4):
        for images, _ in loader:
            images.fill_(-1)
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    assert len({images.data_ptr() for images in held}) == len(held)


def test_buffers_are_used_again_and_aligned(folder: Path) -> None:
    loader = DataLoader(ImageFolder(folder, TUTORIAL), 4, num_workers=2, drop_last=True)

    def addresses() -> list[int]:
        return [images.data_ptr() for images, _ in loader]

    first, second = addresses(), addresses()
    assert set(first) & set(second), "the second epoch uses buffers of the first"
    # Alive at once: prefetch_factor + 1 in flight and the consumer's; one more when a buffer came back a moment late.
    assert len(set(first + second)) <= 5 < len(first)
    assert all(address % 64 == 0 for address in first + second)


def test_a_view_keeps_the_buffer(folder: Path) -> None:
    loader = DataLoader(ImageFolder(folder, TUTORIAL), 4, num_workers=2)
    images, _ = next(iter(loader))
    row, expected = images[1], images[1].clone()
    array = images[2].numpy()
    kept = array.copy()
    del images
    gc.collect()
    for _ in range(3):
        for batch, _ in loader:
            batch.fill_(7)
    assert torch.equal(row, expected)
    assert np.array_equal(array, kept)


def test_a_tensor_may_outlive_everything_and_die_on_any_thread(folder: Path) -> None:
    loader: Any = DataLoader(ImageFolder(folder, TUTORIAL), 4, num_workers=2)
    held = [images for images, _ in loader]
    total = sum(float(images.sum()) for images in held)
    del loader
    gc.collect()
    assert sum(float(images.sum()) for images in held) == total
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()


def test_batches_are_writable_and_pinning_is_torchs(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    images, labels = next(iter(DataLoader(ImageFolder(folder, TUTORIAL), 4, pin_memory=True)))
    images.mul_(2)
    assert images.is_pinned() == labels.is_pinned() == torch.cuda.is_available()
