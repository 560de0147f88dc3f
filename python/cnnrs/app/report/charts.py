"""Drawings as inline SVG: colours come from the page's style sheet, so that light, dark and print each have theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

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
    side, left, bottom, margin = 260, 44, 34, 14
    plot = side - left - margin

    def x(value: float) -> float:
        return left + value * plot

    def y(value: float) -> float:
        return side - bottom - value * (side - bottom - margin)

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{left}" x2="{side - margin}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(left - 6, y(tick) + 4, f"{100 * tick:.0f}", "end"))
        parts.append(_text(x(tick), side - bottom + 14, f"{100 * tick:.0f}", "middle"))
    parts.append(f'<line class="best" x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(1):.1f}" y2="{y(1):.1f}"/>')
    total = max(sum(b.count for b in found.bins), 1)
    # No line between them: a dot of two photos would pull it as far as one of two hundred.
    for b in found.bins:
        px, py = x(b.confidence), y(b.accuracy)
        radius = 3 + 7 * math.sqrt(b.count / total)
        words = f"{b.count:,} photos, {100 * b.confidence:.0f} % sure, {100 * b.accuracy:.0f} % right"
        parts.append(
            f'<circle class="dot valid" cx="{px:.1f}" cy="{py:.1f}" r="{radius:.1f}"><title>{words}</title></circle>'
        )
    parts.append(_text(x(0.5), side - 4, "how sure, %", "middle"))
    parts.append(_upright(12, y(0.5), "how often right, %"))
    return _svg("Calibration: how often predictions are right, over how sure they are", side, side, parts)


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
