"""The three networks against the tutorial's own class definitions, typed here as the tutorial prints them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cnnrs import models


class TutorialSimpleCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer1 = nn.Sequential()
        layer1.add_module("conv1", nn.Conv2d(3, 32, 3, 1, padding=1))
        layer1.add_module("relu1", nn.ReLU(True))
        layer1.add_module("pool1", nn.MaxPool2d(2, 2))
        self.conv1 = layer1
        layer2 = nn.Sequential()
        layer2.add_module("conv2", nn.Conv2d(32, 64, 3, 1, padding=1))
        layer2.add_module("relu2", nn.ReLU(True))
        layer2.add_module("pool2", nn.MaxPool2d(2, 2))
        self.conv2 = layer2
        layer3 = nn.Sequential()
        layer3.add_module("conv3", nn.Conv2d(64, 128, 3, 1, padding=1))
        layer3.add_module("relu3", nn.ReLU(True))
        layer3.add_module("pool3", nn.MaxPool2d(2, 2))
        self.conv3 = layer3
        layer4 = nn.Sequential()
        layer4.add_module("fc1", nn.Linear(2048, 512))
        layer4.add_module("fc_relu1", nn.ReLU(True))
        layer4.add_module("fc2", nn.Linear(512, 64))
        layer4.add_module("fc_relu2", nn.ReLU(True))
        layer4.add_module("fc3", nn.Linear(64, 10))
        self.fc = layer4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv1 = self.conv1(x)
        conv2 = self.conv2(conv1)
        conv3 = self.conv3(conv2)
        fc_input = conv3.view(conv3.size(0), -1)
        return self.fc(fc_input)


class TutorialMnistNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 10, kernel_size=5), nn.ReLU(True), nn.MaxPool2d(2, 2))
        self.conv2 = nn.Sequential(nn.Conv2d(10, 20, kernel_size=5), nn.Dropout2d(), nn.ReLU(True), nn.MaxPool2d(2, 2))
        self.fc1 = nn.Sequential(nn.Linear(320, 50), nn.ReLU(True), nn.Dropout2d())
        self.fc2 = nn.Sequential(nn.Linear(50, 10), nn.LogSoftmax(dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.conv2(x)
        x = x.view(-1, 320)
        x = self.fc1(x)
        return self.fc2(x)


class TutorialCatDogNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 10, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2, 2))
        self.conv2 = nn.Sequential(nn.Conv2d(10, 20, kernel_size=5), nn.Dropout2d(), nn.ReLU(), nn.MaxPool2d(2, 2))
        self.fc1 = nn.Sequential(nn.Linear(56180, 500), nn.ReLU(), nn.Dropout2d())
        self.fc2 = nn.Sequential(nn.Linear(500, 50), nn.ReLU(), nn.Dropout2d())
        self.fc3 = nn.Sequential(nn.Linear(50, 2), nn.LogSoftmax(dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.conv2(x)
        x = x.view(x.size(0), -1)
        x = self.fc1(x)
        x = self.fc2(x)
        return self.fc3(x)


CASES = [
    pytest.param(models.SimpleCNN, TutorialSimpleCNN, (3, 32, 32), 10, 1_175_818, id="SimpleCNN"),
    pytest.param(models.MnistNet, TutorialMnistNet, (1, 28, 28), 10, 21_840, id="MnistNet"),
    pytest.param(models.CatDogNet, TutorialCatDogNet, (3, 224, 224), 2, 28_121_432, id="CatDogNet"),
]
pytestmark = pytest.mark.filterwarnings("ignore:dropout2d. Received a 2-D input")


@pytest.mark.parametrize(("ours", "tutorial", "shape", "classes", "parameters"), CASES)
def test_is_the_tutorials_network(
    ours: Callable[[], nn.Module],
    tutorial: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    classes: int,
    parameters: int,
) -> None:
    torch.manual_seed(0)
    mine = ours()
    torch.manual_seed(0)
    theirs = tutorial()

    assert str(mine).split("(", 1)[1] == str(theirs).split("(", 1)[1]
    assert list(mine.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    assert sum(p.numel() for p in mine.parameters()) == parameters
    assert f"{parameters:,} parameters" in (ours.__doc__ or "")

    images = torch.randn(3, *shape)
    for training in (False, True):
        torch.manual_seed(1)
        expected = theirs.train(training)(images)
        torch.manual_seed(1)
        scores = mine.train(training)(images)
        assert scores.shape == (3, classes)
        # The same operations on the same numbers with the same dropout masks: the same bits.
        assert torch.equal(scores, expected)
