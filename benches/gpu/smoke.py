"""``python -m gpu.smoke DEVICE``: that the package loads, and computes the CPU's numbers on the device."""

import os
import sys
import tempfile
from pathlib import Path

import loader_inputs
import torch
import torchvision
from torch import nn
from torchvision.transforms import Compose, Resize, ToTensor

import cnnrs
from cnnrs.app import cli
from gpu.inputs import fewer
from gpu.scale import SCALES, Scale


def main() -> None:
    """What is wrong is an AssertionError."""
    scale = SCALES[sys.argv[1]]
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {len(os.sched_getaffinity(0))} cores")
    print(f"cnnrs from {cnnrs.__file__}")
    if scale.device == "cuda":
        assert torch.cuda.is_available(), "torch finds no CUDA device"
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
        print(f"{name}, {memory:.0f} GiB, capability {torch.cuda.get_device_capability()}, CUDA {torch.version.cuda}")
    cli.main(["info"])
    torch.manual_seed(0)
    preconv(scale)
    fit(scale)


def preconv(scale: Scale) -> None:
    """Photos through a small network: within rounding the CPU's rows."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten())
    with tempfile.TemporaryDirectory() as scratch:
        folder = fewer(loader_inputs.photos(Path(scratch) / "all")[0], 32, Path(scratch) / "few")
        data = cnnrs.ImageFolder(folder, Compose([Resize((32, 32)), ToTensor()]))
        expected, labels = cnnrs.preconv(data, model, verbose=False)
        rows, same = cnnrs.preconv(data, model.to(scale.device), precision="exact", verbose=False)
    # Sums of 27 products of numbers below 1.
    distance = float((rows - expected).abs().max())
    print(f"preconv: {tuple(rows.shape)}, off by {distance:.1e} at most")
    assert torch.equal(labels, same) and distance <= 27 * 2**-22


def fit(scale: Scale) -> None:
    """A classifier of what can be told apart: more than ten steps, so that one is recorded where that is done."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)).to(scale.device)
    labels = torch.arange(32) % 2
    batches = [(torch.randn(32, 16) + 4.0 * labels.unsqueeze(1), labels) for _ in range(20)]
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = [
        cnnrs.fit(epoch, model, batches, optimizer=sgd, loss_fn=nn.functional.cross_entropy) for epoch in range(3)
    ]
    assert losses[-1][0] < losses[0][0] and losses[-1][1] > 95, losses
    print(cnnrs.explain(model, (32, 16)))


if __name__ == "__main__":
    main()
