"""The stages of an epoch: what leads from one to the next, and what is saved in each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler, Sampler, TensorDataset

from cnnrs.data.loader import DataLoader
from cnnrs.data.resume import VERSION, Progress, Stage

SIZE = 20


def states() -> list[torch.Tensor]:
    return [torch.get_rng_state()]


def seeded(seed: int) -> list[torch.Tensor]:
    return [torch.Generator().manual_seed(seed).get_state()]


def loaded() -> dict[str, Any]:
    """A state as version 2 has written it, two batches of four into an epoch."""
    return {
        "version": 2, "generators": seeded(1), "drawn": seeded(2), "seed": None, "base_seed": 5, "rounds": 0,
        "again": False, "batches": 2, "samples": 8, "batch_size": 4, "dataset": SIZE, "on_error": "raise", "epoch": 3,
        "errors": [],
    }  # fmt: skip


def draw(progress: Progress) -> None:
    with progress.drawing():
        pass


EVENTS: dict[str, Callable[[Progress], Any]] = {
    "made": lambda progress: progress.made(7, 0),
    "draw": draw,
    "delivered": lambda progress: progress.delivered(4),
    "finish": lambda progress: progress.finish(),
}
# What leads to each stage.
WAYS: dict[Stage, tuple[str, ...]] = {
    Stage.BETWEEN: (),
    Stage.LOADED: (),
    Stage.MADE: ("made",),
    Stage.DRAWING: ("made",),
    Stage.DELIVERING: ("made", "draw"),
    Stage.FINISHED: ("made", "draw", "delivered", "finish"),
}
TABLE = {
    (Stage.BETWEEN, "made"): Stage.MADE,
    (Stage.LOADED, "made"): Stage.MADE,
    (Stage.MADE, "draw"): Stage.DELIVERING,
    (Stage.DELIVERING, "delivered"): Stage.DELIVERING,
    (Stage.DELIVERING, "finish"): Stage.FINISHED,
    (Stage.FINISHED, "delivered"): Stage.FINISHED,
    (Stage.FINISHED, "finish"): Stage.FINISHED,
}


@pytest.mark.parametrize(("stage", "event"), list(itertools.product(Stage, EVENTS)))
def test_each_event_leads_where_the_table_says_or_is_refused(stage: Stage, event: str) -> None:
    for resumes in {stage is Stage.LOADED, stage is not Stage.BETWEEN}:
        progress = Progress(loaded() if resumes else None)
        with ExitStack() as inside:
            inside.enter_context(progress.making([None], again=False))
            for step in WAYS[stage]:
                EVENTS[step](progress)
            if stage is Stage.DRAWING:
                inside.enter_context(progress.drawing())
            assert progress.stage is stage and progress.resumes == resumes
            following = TABLE.get((stage, event))
            if following is None:
                with pytest.raises(RuntimeError, match=f"an epoch that is {stage.value} cannot be"):
                    EVENTS[event](progress)
            else:
                EVENTS[event](progress)
            assert progress.stage is (following or stage)


def test_a_draw_that_fails_is_not_repeated() -> None:
    progress = Progress()
    with progress.making([None], again=False):
        progress.made(7, 0)
    with pytest.raises(KeyboardInterrupt), progress.drawing():
        raise KeyboardInterrupt
    assert progress.stage is Stage.DELIVERING


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_what_is_saved_in_each_stage() -> None:
    loader = DataLoader(TensorDataset(torch.arange(SIZE)), 4, shuffle=True)

    def check(generators: list[torch.Tensor], drawn: list[torch.Tensor], batches: int) -> None:
        state = loader.state_dict()
        assert same(state["generators"], generators) and same(state["drawn"], drawn)
        assert (state["batches"], state["samples"]) == (batches, 4 * batches)
        # Somebody else, whose draws count only as long as the order is open.
        torch.rand(1)

    for _ in range(2):
        check(states(), [], 0)
        check(states(), [], 0)
        before = states()
        iterator = iter(loader)
        check(before, states(), 0)
        check(before, states(), 0)
        drawn = states()
        for batch in range(SIZE // 4):
            next(iterator)
            check(before, drawn, batch + 1)
        assert next(iterator, None) is None
        check(states(), [], 0)


def test_a_state_of_version_2_is_kept_and_gone_on_from() -> None:
    torch.set_rng_state(seeded(2)[0])
    order = torch.tensor(list(RandomSampler(range(SIZE))))
    assert VERSION == 2
    loader = DataLoader(TensorDataset(torch.arange(SIZE)), 4, shuffle=True)
    loader.load_state_dict(loaded())
    state = loader.state_dict()
    assert list(state) == list(loaded())
    for key, value in loaded().items():
        assert same(state[key], value) if key in ("generators", "drawn") else state[key] == value
    found = [rows for (rows,) in loader]
    assert torch.equal(torch.cat(found), order[8:])


class Interrupted(Sampler[int]):
    """Ctrl-C meets its first draw, once."""

    def __init__(self) -> None:
        self.met = False

    def __iter__(self) -> Iterator[int]:
        if not self.met:
            self.met = True
            raise KeyboardInterrupt
        yield from torch.randperm(SIZE).tolist()

    def __len__(self) -> int:
        return SIZE


def test_an_interrupted_iter_does_not_forget_what_was_loaded() -> None:
    dataset = TensorDataset(torch.arange(SIZE))
    expected = DataLoader(dataset, 4, sampler=Interrupted(), num_workers=2)
    expected.sampler.met = True  # type: ignore[attr-defined]
    expected.load_state_dict(loaded())
    loader = DataLoader(dataset, 4, sampler=Interrupted(), num_workers=2)
    loader.load_state_dict(loaded())
    with pytest.raises(KeyboardInterrupt):
        iter(loader)
    assert loader.state_dict()["batches"] == 2
    for (found,), (rows,) in zip(loader, expected, strict=True):
        assert torch.equal(found, rows)


@pytest.mark.parametrize("state", [{"version": 1}, {"version": 2}, {"version": 3}, {}, None])
def test_what_is_no_state_is_refused_in_words(state: Any) -> None:
    loader = DataLoader(TensorDataset(torch.arange(4)))
    with pytest.raises(ValueError, match=r"not a state of cnnrs\.DataLoader"):
        loader.load_state_dict(state)
