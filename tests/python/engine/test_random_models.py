"""Random models and runs, a few here and thousands with `make test-random`: all engines equal the loop or refuse."""

from __future__ import annotations

import pytest
import torch

from random_models import CHECKS, REFUSED, failures

SEEDS = 200
PARTS = 10


@pytest.mark.parametrize("engine", ["auto", "cpu", "torch"])
@pytest.mark.parametrize("part", range(PARTS))
def test_every_engine_equals_the_loop_and_the_module_or_refuses(part: int, engine: str) -> None:
    threads = torch.get_num_threads()
    # Models this small wait for threads more than they compute.
    torch.set_num_threads(1)
    REFUSED.clear()
    # "auto" gets all of them, the engines that are asked for every other one.
    first = part + PARTS * (engine == "cpu")
    seeds = range(first, SEEDS, PARTS if engine == "auto" else 2 * PARTS)
    try:
        found = [
            f"seed {seed}, {what} on {engine}: {text}" for seed in seeds
            for what, _, text in failures(seed, [engine])
        ]  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert not found, "\n".join([*found, "python tests/python/random_models.py --seed N --count 1 shows the steps"])
    assert sum(REFUSED.values()) < 0.7 * len(seeds) * len(CHECKS), "hardly any model was compared"
