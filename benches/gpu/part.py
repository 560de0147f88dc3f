"""One part of `scripts/gpu-check.sh`, alone in its process: ``python -m gpu.features DEVICE OUT``."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import machine

from gpu.scale import SCALES, Scale
from gpu.trial import record


def main(part: str, trials: Callable[[Scale], Iterator[Any]]) -> None:
    """Measure everything, whatever fails; exit with 1 when something did.

    What is measured goes to results.jsonl at once, so that it outlives whatever comes after it.
    """
    device, out = sys.argv[1:]
    failed = False
    with (Path(out) / "results.jsonl").open("a") as results:

        def keep(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=results, flush=True)

        keep({"machine": machine(os.getloadavg()[0])})
        for trial in trials(SCALES[device]):
            try:
                trial.measure()
            except Exception:
                # Of which no contender was to blame.
                traceback.print_exc()
                failed = True
                continue
            print(trial.table(), flush=True)
            keep(record(part, trial))
            failed = failed or bool(trial.failures)
    sys.exit(failed)
