"""Where an epoch stands, and how another one goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

VERSION = 1


@dataclass
class Progress:
    """How far the consumer has come in an epoch."""

    # The states of `generators` before the order was drawn.
    generators: list[torch.Tensor] = field(default_factory=list)
    # Key of the random augmentation.
    seed: int = 0
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


def states(loader: Any) -> list[torch.Tensor]:
    """The states of `generators`."""
    return [torch.get_rng_state() if one is None else one.get_state() for one in generators(loader)]


@contextmanager
def replay(loader: Any, state: dict[str, Any] | None) -> Iterator[None]:
    """Inside, the order is drawn again as it was drawn for the epoch of `state`.

    torch's global generator is put back afterwards: whoever restores it for the model has done so for good.
    """
    if state is None or not state["generators"]:
        yield
        return
    now = generators(loader)
    if len(now) != len(state["generators"]):
        raise ValueError(
            f"the state has {len(state['generators'])} random generators, this loader {len(now)}: load it into a "
            "loader that was made with the same sampler and generator arguments"
        )
    before = torch.get_rng_state()
    try:
        restore(loader, state)
        yield
    finally:
        torch.set_rng_state(before)


def restore(loader: Any, state: dict[str, Any]) -> None:
    """Puts all generators where they were before the order of the epoch of `state` was drawn."""
    for generator, saved in zip(generators(loader), state["generators"], strict=True):
        if generator is None:
            torch.set_rng_state(saved)
        else:
            generator.set_state(saved)


def described(loader: Any) -> dict[str, Any]:
    """What must be the same where a state is loaded."""
    sized = hasattr(loader.dataset, "__len__")
    return {
        "batch_size": loader.batch_size,
        "dataset": len(loader.dataset) if sized else None,
        "on_error": loader.on_error,
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
