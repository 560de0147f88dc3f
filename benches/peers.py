"""Other loaders on the same work, each in a process of its own (`make bench-peers` installs them).

`python peers.py NAME FOLDER THREADS` answers every line on its standard input with one pass over the folder: JPEG files
to normalised float32 (32, 3, 224, 224) batches; then it prints the number of images. Each with the best settings found.
"""

import concurrent.futures
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIZE, BATCH = 224, 32
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def files(folder: str) -> list[str]:
    """The paths of all images, sorted."""
    return sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in {".jpg", ".jpeg"})


def dali(folder: str, threads: int, antialias: bool) -> Callable[[], int]:
    """NVIDIA DALI on the CPU; without antialiasing it computes other pixels than Pillow."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def pipe() -> Any:
        encoded, label = fn.readers.file(file_root=folder, name="reader")
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        image = fn.resize(image, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_LINEAR, antialias=antialias)
        mean, std = (255 * MEAN).tolist(), (255 * STD).tolist()
        return fn.crop_mirror_normalize(image, dtype=types.FLOAT, mean=mean, std=std, output_layout="CHW"), label

    pipeline = pipe()
    pipeline.build()
    number = len(files(folder))

    def run() -> int:
        for _ in range(-(-number // BATCH)):
            pipeline.run()
        return number

    return run


def batches(folder: str, threads: int, load: Callable[[list[str]], Any]) -> Callable[[], int]:
    """Runs `load` on lists of paths in a pool of threads."""
    paths = files(folder)
    chunks = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]

    def run() -> int:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return sum(len(batch) for batch in pool.map(load, chunks))

    return run


def normalized(images: Iterator[np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8 arrays as one float32 (N, 3, H, W) array."""
    batch: np.ndarray = (np.stack(list(images)).astype(np.float32) / 255 - MEAN) / STD
    return batch.transpose(0, 3, 1, 2)


def spdl(folder: str, threads: int) -> Callable[[], int]:
    """Meta's SPDL: FFmpeg's decoder and scaler in threads."""
    import spdl.io

    scale = spdl.io.get_video_filter_desc(
        scale_width=SIZE, scale_height=SIZE, scale_algo="bilinear", scale_mode=None, pix_fmt="rgb24"
    )
    load = spdl.io.load_image
    return batches(
        folder, threads, lambda paths: normalized(spdl.io.to_numpy(load(path, filter_desc=scale)) for path in paths)
    )


def datago(folder: str, threads: int) -> Callable[[], int]:
    """Photoroom's datago; it takes its threads from the cores it sees and crops to the aspect ratio."""
    from datago import DatagoClient

    number = len(files(folder))
    config = {
        "source_type": "file",
        "source_config": {"root_path": folder, "random_sampling": False, "rank": 0, "world_size": 1},
        "image_config": {
            "crop_and_resize": True,
            "default_image_size": SIZE,
            "downsampling_ratio": 32,
            "min_aspect_ratio": 1.0,
            "max_aspect_ratio": 1.0,
            "pre_encode_images": False,
        },
        "limit": number,
        "samples_buffer_size": 2 * BATCH,
    }
    client = DatagoClient(json.dumps(config))

    def samples() -> Iterator[np.ndarray]:
        client.start()
        while (sample := client.get_sample_auto_convert()) is not None:
            yield np.asarray(sample["image"])

    def run() -> int:
        done, images = 0, samples()
        while chunk := list(itertools.islice(images, BATCH)):
            done += len(normalized(iter(chunk)))
        client.stop()
        return done

    return run


def torchcodec(folder: str, threads: int) -> Callable[[], int]:
    """Torchcodec's JPEG decoder and torchvision's resize of tensors in threads."""
    import torch
    from torchcodec.decoders import decode_jpeg
    from torchvision.transforms.v2 import functional

    torch.set_num_threads(1)
    mean, std = MEAN.tolist(), STD.tolist()

    def load(paths: list[str]) -> Any:
        images = []
        for path in paths:
            image = decode_jpeg(torch.from_numpy(np.fromfile(path, dtype=np.uint8)))
            images.append(functional.resize(image.expand(3, -1, -1), [SIZE, SIZE], antialias=True))
        return functional.normalize(functional.to_dtype(torch.stack(images), torch.float32, scale=True), mean, std)

    return batches(folder, threads, load)


PEERS: dict[str, Callable[[str, int], Callable[[], int]]] = {
    "DALI, antialias": lambda folder, threads: dali(folder, threads, True),
    "DALI, no antialias (other pixels)": lambda folder, threads: dali(folder, threads, False),
    "SPDL": spdl,
    "datago (crops)": datago,
    "torchcodec + torchvision v2": torchcodec,
}


def main() -> None:
    """Serve one peer."""
    name, folder, threads = sys.argv[1:4]
    answers = os.fdopen(os.dup(1), "w")
    # Libraries that print must not answer for us.
    os.dup2(2, 1)
    run = PEERS[name](folder, int(threads))
    for _ in sys.stdin:
        print(run(), file=answers, flush=True)


if __name__ == "__main__":
    main()
