"""The page: what was measured, in the order in which somebody asks."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cnnrs.history import History
from cnnrs.metrics import Confusion, Loss, calibration, confusion, top_losses
from cnnrs.report.charts import curves, reliability

if TYPE_CHECKING:
    from cnnrs.runs import Run

# A matrix of more classes is unreadable: the most frequent confusions are listed instead.
MATRIX_CLASSES = 16
# From here on the names of the columns stand upright.
_UPRIGHT_CLASSES = 5
MISTAKES = 12
_THUMBNAIL = 260
_LISTED = 50


@dataclass(frozen=True)
class Evidence:
    """What the validation photos showed.

    Attributes:
        history: losses and accuracies of the epochs.
        best: epoch whose weights were kept, counted from 0.
        scores: (N, C) outputs before softmax, of the best epoch.
        labels: (N,) true class numbers.
        paths: N photos, None where unknown.
        classes: C names.
    """

    history: History
    best: int
    scores: Tensor
    labels: Tensor
    paths: list[str] | None
    classes: list[str]


def write_report(
    path: Path,
    facts: Mapping[str, Any],
    evidence: Evidence,
    run: Run,
    stages: Mapping[str, float],
    skipped: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page; a failure leaves an older one as it was.

    Args:
        path: ``report.html``.
        facts: what ``model.json`` says about data, weights, command and versions.
        evidence: what the validation photos showed.
        run: the classifier.
        stages: seconds by stage.
        skipped: (path, reason) of photos that were left out.
    """
    partial = path.with_name(f"{path.name}.partial")
    # Names that are no UTF-8 are shown with escapes.
    partial.write_text(page(facts, evidence, run, stages, skipped), encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


def page(
    facts: Mapping[str, Any],
    evidence: Evidence,
    run: Run,
    stages: Mapping[str, float],
    skipped: Sequence[tuple[str, str]] = (),
) -> str:
    """The page as text: no script, no link to anything outside."""
    found = confusion(evidence.labels, evidence.scores, evidence.classes)
    name = Path(str(facts["data"])).name
    right = int(found.matrix.diagonal().sum())
    total = int(found.matrix.sum())
    sections = [
        _section("Curves", _curves(evidence)),
        _section("Which class is taken for which", _matrix(found)),
        _section("Class by class", _per_class(found)),
        _section("The worst mistakes", _mistakes(evidence)),
        _section("How sure it is", _sureness(evidence)),
        _section("Where the time went", _time(stages)),
        _section("Photos that were left out", _skipped(skipped)) if skipped else "",
        _section("How it was made", _made(facts, run)),
    ]
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(name)}: {found.accuracy:.2f} %</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(name)}, classified by {escape(run.backbone)}</h1>
<p class="result">{found.accuracy:.2f}<small> % right</small></p>
<p class="soft">{right:,} of {total:,} validation photos{_luck(right, total)}. The weights are those of the epoch that
did best on these very photos, so new photos may do slightly worse.</p>
</header>
{_tiles(facts, evidence, stages)}
<main>
{"".join(sections)}</main>
</body>
</html>
"""


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>\n"


def _luck(right: int, total: int) -> str:
    """How far the figure depends on which photos were held back: Wilson's interval of 95 %."""
    share, z = right / total, 1.96
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return f"; as many others would give {100 * (middle - half):.0f} to {100 * (middle + half):.0f} %, 19 times in 20"


def _tiles(facts: Mapping[str, Any], evidence: Evidence, stages: Mapping[str, float]) -> str:
    tiles = {
        "training photos": f"{facts['train_photos']:,}",
        "validation photos": f"{facts['valid_photos']:,}",
        "classes": f"{len(evidence.classes):,}",
        "best epoch": f"{evidence.best + 1} of {len(evidence.history)}",
        "time": duration(sum(stages.values())),
    }
    inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles.items())
    return f'<dl class="tiles">{inner}</dl>'


def _curves(evidence: Evidence) -> str:
    history = evidence.history
    loss = curves(
        "Loss per photo over the epochs", "loss per photo",
        [("training", "train", history.train_losses), ("validation", "valid", history.val_losses)],
        evidence.best, 0.0, None,
    )  # fmt: skip
    accuracy = curves(
        "Accuracy in percent over the epochs", "accuracy, %",
        [("training", "train", history.train_accuracy), ("validation", "valid", history.val_accuracy)],
        evidence.best, 90.0, 100.0,
    )  # fmt: skip
    names = {"train": "training", "valid": "validation", "rule": "weights kept"}
    legend = "".join(f'<li class="{style}">{name}</li>' for style, name in names.items())
    figures = f'<div class="pair"><figure>{loss}</figure><figure>{accuracy}</figure></div>'
    return f'{figures}<ul class="legend">{legend}</ul>{_words(evidence)}'


def _words(evidence: Evidence) -> str:
    """What the curves say, for those who see such curves for the first time."""
    history, best = evidence.history, evidence.best
    last = len(history) - 1
    rising = history.val_losses[last] > 1.1 * min(history.val_losses) and last > best
    gap = history.train_accuracy[last] - history.val_accuracy[last]
    if rising:
        text = (
            "The validation loss has begun to rise: more epochs would learn the training photos by heart. "
            "More photos, or a simpler head, would help."
        )
    elif gap > 5:
        text = (
            f"The training photos are recognised {gap:.0f} points better than the validation photos: "
            "more photos would help."
        )
    elif best == last and history.val_accuracy[last] > history.val_accuracy[last // 2]:
        text = "The last epoch was the best: more epochs may still improve it."
    else:
        return ""
    return f'<p class="soft">{escape(text)}</p>'


def _matrix(found: Confusion) -> str:
    pairs = found.most_confused()
    listed = "".join(f"<li>{escape(a)} taken for {escape(b)}: {n:,}</li>" for a, b, n in pairs)
    if len(found.classes) > MATRIX_CLASSES:
        return f"<ol>{listed}</ol>" if listed else "<p>No photo was taken for another class.</p>"
    rows = []
    for name, row in zip(found.classes, found.matrix.tolist(), strict=True):
        total = sum(row) or 1
        cells = "".join(_cell(count, count / total) for count in row)
        rows.append(f'<tr><th scope="row" title="{escape(name)}">{escape(name)}</th>{cells}</tr>')
    heads = [f'<th scope="col" title="{escape(name)}"><span>{escape(name)}</span></th>' for name in found.classes]
    style = "matrix upright" if len(heads) >= _UPRIGHT_CLASSES else "matrix"
    return (
        '<p class="soft">Rows: what is on the photo. Columns: what it was taken for.</p>'
        f'<div class="scroll"><table class="{style}"><thead><tr><td></td>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(count: int, share: float) -> str:
    # Few photos in a cell must still be told from none.
    strength = 0.0 if count == 0 else 0.08 + 0.87 * share
    kind = ' class="deep"' if strength > 0.55 else ' class="none"' if count == 0 else ""
    return f'<td{kind} style="--share:{strength:.2f}">{count:,}</td>'


def _per_class(found: Confusion) -> str:
    rows = []
    order = sorted(range(len(found.classes)), key=lambda i: (found.recall[i] if found.support[i] else 101, i))
    recall, precision, support = found.recall, found.precision, found.support
    for i in order if len(order) > MATRIX_CLASSES else range(len(order)):
        rows.append(
            f'<tr><td>{escape(found.classes[i])}</td><td class="number">{support[i]:,}</td>'
            f'<td class="number">{_percent(recall[i])}</td><td class="number">{_percent(precision[i])}</td></tr>'
        )
    head = '<th scope="col">class</th>' + "".join(
        f'<th scope="col" class="number">{name}</th>' for name in ("photos", "recall", "precision")
    )
    return (
        '<p class="soft">Recall: how many photos of the class are found. Precision: how many photos given this class '
        f'are of it.</p><div class="scroll"><table class="classes"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _percent(value: float) -> str:
    if math.isnan(value):
        return '<span class="soft">none</span>'
    return f'{value:.1f} %<span class="bar" aria-hidden="true"><i style="width:{value:.1f}%"></i></span>'


def _mistakes(evidence: Evidence) -> str:
    worst = top_losses(evidence.scores, evidence.labels, evidence.paths, evidence.classes, MISTAKES, wrong_only=True)
    if not len(worst):
        return "<p>None: every validation photo is recognised. A larger validation folder would tell more.</p>"
    wrong = int((evidence.scores.argmax(dim=1) != evidence.labels).sum())
    text = f"{wrong:,} photos are wrong; " + (
        "these it was surest about." if wrong > len(worst) else "the surest first."
    )
    text += " A wrong label in the folder often shows up here."
    return f'<p class="soft">{text}</p><div class="mistakes">{"".join(_figure(one) for one in worst)}</div>'


def _figure(one: Loss) -> str:
    image = _thumbnail(one.path)
    name = Path(one.path).name if one.path else f"row {one.index}"
    picture = (
        f'<img src="data:image/jpeg;base64,{image}" alt="{escape(one.target)}">'
        if image
        else '<div class="gone">photo not found</div>'
    )
    return (
        f"<figure>{picture}<figcaption>{escape(one.target)}, taken for <b>{escape(one.predicted)}</b>, "
        f'{100 * one.probability:.1f}&nbsp;%&nbsp;sure<span class="file" title="{escape(one.path or name)}">'
        f"{escape(name)}</span></figcaption></figure>"
    )


def _thumbnail(path: str | None) -> str | None:
    from PIL import Image

    if path is None:
        return None
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=80)
    except (OSError, ValueError):
        # Moved or deleted since its features were computed, or of a name that this locale cannot spell.
        return None
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _sureness(evidence: Evidence) -> str:
    probabilities = evidence.scores.float().softmax(dim=1)
    found = calibration(probabilities, evidence.labels)
    sure = 100 * float(probabilities.max(dim=1).values.mean())
    right = 100 * float((evidence.scores.argmax(dim=1) == evidence.labels).float().mean())
    if abs(sure - right) < 1:
        verdict = "about as sure as it should be"
    else:
        verdict = f"{abs(sure - right):.1f} points {'too sure' if sure > right else 'too modest'}"
    text = (
        f"<p>On average it is {sure:.1f} % sure and {right:.1f} % right: {verdict}.</p>"
        '<p class="soft">Each dot stands for photos with about the same probability, the larger the more of them. On '
        "the dashed line, 80 % sure means right four times in five. Mean distance from the line: "
        f"{found.error:.1f} points.</p>"
    )
    return f'<div class="pair"><figure class="square">{reliability(found)}</figure><div>{text}</div></div>'


def _time(stages: Mapping[str, float]) -> str:
    total = sum(stages.values()) or 1.0
    # What is too short to be seen is one item, except for what everybody asks about.
    shown = {
        _STAGES.get(name, name): seconds for name, seconds in stages.items()
        if seconds >= 0.01 * total or name in ("reading", "features", "training")
    }  # fmt: skip
    if (rest := total - sum(shown.values())) > 0:
        shown["the rest"] = rest
    bars = "".join(
        f'<span class="m{i % 8}" style="flex:{seconds / total:.4f}" title="{escape(name)}"></span>'
        for i, (name, seconds) in enumerate(shown.items())
    )
    items = "".join(
        f'<li class="m{i % 8}">{escape(name)} {duration(seconds)}</li>'
        for i, (name, seconds) in enumerate(shown.items())
    )
    return f'<div class="stack" aria-hidden="true">{bars}</div><ul class="legend">{items}</ul>'


_STAGES = {
    "scan": "listing the photos",
    "weights": "loading the network",
    "reading": "waiting for photos",
    "features": "computing features",
    "training": "training the head",
    "validation": "validating",
    "result": "final scores",
}


def _skipped(skipped: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f"<li>{escape(reason if path in reason else f'{path}: {reason}')}</li>" for path, reason in skipped[:_LISTED]
    )
    more = f"<p>and {len(skipped) - _LISTED:,} more</p>" if len(skipped) > _LISTED else ""
    return f'<ul class="soft">{items}</ul>{more}'


def _made(facts: Mapping[str, Any], run: Run) -> str:
    shape = run.preprocessing
    entries = {
        "date": str(facts["date"]).replace("T", " "),
        "photos": facts["data"],
        "network": f"{run.backbone}, head {run.head}",
        "weights": facts["weights"],
        "preprocessing": f"shorter side to {shape.resize} ({shape.interpolation}), the middle "
        f"{shape.crop} x {shape.crop}, mean {_numbers(shape.mean)}, deviation {_numbers(shape.std)}",
        "seed": facts["seed"],
        "device": facts["device"],
        **{name: version for name, version in facts["versions"].items()},
    }
    listed = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in entries.items())
    return (
        f'<pre>{escape(facts["command"])}</pre><dl class="facts">{listed}</dl>'
        f'<p class="soft">Use it, with cnnrs or without:</p><pre>{escape(run.recipe())}</pre>'
    )


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
