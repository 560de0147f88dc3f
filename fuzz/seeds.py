"""Writes the seeds of the corpus: one small file per format, mode and kind that the parity tests know.

Run it from the repository root: python fuzz/seeds.py
"""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / "tests" / "python" / "support"))

import image_files  # noqa: E402

MAGIC = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II": "tiff",
    b"MM": "tiff",
    b"P": "pnm",
}


def main() -> None:
    """Files of 7 x 5 pixels; one JPEG of 33 x 9 has several blocks; one of each with EXIF."""
    seeds = list(image_files.files((7, 5)))
    seeds += [(f"wide {name}", data) for name, data in image_files.files((33, 9)) if name.startswith("jpeg 30")]
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("JPEG", "PNG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (5, 4), (1, 2, 3)).save(file, format, exif=exif)
        seeds.append((f"exif {format}", file.getvalue()))
    for name, data in seeds:
        kind = next(kind for magic, kind in MAGIC.items() if data.startswith(magic))
        write(f"decode_{kind}", name, data)
    write("idx", "images", struct.pack(">4I", 0x0803, 2, 3, 2) + bytes(12))
    write("idx", "labels", struct.pack(">2I", 0x0801, 5) + bytes(5))


def write(target: str, name: str, data: bytes) -> None:
    """Names say what is inside."""
    path = ROOT / "corpus" / target / "".join(c if c.isalnum() else "-" for c in name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    main()
