"""A small writer of SVG: shapes with classes, and one style sheet that follows the reader's light or dark mode."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

Anchor = Literal["start", "middle", "end"]

_STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12px }
.paper { fill: #ffffff; stroke: #d0d7de }
.head { font-size: 17px; font-weight: 600 }
.title { font-size: 13.5px; font-weight: 600 }
.head, .title, .label, .value { fill: #1f2328 }
.value { font-variant-numeric: tabular-nums; font-weight: 600 }
.note { fill: #59636e; font-size: 11.5px }
.remark { font-weight: 400 }
.grid { stroke: #d8dee4; stroke-width: 1 }
.axis { stroke: #8c959f; stroke-width: 1 }
.ours { fill: #0969da; stroke: #0969da }
.petals { fill: #bf8700; stroke: #bf8700 }
.other { fill: #9aa4ae; stroke: #9aa4ae }
.floor { stroke: #cf222e; stroke-dasharray: 4 3; stroke-width: 1.5 }
text.ours, text.petals, text.other { stroke: none; font-weight: 600 }
text.floor { fill: #cf222e; stroke: none }
rect.ours, rect.petals, rect.other { stroke: none }
polyline { stroke-width: 2; stroke-linejoin: round }
polyline.ours, polyline.petals, polyline.other, polyline.floor { fill: none }
@media (prefers-color-scheme: dark) {
  .paper { fill: #0d1117; stroke: #3d444d }
  .head, .title, .label, .value { fill: #e6edf3 }
  .note { fill: #9198a1 }
  .grid { stroke: #2a313a }
  .axis { stroke: #656c76 }
  .ours { fill: #4493f8; stroke: #4493f8 }
  .petals { fill: #d29922; stroke: #d29922 }
  .other { fill: #6e7781; stroke: #6e7781 }
  .floor { stroke: #f85149 }
  text.floor { fill: #f85149 }
}
"""


class Drawing:
    """A picture of ``width`` by ``height`` pixels; ``label`` is what a screen reader says."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self._width = width
        self._height = height
        self._label = label
        self._shapes: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, kind: str, radius: float = 0.0) -> None:
        self._add(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'rx="{radius:g}"/>'
        )

    def line(self, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
        self._add(
            f'<line class="{kind}" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'
        )

    def polyline(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._add(f'<polyline class="{kind}" points="{path}"/>')

    def dot(self, center: tuple[float, float], kind: str) -> None:
        self._add(f'<circle class="{kind}" cx="{center[0]:.1f}" cy="{center[1]:.1f}" r="3"/>')

    def text(
        self, x: float, y: float, text: str, kind: str, anchor: Anchor = "start", *, remark: str = ""
    ) -> None:
        """``remark`` stands behind the text, as a note."""
        tail = f'<tspan class="note remark" dx="8">{escape(remark)}</tspan>' if remark else ""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self._add(f'<text class="{kind}" {place}>{escape(text)}{tail}</text>')

    def render(self) -> str:
        size = f'width="{self._width:g}" height="{self._height:g}" viewBox="0 0 {self._width:g} {self._height:g}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self._label)}">'
        )
        return "\n".join([head, f"<style>{_STYLE}</style>", *self._shapes, "</svg>", ""])

    def _add(self, shape: str) -> None:
        self._shapes.append(shape)
