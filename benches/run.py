"""``make bench`` writes RESULTS.md beside this file; ``python benches/run.py loader`` only prints that benchmark."""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import fit
import folders
import loader
import preconv
from measure import machine, show

HERE = Path(__file__).parent
BENCHMARKS = {
    "loader": loader.comparisons,
    "folders": folders.comparisons,
    "preconv": preconv.comparisons,
    "fit": fit.comparisons,
}


def main() -> None:
    """Measure what the arguments name, or everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], help="default: all, into RESULTS.md")
    names = parser.parse_args().names
    load = os.getloadavg()[0]
    tables = [comparison.measure().table() for name in names or BENCHMARKS for comparison in BENCHMARKS[name]()]
    if names:
        print("\n".join(tables))
        return
    text = "\n".join(
        [
            "# Benchmarks",
            "",
            "Written by `make bench`; do not edit. Contenders are warmed up and measured in turn; a ratio is the",
            "median of the ratios of single rounds. Compare figures within this file only.",
            "",
            machine(load),
            "",
            *tables,
            import_time(),
        ]
    )
    (HERE / "RESULTS.md").write_text(text)
    print(text)


def import_time(runs: int = 7) -> str:
    """What ``import cnnrs`` costs beyond ``import torch``, in fresh interpreters."""
    code = "import time; import torch; start = time.perf_counter(); import cnnrs; print(time.perf_counter() - start)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(runs + 1)
    ][1:]
    figures = [1000 * s for s in seconds]
    return (
        f"### `import cnnrs` beyond `import torch`\n\n{show(statistics.median(figures))} ms "
        f"({show(min(figures))} to {show(max(figures))}, n = {runs}).\n"
    )


if __name__ == "__main__":
    main()
