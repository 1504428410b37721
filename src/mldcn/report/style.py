"""How plots look: colours, line and point styles, and matplotlib figures as SVG that follow a page's colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mldcn.files import atomic
from mldcn.report.text import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each has a contrast of at least 3 on white and on the page's dark background, and the eight stay apart for
# readers who confuse red and green. Line and point styles tell series apart where colours do not.
PALETTE = ("#3563d2", "#e37407", "#0fa1a6", "#b73564", "#3393ef", "#81609b", "#b25205", "#ed5c7b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # their number has no factor in common with the palette's
DASHES: tuple[Any, ...] = ("-", (0, (6, 1.6)), (0, (1.6, 1.4)), (0, (6, 1.6, 1.6, 1.6)), (0, (10, 2)))

# Text, axes and grid: nearly black in a file, and the colour of the text around it (``currentColor``) in a page.
INK = "#010203"
WIDTH = 440  # of a figure, in units of its 13-unit text: a phone shows it at about 11 pixels
_DECIMALS = re.compile(r"-?\d+\.\d+")
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_RC: dict[str, Any] = {
    "text.parse_math": False,  # a name with dollar signs is no formula
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so that figures are laid out alike everywhere
    "font.size": 12.5,
    "axes.titlesize": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "mldcn",
    "path.simplify": False,
    "savefig.bbox": None,
    "figure.autolayout": False,
    "figure.constrained_layout.h_pad": 3 / 72,
    "figure.constrained_layout.w_pad": 3 / 72,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Within it, figures are made and saved in the house's style, whatever the user's own matplotlib settings."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(_RC)
        # A browser has the glyphs that matplotlib's own font, used for measuring only, has not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(height: float, *, by_hand: bool = False) -> Figure:
    """An empty figure, ``height`` units high; it belongs to no window and to no global list.

    Unless its axes are placed ``by_hand``, matplotlib finds room for their labels.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout=None if by_hand else "constrained")


def colour(style: int) -> str:
    """The colour of the series with this number."""
    return PALETTE[style % len(PALETTE)]


def marker(style: int) -> str:
    """The point style of the series with this number."""
    return MARKERS[style % len(MARKERS)]


def dash(style: int) -> Any:
    """The line style of the series with this number."""
    return DASHES[style % len(DASHES)]


def to_svg(figure: Figure) -> str:
    """The figure as one ``<svg>`` element.

    Text is text in the reader's own font; the background is transparent; text and axes take the colour of the
    text around the element. The same figure gives the same bytes.
    """
    buffer = io.StringIO()
    with drawing():
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    svg = clean(buffer.getvalue())
    svg = svg[svg.index("<svg ") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Left in a page, this style would hold for all of it.
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"xmlns:xlink=\"[^\"]*\" ?", "", svg, count=1).replace("xlink:href=", "href=")
    head, _, body = svg.partition(">")
    head = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', head)
    head += f' style="stroke-linejoin: round; stroke-linecap: butt; font-family: {_FONTS}">'
    # Only inside style attributes: a series' name may look like any of this.
    body = re.sub(r'(?<= style=")[^"]*(?=")', lambda style: _follow_page(style[0]), body)
    # A hundredth of a unit is more than any screen or printer shows.
    body = re.sub(
        r'(?<= d=")[^"]*(?=")', lambda path: _DECIMALS.sub(_two_decimals, path[0]).replace("\n", " "), body
    )
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    return head + body


def save(figure: Figure, path: str | Path) -> Path:
    """Writes the figure atomically as SVG or, for papers and slides, as PNG on white (200 dots an inch).

    Raises:
        ValueError: the path ends in neither ``.svg`` nor ``.png``.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path}: a figure is saved as .svg or .png")
    with atomic(path) as temporary:
        if path.suffix == ".svg":
            temporary.write_text(to_svg(figure) + "\n", encoding="utf-8")
        else:
            with drawing():
                figure.savefig(
                    temporary, format="png", dpi=200, facecolor="white", metadata={"Software": None}
                )
    return path


def _two_decimals(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def _follow_page(style: str) -> str:
    style = re.sub(r"font-family: [^;]*;? ?", "", style)
    style = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", style)
    return style.replace(INK, "currentColor").replace("#000000", "currentColor")
