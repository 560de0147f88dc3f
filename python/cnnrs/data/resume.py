"""Where an epoch stands, what is saved of it, and how another one goes on from there.

A ``DataLoader`` has the :class:`Progress` of its latest iterator, every iterator the one of its epoch. Its methods are
the only way from one stage to the next:

    BETWEEN or LOADED -- making, made -->  MADE
    MADE              -- drawing -->       DRAWING, and then DELIVERING, also when the sampler has raised
    DELIVERING        -- delivered -->     DELIVERING
    DELIVERING        -- finish -->        FINISHED

What a state holds, and why:

    BETWEEN     the generators as they are: the next epoch draws from these. With persistent workers also the base seed,
    FINISHED    because the same iterator goes on and draws no new one (``again``).
    LOADED      what was loaded: nothing has happened since, also when an ``iter()`` did not come to its end.
    MADE        ``generators`` from before ``iter()``, which draws the base seed. As ``drawn`` those of now: others may
                draw until the first index is due, and what they leave decides the order.
    DRAWING     ``drawn`` from before the sampler was asked: it may draw the whole order with its first index.
    DELIVERING  the same, the key of the augmentation, and how many batches and places of the sampler's order the
                consumer has had. What is on its way is not counted: it is read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch

VERSION = 2
# Of the generators that decide the order: torch's global one (None), the loader's and its samplers'.
Owners = Sequence["torch.Generator | None"]


class Stage(Enum):
    """Of an epoch."""

    BETWEEN = "between two epochs"
    LOADED = "loaded"
    MADE = "made, nothing drawn"
    DRAWING = "drawing its first index"
    DELIVERING = "delivering"
    FINISHED = "finished"


TRANSITIONS = {
    (Stage.BETWEEN, "made"): Stage.MADE,
    (Stage.LOADED, "made"): Stage.MADE,
    (Stage.MADE, "drawing"): Stage.DRAWING,
    (Stage.DRAWING, "drawn"): Stage.DELIVERING,
    (Stage.DELIVERING, "delivered"): Stage.DELIVERING,
    (Stage.DELIVERING, "finished"): Stage.FINISHED,
    # Samplers may go on behind their end.
    (Stage.FINISHED, "delivered"): Stage.FINISHED,
    (Stage.FINISHED, "finished"): Stage.FINISHED,
}


class Progress:
    """How far the consumer has come in an epoch.

    Attributes:
        stage: where it stands.
        resumes: whether it goes on from a state.
        generators: the states of the generators before the epoch's ``iter()``.
        drawn: the same before the first index was drawn, or is to be drawn again; [] as long as that is open.
        seed: key of the random augmentation, of images.
        base_seed, rounds: what the iterator makes the key of.
        again: whether the iterator was there from the epoch before (persistent workers) and drew no new base seed.
        batches: that were delivered.
        samples: places of the sampler's order that are behind the consumer.
    """

    def __init__(self, loaded: dict[str, Any] | None = None) -> None:
        self.stage = Stage.BETWEEN if loaded is None else Stage.LOADED
        self.resumes = loaded is not None
        self._loaded = loaded
        known = {} if loaded is None else loaded
        self.generators: list[torch.Tensor] = known.get("generators", [])
        self.drawn: list[torch.Tensor] = known.get("drawn", [])
        self.seed: int | None = known.get("seed")
        self.base_seed: int | None = known.get("base_seed")
        self.rounds: int = known.get("rounds", 0)
        self.again: bool = known.get("again", False)
        self.batches: int = known.get("batches", 0)
        self.samples: int = known.get("samples", 0)
        self._owners: Owners = []
        # Whether torch's generator had the state of ``generators`` anyway.
        self._own = True

    def next(self) -> Progress:
        """For the iterator that is made next, of this loader or of a copy: only what was loaded goes on."""
        return Progress(self._loaded if self.stage is Stage.LOADED else None)

    # -- transitions ---------------------------------------------------------------------------------------------------

    def _go(self, event: str) -> None:
        following = TRANSITIONS.get((self.stage, event))
        if following is None:
            raise RuntimeError(f"an epoch that is {self.stage.value} cannot be {event}")
        self.stage = following

    @contextmanager
    def making(self, owners: Owners, *, again: bool) -> Iterator[None]:
        """Around ``iter()``, at the end of which the iterator calls ``made``."""
        self._owners = owners
        if not self.resumes:
            self.generators, self.again = states(owners), again
        with replayed(owners, self.generators if self.resumes else [], fresh=self.batches == 0) as self._own:
            yield

    def rewinds(self) -> bool:
        """Whether the sampler is to be asked again: a new iterator has drawn a base seed, where the old one did not.

        The generators are then what they were before.
        """
        if self.resumes and self.again:
            restore(self._owners, self.generators)
        return self.resumes and self.again

    def made(self, base_seed: int, rounds: int) -> tuple[int, int]:
        """BETWEEN or LOADED -> MADE; returns the base seed and the number of the epoch that count."""
        self._go("made")
        if self.resumes and not self._own and not self.drawn:
            # What the order is drawn from, later, when torch's generator is back where it was.
            self.drawn = states(self._owners)
        if self.base_seed is None:
            self.base_seed, self.rounds = base_seed, rounds
        return self.base_seed, self.rounds

    def key(self, seed: int) -> int:
        """The key of the augmentation: ``seed``, or that of the epoch that goes on."""
        if self.seed is None:
            self.seed = seed
        return self.seed

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """MADE -> DRAWING -> DELIVERING: around the draw of the first index, as it was for the epoch that goes on."""
        self._go("drawing")
        try:
            with replayed(self._owners, self.drawn, fresh=self.batches == 0):
                self.drawn = states(self._owners)
                yield
        finally:
            self._go("drawn")

    def delivered(self, samples: int) -> None:
        """The consumer has one more batch, and ``samples`` places of the order are behind it."""
        # Once per batch: the usual stage needs no look at the table.
        if self.stage is not Stage.DELIVERING:
            self._go("delivered")
        self.batches += 1
        self.samples = samples

    def finish(self) -> None:
        """DELIVERING -> FINISHED."""
        self._go("finished")

    # -- what is saved -------------------------------------------------------------------------------------------------

    def state(self, loader: Any) -> dict[str, Any]:
        """What another loader goes on from."""
        if self._loaded is not None and self.stage is Stage.LOADED:
            return self._loaded
        owners = generators(loader)
        found = self
        drawn: list[torch.Tensor] = []
        if self.stage in (Stage.BETWEEN, Stage.FINISHED):
            found = Progress()
            found.generators = states(owners)
            kept = loader._iterator if loader.persistent_workers else None
            if kept is not None:
                found.again = True
                found.base_seed, found.rounds = kept.following()
        else:
            drawn = self.drawn or states(owners)
        return {
            "version": VERSION,
            "generators": found.generators,
            "drawn": drawn,
            "seed": found.seed,
            "base_seed": found.base_seed,
            "rounds": found.rounds,
            "again": found.again,
            "batches": found.batches,
            "samples": found.samples,
            **described(loader),
        }


def current(state: Any) -> Any:
    """A state of version 1 as one of today; any other as it is.

    Its generators are those before the epoch's ``iter()``, too; the order was drawn right behind the base seed.
    """
    if not isinstance(state, dict) or state.get("version") != 1:
        return state
    seed = state.get("seed") if state.get("generators") else None
    return {**state, "version": VERSION, "drawn": [], "seed": seed, "base_seed": None, "rounds": 0}


def check(loader: Any, state: dict[str, Any]) -> None:
    """Whether ``state`` may be loaded.

    Raises:
        ValueError: it is no state of a loader like this one; says what differs.
    """
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise ValueError(f"not a state of cnnrs.DataLoader (version {VERSION}): {str(state)[:80]}")
    if missing := [name for name in ("generators", "batches", "samples", *described(loader)) if name not in state]:
        raise ValueError(f"not a state of cnnrs.DataLoader: it has no {', '.join(missing)}")
    for name, here in described(loader).items():
        if state[name] != here:
            what = "number of samples" if name == "dataset" else name
            raise ValueError(f"the state was saved with {what} {state[name]}, this loader has {here}")


def described(loader: Any) -> dict[str, Any]:
    """What must be the same where a state is loaded."""
    sized = hasattr(loader.dataset, "__len__")
    return {
        "batch_size": loader.batch_size,
        "dataset": len(loader.dataset) if sized else None,
        "on_error": loader.on_error,
    }


# -- generators --------------------------------------------------------------------------------------------------------


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


def restore(owners: Owners, saved: Sequence[torch.Tensor]) -> None:
    """Puts generators into the states ``saved``."""
    for generator, state in zip(owners, saved, strict=True):
        if generator is None:
            torch.set_rng_state(state)
        else:
            generator.set_state(state)


@contextmanager
def replayed(owners: Owners, saved: Sequence[torch.Tensor], *, fresh: bool) -> Iterator[bool]:
    """Inside, generators go on from the states ``saved``; yields whether torch's global one had that state anyway.

    That one is put back afterwards: whoever has restored it for the model has done so for good. Unless the epoch is
    ``fresh`` and it has the saved state already: then the draws are the ones that come next, and count.
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
