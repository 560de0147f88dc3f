"""Other runtimes on the same frozen network, each in a process of its own (`make bench-peers` installs them).

`python frozen_peers.py RUNTIME NETWORK BATCH THREADS [settled]` answers a line on its standard input with one pass over
a batch of (BATCH, 3, 224, 224) float32; then it prints the number of images.
"""

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

torch.manual_seed(0)


def network(name: str, settled: bool = False) -> nn.Module:
    """A network with random weights: one of torchvision, "vgg16.features", a part of one, "efficientnet_lite0", or the
    features of "timm:vit_small_patch16_224", one of timm's for images of 224 x 224.

    Args:
        name: with a layer's path behind a dot, that part.
        settled: whether its batch norms have seen images. Where they have not, numbers fade from layer to layer, in
            deep networks down to those that processors compute with slowly.
    """
    whole, _, part = name.partition(".")
    if whole == "efficientnet_lite0":
        package = importlib.import_module("efficientnet_lite_pytorch")
        model: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    elif whole.startswith("timm:"):
        create = importlib.import_module("timm").create_model
        try:
            model = create(whole[5:], num_classes=0, img_size=224)
        except TypeError:  # one for images of any size
            model = create(whole[5:], num_classes=0)
    else:
        # Its second output, for training, takes larger images than ours.
        only = {"aux_logits": False, "init_weights": False} if whole == "inception_v3" else {}
        model = getattr(torchvision.models, whole)(**only)
    if settled:
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.momentum = None
            model.train()(torch.rand(8, 3, 224, 224))
    return model.eval().get_submodule(part)


def onnx(name: str, batch: int, folder: str, settled: bool = False) -> str:
    """The network as an ONNX file for this batch size."""
    path = str(Path(folder) / "network.onnx")
    torch.onnx.export(network(name, settled), (torch.rand(batch, 3, 224, 224),), path, dynamo=True, verbose=False)
    return path


def onnxruntime(path: str, images: np.ndarray, threads: int) -> Callable[[], object]:
    """ONNX Runtime with all graph optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, inputs)


def openvino(path: str, images: np.ndarray, threads: int) -> Callable[[], object]:
    """OpenVINO in float32, tuned for throughput of one batch at a time."""
    import openvino

    core = openvino.Core()
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(path), "CPU", config)
    return lambda: compiled([images])


RUNTIMES = {"ONNX Runtime": onnxruntime, "OpenVINO": openvino}


def main() -> None:
    """Serve one runtime."""
    runtime, name, batch, threads = sys.argv[1:5]
    answers = os.fdopen(os.dup(1), "w")
    # Libraries that print must not answer for us.
    os.dup2(2, 1)
    images = np.random.default_rng(0).random((int(batch), 3, 224, 224), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = onnx(name, int(batch), folder, settled=sys.argv[5:] == ["settled"])
        run = RUNTIMES[runtime](path, images, int(threads))
        for _ in sys.stdin:
            run()
            print(len(images), file=answers, flush=True)


if __name__ == "__main__":
    main()
