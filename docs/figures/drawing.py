"""Boxes, lines and texts of a figure, as SVG that follows the reader's colour scheme."""

from __future__ import annotations

from html import escape

STYLE = """
.bg{fill:#fff}.ink{fill:#1f2430}.dim{fill:#667085}.line{stroke:#98a2b3;fill:none}.panel{fill:#f5f6f8;stroke:#d0d5dd}
.blue{fill:#e3ecfd;stroke:#2f6feb}.green{fill:#dff3e8;stroke:#1a8f5a}.orange{fill:#fdebd9;stroke:#c2610c}
.grey{fill:#eceef2;stroke:#98a2b3}.none{fill:none;stroke:#d0d5dd}.bl{stroke:#2f6feb;fill:none}.gl{stroke:#1a8f5a;fill:none}
.ol{stroke:#c2610c;fill:none}.tb{fill:#2f6feb}.tg{fill:#1a8f5a}.to{fill:#c2610c}
@media (prefers-color-scheme:dark){.bg{fill:#10141b}.ink{fill:#e6e9ef}.dim{fill:#98a2b3}.line{stroke:#667085}
.panel{fill:#181d26;stroke:#3a4250}.blue{fill:#1b2b4a;stroke:#6ea2ff}.green{fill:#16352a;stroke:#57c793}
.orange{fill:#3d2a17;stroke:#f2a65a}.grey{fill:#252b36;stroke:#667085}.none{stroke:#3a4250}.bl{stroke:#6ea2ff}
.gl{stroke:#57c793}.ol{stroke:#f2a65a}.tb{fill:#6ea2ff}.tg{fill:#57c793}.to{fill:#f2a65a}}
""".replace("\n", "")
WIDTH = 860
TEXT = {"line": "dim", "bl": "tb", "gl": "tg", "ol": "to"}


class Drawing:
    """Shapes of one figure, in pixels from the upper left corner."""

    def __init__(self, height: int, title: str):
        self.height, self.title, self.parts = height, title, []

    def box(
        self, x: float, y: float, w: float, h: float, kind: str = "panel", text: str = "", *, size: int = 13, dash: bool = False
    ):
        """A rounded box with centred lines of text; the first is bold when there are several."""
        dashed = ' stroke-dasharray="4 3"' if dash else ""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5" class="{kind}"{dashed}/>')
        lines = text.split("\n") if text else []
        for i, line in enumerate(lines):
            middle = y + h / 2 + (i - (len(lines) - 1) / 2) * (size + 4) + size * 0.36
            self.text(
                x + w / 2, middle, line, size=size if i == 0 else size - 1, anchor="middle", bold=i == 0 and len(lines) > 1
            )

    def text(
        self, x: float, y: float, text: str, *, kind: str = "ink", size: int = 13, anchor: str = "start", bold: bool = False
    ):
        """One line of text; `y` is its baseline."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[float, float], kind: str = "line", dash: bool = False, head: bool = True):
        """A line through points with a head at its end."""
        dashed = ' stroke-dasharray="5 4"' if dash else ""
        path = " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
        self.parts.append(f'<path d="{path}" class="{kind}" stroke-width="1.6"{dashed}/>')
        if head:
            (x0, y0), (x1, y1) = points[-2:]
            length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
            ux, uy = (x1 - x0) / length, (y1 - y0) / length
            corners = ((x1, y1), (x1 - 8 * ux + 4 * uy, y1 - 8 * uy - 4 * ux), (x1 - 8 * ux - 4 * uy, y1 - 8 * uy + 4 * ux))
            found = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
            self.parts.append(f'<polygon points="{found}" class="{TEXT[kind]}"/>')

    def svg(self) -> str:
        """The whole file."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img" font-family="system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style>"
            f'<rect width="{WIDTH}" height="{self.height}" rx="8" class="bg"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )
