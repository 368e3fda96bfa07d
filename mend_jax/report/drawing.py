"""A figure with its data, and what all figures of the report have in common.

They are drawn by matplotlib, without a display, narrow enough for a phone, and can be told apart in black and white.
"""

import contextlib
import dataclasses
import io
from collections.abc import Sequence

from mend_jax.cli.errors import UserError
from mend_jax.cli.text import shown

with contextlib.suppress(ImportError):  # pip install "mend-jax[report]"; `require_matplotlib` says so
    import matplotlib
    from matplotlib.figure import Figure

WIDTH = 4.7  # inches: on a phone's screen the letters are then as large as they are here
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "mend",  # else the same figure would get other identifiers every time
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure: the name of its files, what stands below it, its data, and itself."""

    name: str
    caption: str
    header: list[str]
    rows: list[list]
    figure: "Figure"

    def svg(self) -> str:
        """The <svg> element alone."""
        text = _saved(self.figure, "svg").decode()
        return text[text.index("<svg") :]

    def png(self) -> bytes:
        return _saved(self.figure, "png")


@dataclasses.dataclass(frozen=True)
class Bar:
    """A value in percent with the ends of its interval."""

    group: str
    series: str
    value: float
    low: float | None = None
    high: float | None = None


def require_matplotlib() -> None:
    """Raises UserError where matplotlib is missing."""
    if "Figure" not in globals():
        raise UserError('The report needs matplotlib and Jinja2: pip install "matplotlib~=3.11" "jinja2~=3.1".')


def legend(figure, axis) -> None:
    """What the series of an axis are, above all axes."""
    handles, labels = axis.get_legend_handles_labels()
    labels = [plain(label) for label in labels]
    if labels:
        figure.legend(handles, labels, loc="outside upper center", ncols=beside(labels))


def beside(labels: Sequence[str]) -> int:
    """The columns of a legend."""
    return min(len(labels), max(1, 54 // (max(map(len, labels)) + 8)))


def plain(text: str) -> str:
    """A text from data as matplotlib draws it: no formula, which it would read between two $ and may not understand."""
    return shown(text, keep="\n").replace("$", "\\$")


def laid_out(figure):
    """The figure with its parts in their places, so that each file does not place them again."""
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def _saved(figure, form: str) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=form, dpi=160, metadata={"Date": None} if form == "svg" else {"Software": None})
    return buffer.getvalue()
