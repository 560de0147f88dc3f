"""The three networks of the tutorial, as plain ``nn.Module`` objects with the tutorial's attribute names.

They are ordinary PyTorch: nothing here needs cnnrs, and their ``state_dict()`` loads into the tutorial's own classes.
"""

from torch import Tensor, nn


class SimpleCNN(nn.Module):
    """Float32 ``(N, 3, 32, 32)`` images to ``(N, 10)`` scores; 1,175,818 parameters.

    Three blocks of convolution, ReLU and max-pooling halve the image to 128 x 4 x 4; three linear layers follow.

    Example:
        >>> import torch
        >>> SimpleCNN()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _block("1", 3, 32)
        self.conv2 = _block("2", 32, 64)
        self.conv3 = _block("3", 64, 128)
        self.fc = nn.Sequential()
        self.fc.add_module("fc1", nn.Linear(2048, 512))
        self.fc.add_module("fc_relu1", nn.ReLU(True))
        self.fc.add_module("fc2", nn.Linear(512, 64))
        self.fc.add_module("fc_relu2", nn.ReLU(True))
        self.fc.add_module("fc3", nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Images to scores, before any softmax."""
        x = self.conv1(x)
        x = self.conv2(x)
        x = self.conv3(x)
        x = x.reshape(x.size(0), -1)
        scores: Tensor = self.fc(x)
        return scores


class MnistNet(nn.Module):
    """Float32 ``(N, 1, 28, 28)`` digits to ``(N, 10)`` log-probabilities (for ``F.nll_loss``); 21,840 parameters.

    Two 5 x 5 convolutions leave 20 x 4 x 4 = 320 features; dropout is on in training mode.

    Example:
        >>> import torch
        >>> MnistNet()(torch.zeros(2, 1, 28, 28)).exp().sum(dim=1).round()
        tensor([1., 1.], grad_fn=<RoundBackward0>)
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 10, kernel_size=5), nn.ReLU(True), nn.MaxPool2d(2, 2))
        self.conv2 = nn.Sequential(nn.Conv2d(10, 20, kernel_size=5), nn.Dropout2d(), nn.ReLU(True), nn.MaxPool2d(2, 2))
        self.fc1 = nn.Sequential(nn.Linear(320, 50), nn.ReLU(True), nn.Dropout2d())
        self.fc2 = nn.Sequential(nn.Linear(50, 10), nn.LogSoftmax(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Images to log-probabilities."""
        x = self.conv1(x)
        x = self.conv2(x)
        x = x.reshape(-1, 320)
        x = self.fc1(x)
        log_probabilities: Tensor = self.fc2(x)
        return log_probabilities


class CatDogNet(nn.Module):
    """Float32 ``(N, 3, 224, 224)`` photos to ``(N, 2)`` log-probabilities (for ``F.nll_loss``); 28,121,432 parameters.

    Two 5 x 5 convolutions leave 20 x 53 x 53 = 56,180 features, so nearly all parameters are in the first linear layer.

    Example:
        >>> import torch
        >>> CatDogNet()(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 2])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 10, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2, 2))
        self.conv2 = nn.Sequential(nn.Conv2d(10, 20, kernel_size=5), nn.Dropout2d(), nn.ReLU(), nn.MaxPool2d(2, 2))
        self.fc1 = nn.Sequential(nn.Linear(56180, 500), nn.ReLU(), nn.Dropout2d())
        self.fc2 = nn.Sequential(nn.Linear(500, 50), nn.ReLU(), nn.Dropout2d())
        self.fc3 = nn.Sequential(nn.Linear(50, 2), nn.LogSoftmax(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Photos to log-probabilities."""
        x = self.conv1(x)
        x = self.conv2(x)
        x = x.reshape(x.size(0), -1)
        x = self.fc1(x)
        x = self.fc2(x)
        log_probabilities: Tensor = self.fc3(x)
        return log_probabilities


def _block(number: str, in_channels: int, out_channels: int) -> nn.Sequential:
    block = nn.Sequential()
    block.add_module(f"conv{number}", nn.Conv2d(in_channels, out_channels, 3, 1, padding=1))
    block.add_module(f"relu{number}", nn.ReLU(True))
    block.add_module(f"pool{number}", nn.MaxPool2d(2, 2))
    return block
