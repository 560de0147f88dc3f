"""How close training with native kernels stays to PyTorch's own.

`python benches/kernel_numbers.py PHOTOS`: a folder with train and valid, which hold a folder for each class. It trains
some networks in some minutes, and prints Markdown. Native kernels compute every step here, whether faster or not.
"""

import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms
from torchvision.models import get_model

import cnnrs
from cnnrs._util.kept_memory import kept_memory
from cnnrs.engine.kernels import Kernels
from cnnrs.model.lowering import lower

#: Has no corner: a value within rounding of zero is not let through by one and held back by the other.
SMOOTH: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: nn.SiLU, nn.ReLU6: nn.SiLU, nn.Hardswish: nn.SiLU, nn.Hardsigmoid: nn.Sigmoid,
}  # fmt: skip
STEPS, BATCH, SEEDS, RATE = 200, 16, 5, 0.01
#: Steps whose losses are shown: where differences grow they do so in the first ones.
SHOWN = (1, 2, 5, 10, *range(20, STEPS + 1, 20))
#: Pixels at each side; most of the last one's time is its head's.
SIZES = {"mobilenet_v3_small": 64, "resnet18": 64, "vgg11_bn": 32}
#: Who computes a step.
CONTIGUOUS, LAST, NATIVE = "PyTorch", "PyTorch, channels_last", "native kernels"

Photos = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    """Measure."""
    root = Path(sys.argv[1])
    print(
        f"Difference of the loss of {BATCH} photos relative to PyTorch's in contiguous memory, in {STEPS} steps of SGD "
        f"at rate {RATE}, from scratch; {torch.get_num_threads()} threads."
    )
    for kind in ("smooth", "own"):
        for name, size in SIZES.items():
            torch.manual_seed(0)
            model = get_model(name, num_classes=2)
            title = f"{name} at {size} x {size}, {kind} activations"
            apart(title, smooth(model) if kind == "smooth" else model, photos(root / "train", size))
    accuracies("A small network, from scratch", small, root, 32, 8, RATE)
    accuracies("efficientnet_lite0, pretrained", pretrained, root, 96, 1, RATE / 10)
    accuracies("resnet18, from scratch", lambda: get_model("resnet18", num_classes=2), root, 32, 4, RATE)


def smooth(model: nn.Module) -> nn.Module:
    """The model with activations without corners."""
    for name, module in list(model.named_modules()):
        if type(module) in SMOOTH:
            model.set_submodule(name, SMOOTH[type(module)]())
    return model


def small() -> nn.Module:
    """Everything that has a native kernel, and trains in seconds."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.Hardswish(),
        nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(64), nn.ReLU6(), nn.MaxPool2d(2),
        nn.Conv2d(64, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(96, 2),
    )  # fmt: skip


def pretrained() -> nn.Module:
    """ImageNet's weights, and a head for two classes."""
    body: Any = cnnrs.backbone("efficientnet_lite0").body
    # Its `forward` asks for a type where it drops whole blocks: it could not be taken apart.
    body._global_params = body._global_params._replace(drop_connect_rate=0.0)
    return nn.Sequential(body, nn.Flatten(), nn.LazyLinear(2))


def photos(folder: Path, size: int) -> Photos:
    """All of them: float32 (N, 3, size, size) of ImageNet's mean and spread, int64 (N,)."""
    steps: list[Any] = [
        transforms.Resize((size, size)), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]  # fmt: skip
    data = cnnrs.ImageFolder(folder, transforms.Compose(steps))
    images, labels = zip(*cnnrs.DataLoader(data, batch_size=BATCH), strict=True)
    return torch.cat(images), torch.cat(labels)


def batches(data: Photos, steps: int, seed: int) -> Iterator[Photos]:
    """Whole ones, all in another order in every epoch."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(data[0]), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        yield data[0][rows], data[1][rows]


def trained(
    model: nn.Module, who: str, data: Photos, steps: int, lr: float, momentum: float = 0.0, seed: int = 0
) -> list[float]:
    """The losses of the steps; the model is trained in place."""
    model.train()
    forward: Callable[[torch.Tensor], torch.Tensor] = model
    if who == NATIVE:
        lowered = lower(model, True)
        kernels = Kernels(lowered)

        def forward(images: torch.Tensor) -> torch.Tensor:
            return kernels.play(lowered, lowered.tensors, images)

    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    losses = []
    torch.manual_seed(seed)
    with kept_memory():
        for images, labels in batches(data, steps, seed):
            images = images.to(memory_format=torch.channels_last) if who == LAST else images
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    return losses


def apart(title: str, model: nn.Module, data: Photos) -> None:
    """How far losses are from PyTorch's."""
    print(f"\n{title}\n\n| step | loss | {LAST} | {NATIVE} |\n|---:|---:|---:|---:|")
    found = [trained(copy.deepcopy(model), who, data, STEPS, RATE) for who in (CONTIGUOUS, LAST, NATIVE)]
    for step in SHOWN:
        wanted, *others = (losses[step - 1] for losses in found)
        print(f"| {step} | {wanted:.4f} | {' | '.join(f'{abs(x - wanted) / wanted:.1e}' for x in others)} |")
    sys.stdout.flush()


def accuracies(title: str, make: Callable[[], nn.Module], root: Path, size: int, epochs: int, lr: float) -> None:
    """Right answers after training, for some seeds of weights, order and dropout."""
    train, valid = photos(root / "train", size), photos(root / "valid", size)
    steps = epochs * (len(train[0]) // BATCH)
    print(f"\n{title}, {size} x {size}, {epochs} epochs of {len(train[0])} photos, right of {len(valid[0])} others\n")
    print(f"| who | mean | {' | '.join(f'seed {seed}' for seed in range(SEEDS))} |\n|---|---:|{'---:|' * SEEDS}")
    for who in (CONTIGUOUS, NATIVE):
        right = []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = make()
            with torch.no_grad():
                model.eval()(train[0][:1])
            trained(model, who, train, steps, lr, 0.9, seed)
            with torch.no_grad():
                outputs = torch.cat([model.eval()(part) for part in torch.split(valid[0], 50)])
            right.append(100 * float((outputs.argmax(1) == valid[1]).float().mean()))
        cells = " | ".join(f"{one:.1f} %" for one in right)
        print(f"| {who} | {statistics.mean(right):.1f} % | {cells} |", flush=True)


if __name__ == "__main__":
    main()
