"""Drawings as inline SVG: colours come from the page's style sheet, so that light, dark and print each have theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from cnnrs.app.report.evidence import Curve
from cnnrs.training.metrics import Calibration

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 34


def curves(
    title: str,
    unit: str,
    series: Sequence[tuple[str, str, Sequence[float]]],
    best: int,
    least: float,
    most: float | None,
) -> str:
    """Lines over epochs.

    Args:
        title: what the chart shows, for those who cannot see it.
        unit: label of the vertical axis.
        series: (name, style class, one value per epoch); what is not finite is left out.
        best: epoch to mark, counted from 0.
        least: smallest value that must be visible.
        most: largest, None: the largest value.
    """
    finite = [value for _, _, values in series for value in values if math.isfinite(value)]
    epochs = max((len(values) for _, _, values in series), default=0)
    low = min([least, *finite]) if most is None else min(finite, default=least)
    ticks = _ticks(low, max(finite, default=1.0) if most is None else most)
    low, high = ticks[0], ticks[-1]

    def x(epoch: float) -> float:
        return _LEFT + (epoch / max(epochs - 1, 1) if epochs > 1 else 0.5) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_frame(ticks, y, unit)]
    for epoch in _epoch_ticks(epochs):
        parts.append(_text(x(epoch - 1), _HEIGHT - _BOTTOM + 14, str(epoch), "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, "epoch", "middle"))
    if epochs:
        parts.append(f'<line class="best" x1="{x(best):.1f}" x2="{x(best):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    for name, style, values in series:
        points = [(x(i), y(v)) for i, v in enumerate(values) if math.isfinite(v)]
        path = " ".join(f"{'M' if i == 0 else 'L'}{px:.1f} {py:.1f}" for i, (px, py) in enumerate(points))
        parts.append(f'<path class="line {style}" d="{path}"><title>{escape(name)}</title></path>')
        if epochs <= 40:
            parts += [f'<circle class="dot {style}" cx="{px:.1f}" cy="{py:.1f}" r="2.6"/>' for px, py in points]
    return _svg(title, _WIDTH, _HEIGHT, parts)


def reliability(found: Calibration) -> str:
    """How often predictions are right, over how sure they are; the diagonal is perfect."""
    parts = [_square_line("best", [0, 1], [0, 1])]
    total = max(sum(b.count for b in found.bins), 1)
    # No line between them: a dot of two photos would pull it as far as one of two hundred.
    for b in found.bins:
        radius = 3 + 7 * math.sqrt(b.count / total)
        words = f"{b.count:,} photos, {100 * b.confidence:.0f} % sure, {100 * b.accuracy:.0f} % right"
        parts.append(_square_dot("dot valid", b.confidence, b.accuracy, radius, words))
    title = "Calibration: how often predictions are right, over how sure they are"
    return _square(title, "how sure, %", "how often right, %", parts)


def rates(title: str, across: str, upright: str, curves: Sequence[Curve], guess: tuple[float, float]) -> str:
    """Two rates over all thresholds, a line per class; a dot where the threshold is that is used.

    Args:
        title: what the chart shows, for those who cannot see it.
        across: label of the horizontal axis.
        upright: label of the vertical axis.
        curves: at most eight, or colours repeat.
        guess: what guessing gives at the left and at the right end, 0 to 1: dashed.
    """
    parts = [_square_line("best", [0, 1], guess)]
    for number, curve in enumerate(curves):
        colour = f"m{number % 8}"
        parts.append(_square_line(f"line {colour}", curve.x, curve.y, f"{curve.name}: {curve.area:.3f}"))
        if curve.at is not None:
            parts.append(_square_dot(f"dot {colour}", *curve.at, 4.5, f"{curve.name}: the threshold that is used"))
    return _square(title, across, upright, parts)


_SIDE, _SQUARE_LEFT, _SQUARE_BOTTOM, _SQUARE_MARGIN = 260, 44, 34, 14
# As many points as can be told apart.
_POINTS = 200


def _square_x(value: float) -> float:
    return _SQUARE_LEFT + value * (_SIDE - _SQUARE_LEFT - _SQUARE_MARGIN)


def _square_y(value: float) -> float:
    return _SIDE - _SQUARE_BOTTOM - value * (_SIDE - _SQUARE_BOTTOM - _SQUARE_MARGIN)


def _square(title: str, across: str, upright: str, inner: Sequence[str]) -> str:
    """A chart whose axes go from 0 to 100 percent."""
    right, parts = _SIDE - _SQUARE_MARGIN, []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = _square_y(tick)
        parts.append(f'<line class="grid" x1="{_SQUARE_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_SQUARE_LEFT - 6, y + 4, f"{100 * tick:.0f}", "end"))
        parts.append(_text(_square_x(tick), _SIDE - _SQUARE_BOTTOM + 14, f"{100 * tick:.0f}", "middle"))
    parts += [*inner, _text(_square_x(0.5), _SIDE - 4, across, "middle"), _upright(12, _square_y(0.5), upright)]
    return _svg(title, _SIDE, _SIDE, parts)


def _square_line(style: str, x: Sequence[float], y: Sequence[float], words: str = "") -> str:
    step = max(1, math.ceil(len(x) / _POINTS))
    kept = dict.fromkeys([*range(0, len(x), step), *range(len(x))[-1:]])
    points = [(x[i], y[i]) for i in kept if math.isfinite(x[i]) and math.isfinite(y[i])]
    path = " ".join(f"{'L' if i else 'M'}{_square_x(a):.1f} {_square_y(b):.1f}" for i, (a, b) in enumerate(points))
    return f'<path class="{style}" d="{path}"><title>{escape(words)}</title></path>'


def _square_dot(style: str, x: float, y: float, radius: float, words: str) -> str:
    place = f'cx="{_square_x(x):.1f}" cy="{_square_y(y):.1f}" r="{radius:.1f}"'
    return f'<circle class="{style}" {place}><title>{escape(words)}</title></circle>'


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _frame(ticks: Sequence[float], y: object, unit: str) -> str:
    assert callable(y)
    parts = []
    step = ticks[1] - ticks[0]
    decimals = next(digits for digits in range(20) if abs(round(step, digits) - step) < 1e-6 * step)
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(_LEFT - 6, y(tick) + 4, f"{tick:.{decimals}f}", "end"))
    parts.append(_upright(12, (_TOP + _HEIGHT - _BOTTOM) / 2, unit))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _upright(x: float, y: float, text: str) -> str:
    return f'<text transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle">{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to six of them, that enclose both."""
    if not high > low:
        high = low + 1.0
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def _epoch_ticks(epochs: int) -> list[int]:
    """At most eight epochs, counted from 1, always the first and the last."""
    if epochs <= 8:
        return list(range(1, epochs + 1))
    step = math.ceil(epochs / 6)
    inner = [epoch for epoch in range(step, epochs, step) if epochs - epoch > step / 2 and epoch > 1]
    return [1, *inner, epochs]
