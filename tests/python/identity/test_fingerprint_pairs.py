"""Keys of models: others for models that differ in anything, the same for equal ones, here and in other processes."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import cnnrs
import model_pairs
from cnnrs.identity import reach
from cnnrs.identity.fingerprint import Unidentifiable, fingerprint
from cnnrs.model import cut

SHOW = """
import json, model_pairs
from cnnrs.identity.fingerprint import Unidentifiable, fingerprint
keys = {}
for name, make in model_pairs.PAIRS.items():
    try:
        keys[name] = fingerprint(make(0))
    except Unidentifiable:
        keys[name] = None
print(json.dumps(keys))
"""


def key(model: Any) -> str | None:
    try:
        return fingerprint(model)
    except Unidentifiable:
        return None


@pytest.fixture(scope="module")
def elsewhere() -> Any:
    """Keys that another process, with another seed of its hashes, gives the first of each pair."""
    path = os.pathsep.join([str(Path(model_pairs.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path}
    command = [sys.executable, "-c", SHOW]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300).stdout)


@pytest.mark.parametrize("name", model_pairs.PAIRS)
def test_what_differs_has_another_key(name: str, elsewhere: dict[str, str | None]) -> None:
    make = model_pairs.PAIRS[name]
    first, again, other = key(make(0)), key(make(0)), key(make(1))
    assert first is None or first != other
    assert first == again == elsewhere[name]


UNIDENTIFIABLE = ("own_module_in_an_attribute",)


def test_hardly_any_pair_is_left_to_computing_each_time() -> None:
    assert {name for name, make in model_pairs.PAIRS.items() if key(make(0)) is None} == set(UNIDENTIFIABLE)


# The keys that stores of these models have since the first version of the format: another one recomputes them all.
KEYS = {
    "resnet18": "875074f8aeee8dec8a95e77b0ef03eb8",
    "mobilenet_v3_small": "7f9d8ed82703985668ae20cea75f67cf",
    "squeezenet1_0": "b310d9873188c03b01df84641e1bd9e3",
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_well_known_models_stay(name: str) -> None:
    model = getattr(torchvision.models, name)(weights=None)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(0.5 if tensor.is_floating_point() else 1)
    assert fingerprint(model) == KEYS[name]


class Plain(nn.Module):
    """What most people write."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        nn.init.constant_(self.conv.weight, 0.5)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(torch.flatten(self.conv(x), 1))


class Logs(Plain):
    """What it reads when it is made or saved is not what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.note()

    def note(self) -> None:
        assert LOCK is not None


LOCK = threading.Lock()


class Locks(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with LOCK:
            return super().forward(x)


def test_only_what_forward_reaches_is_looked_at() -> None:
    assert key(Logs()) is not None
    with pytest.raises(Unidentifiable, match="lock"):
        fingerprint(Locks())


def test_used_models_keep_their_key() -> None:
    for model in (Plain(), torchvision.models.resnet18(weights=None), cnnrs.backbone("resnet18", weights=None)):
        before = fingerprint(model.eval())
        model(torch.rand(2, 1 if isinstance(model, Plain) else 3, 64, 64))
        assert fingerprint(model) == before


@pytest.mark.parametrize("broken", [nn.LazyLinear(3), nn.Linear(2, 2, device="meta")])
def test_what_has_no_numbers_is_unidentifiable(broken: nn.Module) -> None:
    with pytest.raises(Unidentifiable):
        fingerprint(broken)


def test_an_unidentifiable_model_is_computed_each_time_and_says_why(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from stores import TRANSFORM

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with LOCK:
                return x.mean((2, 3))

    data = cnnrs.ImageFolder(folder, TRANSFORM)
    for expected in (
        "",
        "recomputing the features, because cnnrs cannot tell whether the model is the same (the model holds a lock",
    ):
        found = cnnrs.preconv(data, Net(), out=tmp_path / "f", engine="python")
        assert len(found) == 26 and expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "layer"), [("resnet18", "layer3"), ("resnet50", "layer3"), ("efficientnet_b0", "features.7")]
)
def test_what_is_cut_out_has_the_code_that_torch_fx_gives_it(
    name: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which stores of parts of these networks have in their key."""
    model = torchvision.models.get_model(name, weights=None).eval()
    found = cut.cut(model, layer)
    assert isinstance(found, torch.fx.GraphModule)
    monkeypatch.setattr(cut, "_Proxy", torch.fx.Proxy)
    plain = cut.cut(model, layer)
    assert isinstance(plain, torch.fx.GraphModule) and found.code == plain.code


@pytest.mark.parametrize("where", ["getsitepackages", "getusersitepackages"])
def test_packages_of_the_system_and_of_the_user_count_by_version(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = types.ModuleType(f"package_of_{where}")
    own.__file__ = str(tmp_path / "own.py")
    own.__version__ = "1.2"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, own.__name__, own)
    monkeypatch.setattr(site, where, lambda: [str(tmp_path)] if where == "getsitepackages" else str(tmp_path))
    assert reach.package(own.__name__) == f"{own.__name__} 1.2"
