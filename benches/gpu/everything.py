"""All that is measured, for `make bench`."""

from collections.abc import Iterator
from typing import Any

from gpu import ceilings, features, judgement, training
from gpu.scale import FULL
from gpu.trial import record


def comparisons() -> Iterator[Any]:
    """What was found, then beside what had been predicted."""
    records = []
    for part, trials in (("ceilings", ceilings.trials), ("preconv", features.trials), ("fit", training.trials)):
        for trial in trials(FULL):
            yield trial
            records.append(record(part, trial))
    yield judgement.Judgement(records)
