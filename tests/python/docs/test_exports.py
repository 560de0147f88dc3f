"""What leaves cnnrs: backbone and head by torch.export and ONNX, and the examples for other training loops."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import cnnrs

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


exporter = pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="torch.export of 2.4 cannot")


@pytest.fixture(scope="module")
def whole() -> nn.Module:
    """resnet18 up to its last layer with a head on its features."""
    torch.manual_seed(0)
    body = cnnrs.backbone("resnet18", weights=None)
    features = cnnrs.preconv([(torch.rand(4, 3, 64, 64), torch.arange(4))], body, verbose=False)
    return features.attach(nn.Linear(512, 3)).eval()


@exporter
def test_torch_export(whole: nn.Module, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(whole, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    more = torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        # The same operations of the same library.
        torch.testing.assert_close(loaded(more), whole(more), rtol=1e-6, atol=1e-6)


@exporter
def test_onnx(whole: nn.Module, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            whole, (torch.rand(2, 3, 64, 64),), path, input_names=["images"], output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},), dynamo=True, verbose=False,
        )  # fmt: skip
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.rand(7, 3, 64, 64)
    (scores,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = whole(images)
    # Sums of up to 4,608 float32 products in another order, through 18 layers.
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.from_numpy(scores).argmax(dim=1), expected.argmax(dim=1))


def test_a_run_is_a_plain_module(tmp_path: Path) -> None:
    from cnnrs.classifier.heads import Preprocessing
    from cnnrs.classifier.run_folder import Run

    torch.manual_seed(0)
    shape = Preprocessing(72, 64, "bilinear", (0.5,) * 3, (0.25,) * 3)
    Run(torchvision.models.resnet18(num_classes=2).eval(), ["a", "b"], shape, "resnet18").save(tmp_path)
    model = cnnrs.load_run(tmp_path).model
    assert type(model) is torchvision.models.ResNet and not model.training
    images = torch.rand(1, 3, 64, 64)
    exported = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("plain_loop", r"epoch 1: loss \d\.\d{4}\nepoch 2: loss \d\.\d{4}\n$"),
        ("learner", r"(?s)training loss.*History\(2 epochs, "),
        ("lightning_module", r"'loss': tensor\("),
    ],
)
def test_example(name: str, printed: str, folder: Path, tmp_path: Path) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    if "lightning" in source:
        pytest.importorskip("lightning")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), str(folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(printed, done.stdout), done.stdout[-2000:]
