"""How far features computed on the device are from those of the CPU."""

from pathlib import Path
from typing import Any

import torch
from loader_inputs import files
from torch import nn

import cnnrs
from gpu.inputs import fewer, on_device, transform
from gpu.scale import Scale
from gpu.titles import CLOSENESS

#: Half a unit of the last of 24, 11, 8 and 11 bits, times 10: thirteen layers, each of which rounds inputs, weights
#: and, in half precision, results; errors of either sign add up like the root of their number. In float32 Winograd's
#: algorithm, which cuDNN may choose, costs five bits more.
BOUNDS = {"exact": 10 * 2**-19, "tf32": 10 * 2**-11, "bf16": 10 * 2**-8, "fp16": 10 * 2**-11}


class Closeness:
    """Norm of the difference over the norm, for a few photos at each precision; too far is a problem."""

    work = CLOSENESS
    unit = "relative"

    def __init__(self, scale: Scale, model: nn.Module, folder: Path) -> None:
        self.scale = scale
        self.model = model
        self.folder = folder
        self.found: dict[str, float] = {}
        self.failures: list[str] = []

    def measure(self) -> "Closeness":
        """On the CPU by summing directly, in float32."""
        place = fewer(self.folder, 8, self.folder.parent / "eight")
        data: Any = cnnrs.ImageFolder(place, transform(self.scale))
        expected, _ = cnnrs.preconv(data, self.model, precision="exact", verbose=False)
        there = on_device(self.scale, self.model)
        for precision, bound in BOUNDS.items():
            rows, _ = cnnrs.preconv(data, there, precision=precision, dtype="float32", verbose=False)
            self.found[precision] = distance = float(torch.dist(rows, expected) / expected.norm())
            # Not "distance > bound": a NaN is no distance.
            if not distance <= bound:
                self.failures.append(f"{precision}: {distance:.2g} is more than {bound:.2g}")
        return self

    def table(self) -> str:
        """Found beside the bound."""
        count = len(files(self.folder.parent / "eight"))
        lines = [f"### {self.work}", "", f"{count} photos.", "", "| precision | found | at most |", "|---|---:|---:|"]
        rows = [f"| {name} | {found:.2g} | {BOUNDS[name]:.2g} |" for name, found in self.found.items()]
        return "\n".join([*lines, *rows, "", *self.failures, ""])

    def figures(self) -> dict[str, list[float]]:
        """As those of a trial."""
        return {name: [found] for name, found in self.found.items()}
