"""``make bench`` writes RESULTS.md beside this file; ``python benches/run.py loader`` renews that part of it.

``python benches/run.py zoo --only resnet18 vgg16`` measures these networks and prints the table, which is not kept.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import classifier
import fit
import folders
import loader
import networks
import preconv
import readme
import torch
import torchvision
import trainings
import zoo
from gpu import everything
from measure import machine, show

HERE = Path(__file__).parent
BENCHMARKS = {
    "loader": loader.comparisons,
    "folders": folders.comparisons,
    "fit": fit.comparisons,
    "networks": networks.comparisons,
    "preconv": preconv.comparisons,
    "zoo": zoo.comparisons,
    "timm": zoo.others,
    "classifier": classifier.comparisons,
    "trainings": trainings.comparisons,
    "gpu": everything.comparisons,
}
RESULTS = HERE / "RESULTS.md"
HEAD = """# Benchmarks

Written by `make bench`; do not edit. Contenders are warmed up and measured in turn; a ratio is the
median of the ratios of single rounds. Each part is one run: compare figures within a part only.
"""


def main() -> None:
    """Measure what the arguments name, or everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], help="default: all")
    parser.add_argument(
        "--gpu", type=Path, help="results.md that scripts/gpu-check.sh left elsewhere: taken as part gpu"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NETWORK", help="of part zoo: not kept")
    options = parser.parse_args()
    if options.only:
        if options.names != ["zoo"]:
            parser.error("--only is for part zoo: python benches/run.py zoo --only resnet18")
        known = {*torchvision.models.list_models(torchvision.models)}
        if unknown := sorted(name for name in options.only if name not in known and not name.startswith("timm:")):
            parser.error(f"torchvision.models has no {', '.join(unknown)}")
        print(zoo.some(options.only).measure().table(), flush=True)
        return
    if options.gpu is not None:
        text = options.gpu.read_text()
        if "GPU: none" in text:
            parser.error(f"{options.gpu} is a rehearsal without a GPU")
        keep("gpu", text)
        return
    for name in options.names or BENCHMARKS:
        if name == "gpu" and not torch.cuda.is_available():
            print("gpu: left out, there is no GPU here", file=sys.stderr)
            continue
        # Of the code that is measured: others may commit meanwhile.
        tables = [machine(os.getloadavg()[0]), ""]
        for comparison in BENCHMARKS[name]():
            tables.append(comparison.measure().table())
            print(tables[-1], flush=True)
        if name == "loader":
            tables.append(import_time())
        # After each, so that nothing is lost when a later one fails.
        keep(name, "\n".join(tables))


def keep(name: str, part: str) -> None:
    """Put a part into RESULTS.md, and its figures into the README."""
    text = RESULTS.read_text() if RESULTS.exists() else ""
    RESULTS.write_text(together({**parts(text), name: part}))
    readme.main()


def parts(results: str) -> dict[str, str]:
    """What RESULTS.md says now, by benchmark."""
    found = re.split(r"^## (\w+)\n\n", results, flags=re.M)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


def together(found: dict[str, str]) -> str:
    """RESULTS.md of these parts."""
    ordered = [f"## {name}\n\n{found[name].rstrip()}\n" for name in BENCHMARKS if name in found]
    return "\n".join([HEAD, *ordered])


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
