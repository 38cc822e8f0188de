"""A line plot as SVG, without a library: axes from 0, a legend, colours that differ for colour-blind people too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 250, 50, 60
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, 2008
_STEPS = 5


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y); a dashed line has the colour of the one before it."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def line_plot(title: str, x_name: str, y_name: str, lines: Sequence[Line]) -> str:
    """The plot's text. There is at least one point, and none is negative."""
    right = max(x for line in lines for x, _ in line.points)
    top = 1.05 * max(y for line in lines for _, y in line.points)

    def at(x: float, y: float) -> str:
        across, down = x / right, y / top
        plot_width, plot_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
        return f"{_LEFT + across * plot_width:.1f},{HEIGHT - _BOTTOM - down * plot_height:.1f}"

    parts = [_text(_LEFT, 24, title, size=16)]
    for step in range(_STEPS + 1):
        x, y = right * step / _STEPS, top * step / _STEPS
        parts.append(f'<polyline points="{at(0, y)} {at(right, y)}" stroke="#ddd" fill="none"/>')
        (column, _), (_, row) = (at(x, 0).split(","), at(0, y).split(","))
        parts.append(_text(float(column), HEIGHT - _BOTTOM + 18, f"{x:g}", anchor="middle"))
        parts.append(_text(_LEFT - 8, float(row) + 4, f"{y:.2f}", anchor="end"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 16, x_name, anchor="middle"))
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(f'<g transform="rotate(-90 18 {middle})">{_text(18, middle, y_name, anchor="middle")}</g>')
    colour = -1
    for number, line in enumerate(lines):
        colour += not line.dashed
        parts += _line(line, [at(*point) for point in line.points], _COLOURS[colour % len(_COLOURS)], number)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


def _line(line: Line, places: Sequence[str], colour: str, number: int) -> list[str]:
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    stroke = f'stroke="{colour}" stroke-width="2" fill="none"{dash}'
    dots = [] if line.dashed else [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in _pairs(places)]
    left, height = WIDTH - _RIGHT + 20, _TOP + 20 * number
    return [
        f'<polyline points="{" ".join(places)}" {stroke}/>',
        *dots,
        f'<polyline points="{left},{height} {left + 28},{height}" {stroke}/>',
        _text(left + 36, height + 4, line.name),
    ]


def _pairs(places: Sequence[str]) -> list[tuple[str, str]]:
    return [(x, y) for x, _, y in (place.partition(",") for place in places)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#222">{escape(text)}</text>'
