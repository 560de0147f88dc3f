"""The README's table of figures, taken from RESULTS.md: ``make bench`` puts it there, a test says whether it is."""

import re
from pathlib import Path

HERE = Path(__file__).parent
#: Contenders that the README compares with.
THEIRS = (
    "torchvision + DataLoader", "the tutorial's loop", "the plain loop", "torch eager", "ONNX Runtime", "OpenVINO",
)  # fmt: skip
LINK = "[benches/RESULTS.md](benches/RESULTS.md)"
#: What a reader wants to know first, where cnnrs gains little included; the beginnings of titles.
SHOWN = (
    "Loading: 700 photos", "Loading: 32 large photos", "Training: MnistNet, batches of 32", "Training: CatDogNet",
    "Training: head of VGG16 (25088-4096-4096-2), batches of 64", "Training: resnet18 at 224 x 224",
    "Validation: resnet18 at 224 x 224",
    "Frozen vgg16.features, batches of 8", "Frozen resnet50", "Frozen efficientnet_lite0",
)  # fmt: skip
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


def figures(results: str) -> str:
    """The table as Markdown.

    Args:
        results: the text of RESULTS.md.
    """
    rows = ["| | the best of the others | cnnrs | times as fast |", "|---|---:|---:|---:|"]
    for section in re.split(r"^### ", results, flags=re.M)[1:]:
        title = section.splitlines()[0]
        unit = re.search(r"^\| who \| median (\S+) ", section, flags=re.M)
        if unit is None:
            continue
        cells = dict(re.findall(r"^\| ([^|]+) \| ([\d.,]+) \|", section, flags=re.M))
        ratios = dict(re.findall(r"^\| ([^|]+) \|.*\| ([\d.,]+) \|$", section, flags=re.M))
        better = re.search(
            r"cnnrs is ([\d.,]+) times as fast as the (?:better of torchvision's two|best of the others)", section
        )
        theirs = [name for name in cells if name.startswith(THEIRS)]
        ours = [
            name
            for name in cells
            if re.match(r"cnnrs, \d+ threads|cnnrs\.fit, engine='auto'|cnnrs, engine='cpu'$", name)
        ]
        if not theirs or not ours or not title.startswith(SHOWN):
            continue
        best = max if unit[1].endswith("/s") else min
        fastest = best(theirs, key=lambda name: float(cells[name].replace(",", "")))
        ratio = better[1] if better else ratios[ours[0]]
        rows.append(f"| {title} | {cells[fastest]} {unit[1]} | {cells[ours[0]]} {unit[1]} | {ratio} |")
    return "\n".join([*rows, "", f"{where(results)}. Spread, other contenders, all measurements: {LINK}.", ""])


def where(results: str) -> str:
    """The machine, versions and day of the parts, those of each group of parts where they differ."""
    parts: dict[str, list[str]] = {}
    found = re.split(r"^## (\w+)$", results, flags=re.M)[1:]
    for name, text in zip(found[::2], found[1::2], strict=True):
        machine = re.search(r"^- CPU: (.*?); GPU", text, flags=re.M)
        versions = re.search(r"^- (Python .*)$", text, flags=re.M)
        date = re.search(r"\d{4}-\d{2}-\d{2}", text)
        assert machine and versions and date
        parts.setdefault(f"{machine[1]}; {versions[1]}; {date[0]}", []).append(name)
    if len(parts) == 1:
        return next(iter(parts))
    return "; ".join(f"**{', '.join(names)}**: {text}" for text, names in parts.items())


def update(readme: str, results: str) -> str:
    """The README with the table of today.

    Raises:
        ValueError: the README has no place for it.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}{figures(results)}{END}{after}"


def main() -> None:
    """Write the table into the README."""
    readme = HERE.parent / "README.md"
    readme.write_text(update(readme.read_text(), (HERE / "RESULTS.md").read_text()))


if __name__ == "__main__":
    main()
