"""Where an epoch stands, and how another one goes on from there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

VERSION = 2
# Of the generators that decide the order: torch's global one (None), the loader's and its samplers'.
Owners = Sequence["torch.Generator | None"]


@dataclass
class Progress:
    """How far the consumer has come in an epoch."""

    # The states of `generators` before the epoch's `iter()`, which draws the base seed.
    generators: list[torch.Tensor] = field(default_factory=list)
    # The same before the first index was drawn; [] as long as it was not.
    drawn: list[torch.Tensor] = field(default_factory=list)
    # Key of the random augmentation, and what it is made of.
    seed: int | None = None
    base_seed: int | None = None
    rounds: int = 0
    batches: int = 0
    # Places of the sampler's order that are behind the consumer.
    samples: int = 0
    finished: bool = False
    # The iterator was there from the epoch before (persistent workers) and drew no new base seed.
    again: bool = False


def generators(loader: Any) -> list[torch.Generator | None]:
    """The generators that decide the order: torch's global one (None), the loader's and its samplers'."""
    found: list[torch.Generator | None] = [None]
    for owner in (loader, *samplers(loader)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is known for known in found):
            found.append(generator)
    return found


def samplers(loader: Any) -> list[Any]:
    """The objects that yield indices."""
    batches = loader.batch_sampler
    found = (batches, getattr(batches, "sampler", None), loader.sampler)
    return [sampler for sampler in found if sampler is not None]


def states(owners: Owners) -> list[torch.Tensor]:
    """The states of generators."""
    return [torch.get_rng_state() if one is None else one.get_state() for one in owners]


@contextmanager
def replayed(owners: Owners, saved: Sequence[torch.Tensor], *, fresh: bool) -> Iterator[bool]:
    """Inside, generators go on from the states `saved`; yields whether torch's global one had that state anyway.

    That one is put back afterwards: whoever has restored it for the model has done so for good. Unless the epoch is
    `fresh` and it has the saved state already: then the draws are the ones that come next, and count.
    """
    if not saved:
        yield True
        return
    if len(owners) != len(saved):
        raise ValueError(
            f"the state has {len(saved)} random generators, this loader {len(owners)}: load it into a "
            "loader that was made with the same sampler and generator arguments"
        )
    before = torch.get_rng_state()
    own = fresh and torch.equal(before, saved[0])
    try:
        restore(owners, saved)
        yield own
    finally:
        if not own:
            torch.set_rng_state(before)


def restore(owners: Owners, saved: Sequence[torch.Tensor]) -> None:
    """Puts generators into the states `saved`."""
    for generator, state in zip(owners, saved, strict=True):
        if generator is None:
            torch.set_rng_state(state)
        else:
            generator.set_state(state)


@contextmanager
def drawing(owners: Owners, progress: Progress, state: dict[str, Any] | None) -> Iterator[None]:
    """Around the draw of an epoch's first index, again as it was drawn for the epoch of `state`."""
    saved = [] if state is None else state["drawn"]
    with replayed(owners, saved, fresh=state is not None and state["batches"] == 0):
        progress.drawn = states(owners)
        yield


def described(loader: Any) -> dict[str, Any]:
    """What must be the same where a state is loaded."""
    sized = hasattr(loader.dataset, "__len__")
    return {
        "batch_size": loader.batch_size,
        "dataset": len(loader.dataset) if sized else None,
        "on_error": loader.on_error,
    }


def state(loader: Any, progress: Progress | None, iterator: Any) -> dict[str, Any]:
    """The state of a loader with an epoch under way, or between two: then everything the next one draws is in it."""
    owners = generators(loader)
    if progress is None or progress.finished:
        kept = iterator if loader.persistent_workers else None
        progress = Progress(states(owners), again=kept is not None)
        if kept is not None:
            progress.base_seed, progress.rounds = int(kept._base_seed), kept._epoch + 1
        drawn = []
    else:
        drawn = progress.drawn or states(owners)
    return {
        "version": VERSION,
        "generators": progress.generators,
        "drawn": drawn,
        "seed": progress.seed,
        "base_seed": progress.base_seed,
        "rounds": progress.rounds,
        "again": progress.again,
        "batches": progress.batches,
        "samples": progress.samples,
        **described(loader),
    }


def check(loader: Any, state: dict[str, Any]) -> None:
    """Whether `state` may be loaded.

    Raises:
        ValueError: When it is no state of a loader like this one; says what differs.
    """
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise ValueError(f"not a state of cnnrs.DataLoader (version {VERSION}): {str(state)[:80]}")
    for name, here in described(loader).items():
        if state[name] != here:
            what = "number of samples" if name == "dataset" else name
            raise ValueError(f"the state was saved with {what} {state[name]}, this loader has {here}")
