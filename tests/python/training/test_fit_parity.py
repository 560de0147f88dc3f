"""Many steps of engine `cpu` beside eager PyTorch, and `fit` in two processes beside one."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

import cnnrs
import tutorial

pytestmark = pytest.mark.usefixtures("two_threads")


def steady(make: Callable[[], nn.Module]) -> nn.Module:
    """A network without random numbers."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    return model


def head() -> nn.Module:
    """VGG16's classifier, narrowed from 4096 to 64 so that eager PyTorch takes seconds."""
    return nn.Sequential(
        nn.Linear(25088, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Dropout(),
        nn.Linear(64, 2),
    )  # fmt: skip


def smooth_resnet18() -> nn.Module:
    """resnet18 without kinks: SiLU for ReLU, averages for maxima.

    At a kink two correct float32 computations part: a value within rounding of zero is let through by one and held back
    by the other, and its whole gradient (1e-3 of a layer's) comes or does not. Eager PyTorch parts from itself in
    channels_last as fast as engine "cpu" does from it: after ten steps by 3e-4. Without kinks only rounding remains.
    """
    net = resnet18(num_classes=10)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, 2, 1))
    return net


def narrow(net: nn.Module, by: int) -> nn.Module:
    """The same layers with so many times fewer channels: eager PyTorch takes seconds for 200 steps."""

    def less(channels: int) -> int:
        # Of the image and of the classes there are as many as there were.
        return channels // by if channels >= 64 else channels

    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                shape: Any = (less(child.in_channels), less(child.out_channels), child.kernel_size)
                setattr(module, name, nn.Conv2d(*shape, child.stride, child.padding, bias=child.bias is not None))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(less(child.num_features)))
            elif isinstance(child, nn.Linear):
                setattr(module, name, nn.Linear(less(child.in_features), less(child.out_features)))
    return net


def narrow_cat_dog_net() -> nn.Module:
    """Its first linear layer is still large: from 2**18 weights on engine "cpu" updates one while it reads it."""
    net = cnnrs.models.CatDogNet()
    net.fc1[0], net.fc2[0] = nn.Linear(56180, 50), nn.Linear(50, 50)
    return net


# Of the values that meet a kink per step (3e5 in SimpleCNN and CatDogNet) some lie within rounding of it: the step is
# so small that a gradient of 1e-3 that comes or goes with one of them is worth less than the bound. With ten times
# MnistNet's, eager PyTorch parts by 1e-3 from itself without oneDNN in three of eight seeds.
# Where 200 steps of the whole network take a minute, it takes 10, and one that is narrower the 200.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, Any, float, int]] = {
    "MnistNet": (cnnrs.models.MnistNet, (16, 1, 28, 28), 10, F.nll_loss, 1e-3, 200),
    "SimpleCNN": (cnnrs.models.SimpleCNN, (8, 3, 32, 32), 10, F.cross_entropy, 1e-4, 200),
    "CatDogNet": (cnnrs.models.CatDogNet, (1, 3, 224, 224), 2, F.nll_loss, 1e-4, 10),
    "CatDogNet, narrowed": (narrow_cat_dog_net, (1, 3, 224, 224), 2, F.nll_loss, 1e-4, 200),
    "head of VGG16, narrowed": (head, (8, 25088), 2, F.cross_entropy, 1e-4, 200),
    "resnet18 at 64 x 64, smooth": (smooth_resnet18, (4, 3, 64, 64), 10, F.cross_entropy, 1e-3, 10),
    "resnet18 at 64 x 64, smooth, narrowed": (
        lambda: narrow(smooth_resnet18(), 4), (4, 3, 64, 64), 10, F.cross_entropy, 1e-3, 200,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_many_steps_stay_within_1e_5_of_eager(name: str) -> None:
    make, shape, classes, loss_fn, lr, steps = NETWORKS[name]
    theirs, their_sgd, ours, our_sgd = tutorial.twins(steady(make), lambda p: torch.optim.SGD(p, lr=lr, momentum=0.5))
    data = [(torch.randn(shape), torch.randint(classes, shape[:1])) for _ in range(8)]
    batches = [data[i % len(data)] for i in range(steps)]
    theirs.train()
    expected = []
    for x, y in batches:
        their_sgd.zero_grad()
        loss = loss_fn(theirs(x), y)
        loss.backward()
        their_sgd.step()
        expected.append(loss.item())
    found: list[float] = []
    cnnrs.fit(
        0, ours, batches, optimizer=our_sgd, loss_fn=loss_fn, engine="cpu", verbose=False,
        on_batch_end=lambda _, loss: found.append(loss),
    )  # fmt: skip
    assert expected[-1] != pytest.approx(expected[-1 - len(data)], rel=1e-5), "nothing is learned any more"
    # The bound of the specification.
    assert found == pytest.approx(expected, rel=1e-5)


def test_gradients_of_resnet18_are_as_good_as_eagers() -> None:
    torch.manual_seed(0)
    model = smooth_resnet18().train()
    x, y = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    exact = copy.deepcopy(model).double()
    F.cross_entropy(exact(x.double()), y).backward()
    eager = copy.deepcopy(model)
    F.cross_entropy(eager(x), y).backward()
    # What SGD with momentum keeps after its first step is the gradient itself.
    sgd = torch.optim.SGD(model.parameters(), lr=1e-30, momentum=0.9)
    cnnrs.fit(0, model, [(x, y)], optimizer=sgd, loss_fn=F.cross_entropy, engine="cpu", verbose=False)
    triples = zip(exact.parameters(), eager.parameters(), model.parameters(), strict=True)
    for (name, _), (p, q, r) in zip(model.named_parameters(), triples, strict=True):
        error, bound = ((g.double() - p.grad).norm() for g in (sgd.state[r]["momentum_buffer"], q.grad))
        # Sums in another order: rounding of the same size, not the same; 1e-7 is one rounding of each element.
        assert error <= 3 * bound + 1e-7 * p.grad.norm(), name


SCRIPT = """
import os, sys
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
import cnnrs

rank, world, store, result = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
data = torch.utils.data.TensorDataset(torch.randn(48, 1, 8, 8), torch.randint(3, (48,)))
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    model = DistributedDataParallel(model)
    assert cnnrs.explain(model).engine == "python", cnnrs.explain(model)
loader = cnnrs.DataLoader(data, batch_size=8 // world, rank=rank, world_size=world)
sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
losses = []
for epoch in range(3):
    loader.set_epoch(epoch)
    losses.append(cnnrs.fit(epoch, model, loader, optimizer=sgd, loss_fn=F.cross_entropy, verbose=False)[0])
total = torch.tensor(losses, dtype=torch.float64)
if world > 1:
    dist.all_reduce(total)
if rank == 0:
    weights = [p.detach() for p in model.parameters()]
    torch.save({"losses": total / world, "weights": weights}, result)
if world > 1:
    dist.destroy_process_group()
# Not through Python's own end: gloo's thread may then still hold a gradient and abort (pytorch issue 190489).
os._exit(0)
"""


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    results = []
    for world in (1, 2):
        result = tmp_path / f"{world}.pt"
        arguments = [str(world), str(tmp_path / "store"), str(result)]
        processes = [
            subprocess.Popen([sys.executable, str(script), str(rank), *arguments], stderr=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
        results.append(torch.load(result, weights_only=True))
    one, two = results
    # Rank r has samples r, r + 2, ...: the same doubled batches. 18 steps of float32 rounding, 6e-8 each.
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    for p, q in zip(one["weights"], two["weights"], strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)
