"""How much is measured: on a GPU, and in the rehearsal on the CPU, which only shows that everything runs."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scale:
    """Sizes of all parts.

    Attributes:
        device: where it runs.
        backbone: torchvision's name of the network whose features are computed.
        pixels: height and width of its images.
        photos: how many there are.
        batches: images at a time; the last size is the main one.
        resident: batches that lie on the device where nothing else is to be measured than the network.
        side: of the square matrices that are multiplied.
        megabytes: of a copy.
        rounds: of each comparison.
        samples: per step of CatDogNet.
        steps: per epoch of MnistNet, of CatDogNet and of the head.
        width: of the features that the head begins with.
        backend: what ``torch.compile`` compiles with.
    """

    device: str
    backbone: str
    pixels: int
    photos: int
    batches: tuple[int, ...]
    resident: int
    side: int
    megabytes: int
    rounds: int
    samples: int
    steps: tuple[int, int, int]
    width: int
    backend: str

    def wait(self) -> None:
        """Until the device has done everything: what is timed ends with this."""
        if self.device == "cuda":
            torch.cuda.synchronize()


FULL = Scale("cuda", "vgg16", 224, 4200, (32, 128, 256), 16, 8192, 256, 3, 32, (300, 30, 60), 25088, "inductor")
#: "eager" compiles nothing, but takes the same road up to the compiler.
REHEARSAL = Scale("cpu", "squeezenet1_1", 32, 12, (4,), 2, 64, 1, 1, 2, (5, 1, 2), 64, "eager")
SCALES = {scale.device: scale for scale in (FULL, REHEARSAL)}
