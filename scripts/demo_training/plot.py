"""Line charts as SVG, side by side: enough for a few curves, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Curve = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 420, 300  # of one chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 34, 40
_COLOURS = ("#4c566a", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00")  # told apart by the colour-blind too


@dataclass(frozen=True)
class Chart:
    """One chart: a title, the name of the x axis, curves by name, the range of y, and a line to stay below."""

    title: str
    x_name: str
    curves: Mapping[str, Curve]
    low: float
    high: float
    limit: float | None = None


def svg(charts: Sequence[Chart]) -> str:
    """The charts in a row, with one legend below: the curves' names are those of the first chart."""
    names = list(charts[0].curves)
    colours = dict(zip(names, _COLOURS, strict=False))
    width, height = _WIDTH * len(charts), _HEIGHT + 26
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, chart in enumerate(charts):
        lines += [f'<g transform="translate({index * _WIDTH} 0)">', *_chart(chart, colours), "</g>"]
    for index, name in enumerate(names):
        x = _LEFT + index * (width - 2 * _LEFT) // len(names)
        lines.append(f'<path d="M{x} {_HEIGHT + 8}h22" stroke="{colours[name]}" stroke-width="2.5"/>')
        lines.append(f'<text x="{x + 28}" y="{_HEIGHT + 12}">{name}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _chart(chart: Chart, colours: Mapping[str, str]) -> list[str]:
    right = max(x for curve in chart.curves.values() for x, _ in curve)
    across, up = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> str:
        share = (min(max(y, chart.low), chart.high) - chart.low) / (chart.high - chart.low)
        return f"{_LEFT + across * x / right:.1f} {_TOP + up * (1 - share):.1f}"

    lines = [f'<text x="{_LEFT}" y="20" font-weight="bold">{chart.title}</text>']
    for step in range(5):
        y = chart.low + (chart.high - chart.low) * step / 4
        at = place(0, y)
        lines.append(f'<path d="M{at}h{across}" stroke="#d8dee9"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{float(at.split()[1]) + 4:.1f}" text-anchor="end">{y:.2f}</text>')
    for step in range(5):
        x = right * step / 4
        at = place(x, chart.low).split()[0]
        lines.append(f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:.0f}</text>')
    lines.append(f'<text x="{_LEFT + across / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{chart.x_name}</text>')
    if chart.limit is not None:
        lines.append(f'<path d="M{place(0, chart.limit)}h{across}" stroke="#888" stroke-dasharray="5 4"/>')
    for name, curve in chart.curves.items():
        path = "L".join(place(x, y) for x, y in curve)
        lines.append(f'<path d="M{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
    return lines
