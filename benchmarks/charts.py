"""Panels of a picture: horizontal bars, and lines over a logarithmic axis. Each draws itself into a rectangle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.svg import Drawing

PANEL_WIDTH = 400.0
MARGIN = 24.0
_HEAD_HEIGHT = 54.0
_TITLE_HEIGHT = 44.0
_PLOT_HEIGHT = 146.0
_LABEL_WIDTH = 146.0
_VALUE_WIDTH = 106.0
_BAR_HEIGHT = 18.0
_BAR_PITCH = 27.0
_LEGEND_WIDTH = 112.0
_TICK_WIDTH = 40.0


class Panel(Protocol):
    """One chart of a picture."""

    @property
    def height(self) -> float:
        """Pixels that it needs."""

    def draw(self, drawing: Drawing, x: float, y: float) -> None:
        """Into PANEL_WIDTH by ``height`` pixels whose upper left corner is given."""


@dataclass(frozen=True, slots=True)
class Bar:
    """``kind`` is a class of the style sheet: ours, petals or other; ``remark`` stands behind the value."""

    label: str
    value: float
    kind: str
    remark: str = ""


@dataclass(frozen=True, slots=True)
class BarPanel:
    """Bars from zero, the values behind them; ``note`` says the unit and which direction is better."""

    title: str
    note: str
    bars: Sequence[Bar]

    @property
    def height(self) -> float:
        return _TITLE_HEIGHT + 8 + len(self.bars) * _BAR_PITCH

    def draw(self, drawing: Drawing, x: float, y: float) -> None:
        _draw_title(drawing, x, y, self.title, self.note)
        room = PANEL_WIDTH - _LABEL_WIDTH - _VALUE_WIDTH
        scale = room / max(bar.value for bar in self.bars)
        for number, bar in enumerate(self.bars):
            top = y + _TITLE_HEIGHT + 8 + number * _BAR_PITCH
            left, middle = x + _LABEL_WIDTH, top + _BAR_HEIGHT / 2 + 4
            drawing.text(left - 8, middle, bar.label, "label", "end")
            drawing.rect(left, top, max(1.5, bar.value * scale), _BAR_HEIGHT, bar.kind, 2)
            end = left + bar.value * scale + 7
            drawing.text(end, middle, format_value(bar.value), "value", remark=bar.remark)


@dataclass(frozen=True, slots=True)
class Line:
    """``points`` are (x, y), both greater than zero, ascending in x."""

    label: str
    points: Sequence[tuple[float, float]]
    kind: str


@dataclass(frozen=True, slots=True)
class LinePanel:
    """Lines in logarithmic axes, labelled at their right ends; the ticks of x are the points that there are."""

    title: str
    note: str
    lines: Sequence[Line]

    @property
    def height(self) -> float:
        return _TITLE_HEIGHT + _PLOT_HEIGHT

    def draw(self, drawing: Drawing, x: float, y: float) -> None:
        _draw_title(drawing, x, y, self.title, self.note)
        plot = _Plot(x, y, [point for line in self.lines for point in line.points])
        plot.draw_grid(drawing)
        labels = []
        for line in self.lines:
            points = [plot.place(point) for point in line.points]
            drawing.polyline(points, line.kind)
            if line.kind != "floor":
                for point in points:
                    drawing.dot(point, line.kind)
            labels.append((points[-1][1], line))
        for height, line in _spread_out(labels):
            drawing.text(plot.right + 8, height + 4, line.label, line.kind)


class _Plot:
    """The rectangle of a LinePanel's lines, and where a point of the data lies in it."""

    def __init__(self, x: float, y: float, points: Sequence[tuple[float, float]]) -> None:
        self.left, self.right = x + _TICK_WIDTH, x + PANEL_WIDTH - _LEGEND_WIDTH
        self.top, self.bottom = y + _TITLE_HEIGHT + 6, y + _TITLE_HEIGHT + _PLOT_HEIGHT - 18
        self.ticks_x = sorted({point[0] for point in points})
        values = [point[1] for point in points]
        self.low, self.high = _power_of_two(min(values), math.floor), _power_of_two(max(values), math.ceil)

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        across = math.log(point[0] / self.ticks_x[0]) / math.log(self.ticks_x[-1] / self.ticks_x[0])
        up = math.log(point[1] / self.low) / math.log(self.high / self.low)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def draw_grid(self, drawing: Drawing) -> None:
        octaves = round(math.log2(self.high / self.low))
        for octave in range(0, octaves + 1, max(1, round(octaves / 4))):
            value = self.low * 2**octave
            height = self.place((self.ticks_x[0], value))[1]
            drawing.line((self.left, height), (self.right, height), "grid")
            drawing.text(self.left - 6, height + 4, f"{value:g}", "note", "end")
        drawing.line((self.left, self.bottom), (self.right, self.bottom), "axis")
        for tick in self.ticks_x:
            drawing.text(self.place((tick, self.low))[0], self.bottom + 15, f"{tick:g}", "note", "middle")


def format_value(value: float) -> str:
    """Three digits, or all of a whole number: 0.52, 14.8, 120, 4,713."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def draw_panels(head: str, note: str, panels: Sequence[Panel], columns: int) -> str:
    """A whole picture: a headline, the panels row by row, and a line of small print below."""
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    width = max(2, len(rows[0])) * (PANEL_WIDTH + MARGIN) + MARGIN
    height = _HEAD_HEIGHT + sum(heights) + len(rows) * MARGIN + 24
    drawing = Drawing(width, height, f"{head}. {note}")
    drawing.rect(0.5, 0.5, width - 1, height - 1, "paper", 8)
    drawing.text(MARGIN, 36, head, "head")
    top = _HEAD_HEIGHT
    for row, row_height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            panel.draw(drawing, MARGIN + column * (PANEL_WIDTH + MARGIN), top)
        top += row_height + MARGIN
    drawing.text(MARGIN, height - 16, note, "note")
    return drawing.render()


def _draw_title(drawing: Drawing, x: float, y: float, title: str, note: str) -> None:
    drawing.text(x, y + 16, title, "title")
    drawing.text(x, y + 33, note, "note")


def _power_of_two(value: float, direction: Callable[[float], int]) -> float:
    return 2.0 ** direction(math.log2(value))


def _spread_out(labels: Sequence[tuple[float, Line]]) -> list[tuple[float, Line]]:
    """Move labels down until none covers another."""
    spread: list[tuple[float, Line]] = []
    for height, line in sorted(labels, key=lambda label: label[0]):
        spread.append((max(height, spread[-1][0] + 15) if spread else height, line))
    return spread
