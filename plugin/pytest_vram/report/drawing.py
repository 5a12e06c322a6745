"""How charts look and are saved: legible in print, in grey, and on light and dark pages; the same bytes every time."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_vram.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, PAPER, FAINT = "#1f2328", "#ffffff", "#8b929a"
# Middle tones, which stand out from white and from black; hatches, markers and dashes tell them apart in grey.
COLOURS = ("#3576c4", "#cf7a12", "#2f9667", "#b84f8c", "#7a68c9", "#9a7b1c")
HATCHES = ("", "///", "..", "xxx", "\\\\\\", "||")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
DARK_INK, DARK_PAPER = "#e6edf3", "#0d1117"
DPI = 150  # of the PNG
STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 9,
    "grid.alpha": 0.35,
    "grid.color": FAINT,
    "hatch.color": INK,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "pytest-vram",
    "text.color": INK,
    "text.parse_math": False,  # a name may hold dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for one chart, whatever the user's own are."""
    import warnings

    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")  # names come in any script
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        yield


def svg(figure: "Figure") -> bytes:
    """The chart as SVG whose ink and paper follow the reader's light or dark scheme, also inside an `<img>`."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer, paper = io.BytesIO(), figure.get_facecolor()
    figure.set_facecolor("none")
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(buffer, metadata={"Date": None})  # `savefig` draws all twice
    figure.set_facecolor(paper)
    text = buffer.getvalue().decode("utf-8").replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    scheme = (
        f"<style>svg{{color:{INK};--paper:{PAPER};background:var(--paper)}}"
        f"@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK};--paper:{DARK_PAPER}}}}}"
        f"@media print{{svg{{color:#000;--paper:#fff}}}}</style>"
    )
    return re.sub(r"(<svg [^>]*>)", lambda found: found[1] + scheme, text, count=1).encode("utf-8")


def png(figure: "Figure") -> bytes:
    """The chart as PNG on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    figure.set_dpi(DPI)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def short(text: str, length: int = 42) -> str:
    """A name in one line, its middle left out where it is long."""
    line = printable(text)
    keep = (length - 1) // 2
    return line if len(line) <= length else f"{line[:keep]}…{line[-keep:]}"
