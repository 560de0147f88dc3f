"""A comparison that goes on without a contender that fails, and what is kept of it."""

import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from measure import Comparison, Contender


@dataclass
class Trial(Comparison):
    """On a device nobody has tried: an error of one contender is told and costs the others nothing."""

    #: Who failed, and who was not asked.
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def measure(self) -> "Trial":
        """As ever, without those that fail."""
        for contender in list(self.contenders):
            self._time(contender)
            contender.seconds.clear()
        for _ in range(self.rounds):
            for contender in list(self.contenders):
                self._time(contender)
        return self

    def _time(self, contender: Contender) -> None:
        start = time.perf_counter()
        try:
            contender.amount = contender.run()
        except Exception as error:
            traceback.print_exc()
            line = str(error).split("\n")[0]
            self.failures.append(f"{contender.name}: failed ({type(error).__name__}: {line})")
            self.contenders.remove(contender)
        contender.seconds.append(time.perf_counter() - start)

    def table(self) -> str:
        """The table, then who failed."""
        made = super().table() if self.contenders else f"### {self.work}\n"
        words = [*self.notes, *self.failures]
        return "\n".join([made, *words, ""]) if words else made

    def figures(self) -> dict[str, list[float]]:
        """What each round gave, by contender."""
        return {one.name: [self.figure(one, seconds) for seconds in one.seconds] for one in self.contenders}


def record(part: str, trial: Any) -> dict[str, Any]:
    """A measured trial as JSON."""
    return {
        "part": part,
        "work": trial.work,
        "unit": trial.unit,
        "figures": trial.figures(),
        "failures": trial.failures,
        "table": trial.table(),
    }
