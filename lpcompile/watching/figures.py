"""Figures: heat maps, lines and bars as SVG text, with nothing to load."""

import html
import math
from collections.abc import Sequence
from itertools import pairwise

COLORS = ("#2f6fb3", "#c6403c", "#1a7f5a", "#c98a1b", "#7a6bb5", "#3b8ea5", "#8a5a2b", "#8a8a8a")
_STOPS = ((0.0, (176, 32, 38)), (10.0, (228, 111, 63)), (20.0, (246, 211, 101)), (30.0, (126, 190, 122)),
          (60.0, (62, 142, 165)))  # fmt: skip
"""Color of an SQNR in dB: red loses all, blue next to nothing."""


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]],
             notes: Sequence[Sequence[str]]) -> str:  # fmt: skip
    """A cell a value, in dB; `notes` are shown by a pointer. None: nothing there."""
    left, top, width, height = 8 + 7 * max(map(len, rows), default=0), 86, 76, 22
    parts = [
        f'<text x="{left + width * i + width / 2:.0f}" y="{top - 8}" text-anchor="start" '
        f'transform="rotate(-30 {left + width * i + width / 2:.0f} {top - 8})">{html.escape(name)}</text>'
        for i, name in enumerate(columns)
    ]
    for j, row in enumerate(rows):
        y = top + height * j
        parts.append(f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{html.escape(row)}</text>')
        for i, value in enumerate(values[j]):
            if value is None:
                continue
            x, shown = left + width * i, "exact" if math.isinf(value) else f"{value:.1f}"
            parts.append(
                f'<g><title>{html.escape(notes[j][i])}</title><rect x="{x}" y="{y}" width="{width - 2}" '
                f'height="{height - 2}" rx="3" fill="{color(value)}"/><text x="{x + width / 2 - 1:.0f}" y="{y + 14}" '
                f'text-anchor="middle" fill="{"#fff" if value < 10 or value > 45 else "#222"}">{shown}</text></g>'
            )
    return _svg(left + width * len(columns) + 70, top + height * len(rows) + 6, parts)


def color(value: float) -> str:
    """Of an SQNR in dB."""
    for (low, a), (high, b) in pairwise(_STOPS):
        if value <= high:
            t = min(max((value - low) / (high - low), 0.0), 1.0)
            return "#" + "".join(f"{round(p + t * (q - p)):02x}" for p, q in zip(a, b))
    return "#3e8ea5"


def line_plot(steps: Sequence[int], series: Sequence[tuple[str, Sequence[float | None]]], unit: str) -> str:
    """One line a name over the steps; gaps where there is None."""
    values = [value for _, line in series for value in line if value is not None]
    if not values:
        return ""
    low, high = min(values), max(values)
    low, high = (low - 1, high + 1) if low == high else (low, high)
    left, top, width, height = 56, 12, 560, 220
    span = max(steps[-1] - steps[0], 1)

    def place(step: int, value: float) -> tuple[float, float]:
        return left + width * (step - steps[0]) / span, top + height * (1 - (value - low) / (high - low))

    parts = [f'<text x="4" y="{top + 10}">{html.escape(unit)}</text>']
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = place(steps[0], value)
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
                     f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')  # fmt: skip
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
        x, _ = place(step, low)
        parts.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">step {step}</text>')
    for number, (name, line) in enumerate(series):
        points = [place(step, value) for step, value in zip(steps, line) if value is not None]
        tint = COLORS[number % len(COLORS)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{tint}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{tint}"/>' for x, y in points]
        parts.append(
            f'<text x="{left + width + 12}" y="{top + 12 + 16 * number}" fill="{tint}">{html.escape(name)}</text>'
        )
    return _svg(left + width + 330, top + height + 28, parts)


def bars(title: str, counts: Sequence[int], first: int, marks: Sequence[tuple[float, str]]) -> str:
    """Shares by exponent of two, from the first that holds something to the last; `marks`: exponents to draw a line at,
    each with what stands there.
    """
    held = [i for i, count in enumerate(counts) if count]
    if not held:
        return ""
    at = [place for place, _ in marks if math.isfinite(place)]
    low = min(held[0] + first, *(math.floor(each) for each in at)) - 1 if at else held[0] + first - 1
    high = max(held[-1] + first, *(math.ceil(each) for each in at)) + 1 if at else held[-1] + first + 1
    low = max(low, high - 60)
    most, width, height, top = max(counts), 7, 70, 34
    parts = [f'<text x="4" y="13">{html.escape(title)}</text>']
    for exponent in range(low, high + 1):
        place = exponent - first
        count = counts[place] if 0 <= place < len(counts) else 0
        tall, x = height * count / most, 10 + width * (exponent - low)
        if count:
            box = f'x="{x}" y="{top + height - tall:.1f}" width="{width - 1}" height="{max(tall, 0.8):.1f}"'
            parts.append(f'<rect {box} fill="#3b8ea5"><title>2^{exponent}: {count}</title></rect>')
        if exponent % 10 == 0:
            parts.append(f'<text x="{x}" y="{top + height + 14}" text-anchor="middle">2^{exponent}</text>')
    for mark, name in marks:
        at_x = f"{10 + width * (mark - low):.1f}"
        parts.append(f'<line x1="{at_x}" x2="{at_x}" y1="{top - 6}" y2="{top + height}" stroke="#c6403c"/>')
        style = 'text-anchor="middle" fill="#c6403c"'
        parts.append(f'<text x="{at_x}" y="{top - 8}" {style}>{html.escape(name)}</text>')
    return _svg(max(30 + width * (high - low + 2), 260), top + height + 20, parts)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(parts)}</svg>'
