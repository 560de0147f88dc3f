"""One of several processes that fill a store together. Not a test: `test_store_ranks.py` starts it."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torchvision import transforms

import cnnrs


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.environ.get("SEEN"):
            with open(f"{os.environ['SEEN']}-{os.environ['RANK']}", "ab") as seen:
                seen.write(b"x" * len(x))
                size = seen.tell()
            if os.environ["RANK"] == os.environ.get("FAIL") and size >= 8:
                raise ValueError("no more")
        return self.layers(x)


AUGMENT = transforms.Compose(
    [transforms.RandomResizedCrop(20), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)


def main(images: str, out: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    data = cnnrs.ImageFolder(images, AUGMENT)
    if os.environ.get("OTHER") == str(rank):
        data.samples = data.samples[1:]
    share = {"rank": rank, "world_size": world} if world > 1 else {}
    loader = cnnrs.DataLoader(data, batch_size=2, num_workers=1, on_error="skip", **share)  # type: ignore[arg-type]
    begin = time.perf_counter()
    features = cnnrs.preconv(loader, Body(), out=out, engine="python", passes=2)
    checksum = int(features.features.view(torch.int32).long().sum())
    print(f"rank {rank}: {len(features)} rows, {checksum}, {time.perf_counter() - begin:.2f} s", flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
