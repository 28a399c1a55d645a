"""A matplotlib figure that a notebook displays, with no global state of matplotlib touched."""

import functools
import string
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Any, Literal, TypeVar

from matplotlib import font_manager, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

FONT = "DejaVu Sans"  # comes with matplotlib
STYLE: dict[str, Any] = {
    "font.family": FONT,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # letters stay letters in the PDF
    "figure.dpi": 150,
    "savefig.dpi": 200,
}
DARK, MIDDLE, LIGHT = "#7f0000", "#2166ac", "#6baed6"  # falling darkness
FULL_WIDTH = 6.75  # inches, two columns of a paper


class Picture(Figure):
    """A matplotlib figure that a notebook displays as the last line of a cell."""

    def _repr_png_(self) -> bytes:
        return self.render()

    def render(self, suffix: str = "png") -> bytes:
        """The bytes of the figure as a png or pdf file, the same for equal figures."""
        metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}}[suffix]
        buffer = BytesIO()
        for text in self.findobj(Text):
            if lacking := set(text.get_text()) - characters(font_manager.findfont(FONT)):
                text.set_fontfamily([FONT, *sorted(filter(None, map(font_with, lacking)))])
        with style.context(["default", STYLE]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # no installed font has the letter
            self.savefig(buffer, format=suffix, bbox_inches="tight", pad_inches=0.04, metadata=metadata)
        return buffer.getvalue()


@functools.cache
def characters(path: str) -> frozenset[str]:
    """The characters that a font file can draw, and white space."""
    return frozenset(map(chr, FT2Font(path).get_charmap())) | frozenset(string.whitespace)


@functools.cache
def font_with(letter: str) -> str | None:
    """The first installed font, by name, that can draw a letter."""
    fonts = sorted({(font.name, font.fname) for font in font_manager.fontManager.ttflist})
    return next(
        (name for name, path in fonts if not name.startswith("Last Resort") and letter in characters(path)), None
    )


Drawing = TypeVar("Drawing", bound=Callable[..., Picture])


def styled(draw: Drawing) -> Drawing:
    """Decorator: draws with ``STYLE`` and restores the settings of the session."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Picture:
        with style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return styled  # type: ignore[return-value]


def new_picture(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Picture:
    """An empty figure of a size in inches."""
    picture = Picture(figsize=(width, height), layout=layout)
    FigureCanvasAgg(picture)
    return picture
