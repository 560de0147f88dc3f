"""Benchmarks that look into `fit` find there what they measure."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHES = Path(__file__).resolve().parents[3] / "benches"


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`benches` as it is for a script that lies there."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHES))
    import fit_cases
    import fit_costs
    import network_costs
    import network_profile

    yield fit_cases, fit_costs, network_costs, network_profile
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHES:
            del sys.modules[name]


def small() -> nn.Module:
    """A layer of every kind that has a row of its own."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.SiLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def test_a_profile_names_every_kind_of_operation(benches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, _, _, profile = benches
    monkeypatch.setattr(profile, "products", lambda: 1e11)
    found = profile.Profile([cases.Case("small", small, (3, 16, 16), 4, 10, 1, momentum=0.9)]).measure().table()
    rows = [line.split(" | ") for line in found.splitlines() if " | native | " in line or " | PyTorch | " in line]
    kinds = {(what.removeprefix("| "), part, by) for what, part, by, *_ in rows}
    conv = {("3 x 3, stride 1", part, "native") for part in ("forward", "input gradient", "weight gradient")}
    norm = {("batch norm, sum, activation", part, "native") for part in ("forward", "backward")}
    depthwise = {("depthwise", part, "PyTorch") for part in ("forward", "input gradient")}
    theirs = {
        (what, part, "PyTorch")
        for what in ("1 x 1", "other convolutions", "linear layers")
        for part in ("forward", "both gradients")
    }
    fused = {(what, part, "native") for what in ("1 x 1", "depthwise") for part in ("forward", "both gradients")}
    wanted = (
        conv
        | norm
        | depthwise
        | theirs
        | fused
        | {("depthwise", "weight gradient", "native"), ("update", "", "PyTorch")}
    )
    assert {kind for kind in kinds if kind[0] != "rest"} == wanted
    # Forward: 2 x 9 x 16 x 16 per pixel of four images of 8 x 8.
    assert [row[5] for row in rows if row[0] == "| 3 x 3, stride 1"] == ["0.00118"] * 3
    shares = [float(row[4].split()[0]) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))


def test_what_comes_before_the_first_step_is_found(benches: Any) -> None:
    cases, _, costs, _ = benches
    preparation = costs.Preparation([cases.Case("small", small, (3, 16, 16), 4, 10, 1)]).measure()
    ((_, total, *pieces, later),) = preparation.rows
    assert len(pieces) == len(preparation.pieces) and 0 < pieces[0] <= sum(pieces) <= total
    assert later > 0


@pytest.mark.parametrize(("kind", "states"), [("SGD", 1), ("Adam", 2), ("AdamW", 2)])
def test_the_limit_of_a_head_counts_what_the_optimizer_keeps(
    benches: Any, kind: str, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, costs, *_ = benches
    monkeypatch.setattr(costs, "bandwidth", lambda: 4e6)
    case = cases.Case("head", lambda: nn.Linear(9, 100), (9,), 4, 10, 2, momentum=0.5, kind=kind)
    assert type(case.optimizer(torch.nn.Linear(1, 1))).__name__ == kind
    who = costs.Contender("the tutorial's loop", lambda: 2)
    table = costs.Head(case, [who]).measure().table()
    # 1,000 numbers of four bytes, read and written, at 4 MB/s.
    assert f" | {2 * (1 + states)} | | " in table
    assert ("Taken together" in table) == (kind == "SGD")
