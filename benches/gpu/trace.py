"""``python -m gpu.trace DEVICE OUT``: what the device does when, for chrome://tracing.

A short run of `preconv` and an epoch of `fit`.
"""

import gzip
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from fit_cases import MNIST
from frozen_peers import network
from torch.profiler import ProfilerActivity, profile

import cnnrs
from gpu.features import stored
from gpu.inputs import many, on_device, transform
from gpu.scale import SCALES, Scale
from gpu.training import fit

#: Batches and steps that are traced.
BATCHES, STEPS = 6, 40


def main() -> None:
    """trace-preconv.json.gz and trace-fit.json.gz."""
    scale, out = SCALES[sys.argv[1]], Path(sys.argv[2])
    torch.manual_seed(0)
    size = scale.batches[-1]
    model = on_device(scale, network(f"{scale.backbone}.features"))
    with tempfile.TemporaryDirectory() as scratch:
        data = cnnrs.ImageFolder(many(Path(scratch), min(scale.photos, BATCHES * size)), transform(scale))
        traced(
            lambda: stored(data, model, Path(scratch), batch_size=size, precision="bf16"),
            out / "trace-preconv.json.gz",
            scale,
        )
    net = MNIST.make().to(scale.device)
    sgd = MNIST.optimizer(net)
    batches = [(x.to(scale.device), y.to(scale.device)) for x, y in MNIST.batches(min(STEPS, 2 * scale.steps[0]))]
    traced(lambda: fit(batches, MNIST, net, sgd), out / "trace-fit.json.gz", scale)


def traced(work: Callable[[], object], place: Path, scale: Scale) -> None:
    """Once to warm up, then under the profiler, whose table goes to the log."""
    work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if scale.device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        work()
        scale.wait()
    profiler.export_chrome_trace(str(place))
    with gzip.open(place) as file:
        events = json.load(file)["traceEvents"]
    print(f"{place.name}: {len(events):,} events, {place.stat().st_size / 2**20:.1f} MiB")
    print(profiler.key_averages().table(sort_by=f"self_{scale.device}_time_total", row_limit=12))


if __name__ == "__main__":
    main()
