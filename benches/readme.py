"""The README's table of figures, taken from RESULTS.md: ``make bench`` puts it there, a test says whether it is."""

import re
from pathlib import Path

HERE = Path(__file__).parent
#: Contenders that the README compares with.
THEIRS = ("torchvision + DataLoader", "the tutorial's loop", "torch eager", "ONNX Runtime", "OpenVINO")
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
        if not theirs or not ours:
            continue
        fastest = max(theirs, key=lambda name: float(cells[name].replace(",", "")))
        ratio = better[1] if better else ratios[ours[0]]
        rows.append(f"| {title} | {cells[fastest]} {unit[1]} | {cells[ours[0]]} {unit[1]} | {ratio} |")
    machine = re.search(r"^- CPU: (.*?), Linux|^- CPU: (.*?); GPU", results, flags=re.M)
    versions = re.search(r"^- (Python .*)$", results, flags=re.M)
    date = re.search(r"\d{4}-\d{2}-\d{2}", results)
    assert machine and versions and date
    where = f"{machine[1] or machine[2]}; {versions[1]}; {date[0]}"
    return "\n".join(
        [*rows, "", f"{where}. Spread and other contenders: [benches/RESULTS.md](benches/RESULTS.md).", ""]
    )


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
