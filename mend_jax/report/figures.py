"""The report's figures: drawn by matplotlib, without a display; each with the data that it shows.

They are narrow enough for a phone, and can be told apart in black and white: bars by hatches, curves by
markers and line styles, maps by shades of grey.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.text import shown

with contextlib.suppress(ImportError):  # pip install "mend-jax[report]"; `require_matplotlib` says so
    import matplotlib
    from matplotlib import ticker
    from matplotlib.figure import Figure

WIDTH = 4.7  # inches: on a phone's screen the letters are then as large as they are here
FACES = ("#86add0", "#f4f4f4", "#9a9a9a", "#d3e3f0", "#c4c4c4", "#ffffff", "#5d8db8", "#e0e0e0")
HATCHES = ("", "///", "", "...", "\\\\\\", "xxx", "---", "+++")
LETTERS = 50  # beside each other below an axis
MARKERS, DASHES = "osD^vPX*", ("-", "--", "-.", ":")
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


def bars(
    name: str,
    caption: str,
    values: Sequence[Bar],
    ylabel: str,
    references: dict[str, float] | None = None,
    log=False,
    xlabel: str = "",
) -> Drawing:
    """Groups of bars, a hatch for each series; `references` are lines across. What does not fit beside each other is in rows of
    one scale."""
    groups, series = (list(dict.fromkeys(getattr(bar, what) for bar in values)) for what in ("group", "series"))
    chunks = _rows_of(groups, len(series))
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 2.3 * len(chunks) + 0.9), layout="constrained")
        axes = figure.subplots(len(chunks), 1, squeeze=False, sharey=True)[:, 0]
        for axis, chunk in zip(axes, chunks, strict=True):
            for i, one in enumerate(series):
                _bars_of(axis, [b for b in values if b.series == one and b.group in chunk], chunk, i, len(series))
            for j, (text, value) in enumerate((references or {}).items()):
                axis.axhline(value, color="black", linewidth=0.8, linestyle=DASHES[1 + j % 3], label=text)
            axis.set_xticks(range(len(chunk)), [_wrapped(group, len(chunks[0])) for group in chunk])
            axis.set_xlim(-0.55, len(chunks[0]) - 0.45)  # bars are as wide in every row
            axis.set_ylabel(ylabel)
            if log:
                _logarithmic(axis)
        axes[-1].set_xlabel(_plain(xlabel))
        _legend(figure, axes[0])
    header = ["group", "series", "value", "low", "high"]
    return Drawing(name, caption, header, [list(dataclasses.astuple(bar)) for bar in values], _laid_out(figure))


def curves(name: str, caption: str, values: Sequence[Bar], xlabel: str, ylabel: str, references=None) -> Drawing:
    """Values over a number, which is the `group` of each; logarithmic where the numbers go over more than a factor of 20."""
    series = list(dict.fromkeys(bar.series for bar in values))
    with matplotlib.rc_context(STYLE):
        names = [*series, *(references or {})]
        figure = Figure((WIDTH, 2.9 + 0.17 * -(-len(names) // _beside(names))), layout="constrained")
        axis = figure.subplots()
        ticks = sorted({float(bar.group) for bar in values})
        if log := min(ticks) > 0 and max(ticks) > 20 * min(ticks):
            axis.set_xscale("log")
        for i, one in enumerate(series):
            own = sorted((bar for bar in values if bar.series == one), key=lambda bar: float(bar.group))
            aside = 0.012 * (i - (len(series) - 1) / 2)  # of the axis, so that intervals stand beside each other
            x, y = [_moved(float(bar.group), aside, ticks, log) for bar in own], [bar.value for bar in own]
            axis.errorbar(
                x,
                y,
                _errors(own),
                capsize=2.5,
                linewidth=1.3,
                markersize=5,
                elinewidth=0.8,
                label=one,
                **_line_style(i),
            )
        for j, (text, value) in enumerate((references or {}).items()):
            axis.axhline(value, color="black", linewidth=0.8, linestyle=DASHES[1 + j % 3], label=text)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlabel(_plain(xlabel))
        axis.set_ylabel(ylabel)
        _legend(figure, axis)
    header = [xlabel, "series", "value", "low", "high"]
    return Drawing(name, caption, header, [list(dataclasses.astuple(bar)) for bar in values], _laid_out(figure))


def lines(name: str, caption: str, values: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str) -> Drawing:
    """A line through the points of each series."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 3.2), layout="constrained")
        axis = figure.subplots()
        for i, (one, points) in enumerate(values.items()):
            x, y = zip(*points, strict=True)
            often = max(1, len(points) // 6)
            axis.plot(x, y, label=one, linewidth=1.1, markersize=4, markevery=(i % often, often), **_line_style(i))
        axis.set_xlabel(_plain(xlabel))
        axis.set_ylabel(ylabel)
        _legend(figure, axis)
    rows = [[one, *point] for one, points in values.items() for point in points]
    return Drawing(name, caption, ["series", xlabel, ylabel], rows, _laid_out(figure))


def heatmaps(
    name: str, caption: str, maps: dict[str, np.ndarray], labels: tuple[str, str], marks=None, boundary=None
) -> Drawing:
    """Maps in shades of grey, black is the most, one beside the other with one scale; NaN stays white.

    Args:
        name, caption: of the drawing.
        maps: {title: (rows, columns)}.
        labels: of the vertical and of the horizontal axis.
        marks: (row, column) places that are circled.
        boundary: {title: column} before which a line stands.
    """
    across = min(2, len(maps))
    down = -(-len(maps) // across)
    highest = max(np.nanmax(values) for values in maps.values()) or 1.0
    rows, columns = next(iter(maps.values())).shape
    height = min(1.1 + WIDTH / across * min(1.3, max(0.25, rows / columns)), 1.2 + 0.35 * rows)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure((WIDTH, height * down + 0.3), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for axis, (title, values) in zip(axes, maps.items(), strict=False):
            picture = axis.imshow(values, cmap="Greys", vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
            axis.set_title(_plain(title), fontsize=8)
            for row, column in marks or ():
                axis.plot(
                    column,
                    row,
                    "o",
                    markersize=9,
                    markerfacecolor="none",
                    markeredgecolor="#d95f02",
                    markeredgewidth=1.5,
                )
            if boundary:
                axis.axvline(boundary[title] - 0.5, color="#d95f02", linewidth=1.5)
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_major_locator(ticker.MaxNLocator(6, integer=True))
        for axis in axes[len(maps) :]:
            axis.axis("off")
        figure.supylabel(labels[0], fontsize=9)
        figure.supxlabel(labels[1], fontsize=9)
        figure.colorbar(picture, ax=list(axes), shrink=0.8, aspect=30)
    data = [
        [title, r, c, float(value)]
        for title, values in maps.items()
        for (r, c), value in np.ndenumerate(values)
        if np.isfinite(value)
    ]
    return Drawing(name, caption, ["map", labels[0], labels[1], "value"], data, _laid_out(figure))


def _bars_of(axis, own: list[Bar], groups: list[str], number: int, of: int) -> None:
    width = 0.82 / of
    x = [groups.index(bar.group) + (number - (of - 1) / 2) * width for bar in own]
    style = {
        "color": FACES[number % len(FACES)],
        "hatch": HATCHES[number % len(HATCHES)],
        "edgecolor": "black",
        "linewidth": 0.6,
    }
    label = own[0].series if own and of > 1 else None
    axis.bar(
        x,
        [bar.value for bar in own],
        width,
        yerr=_errors(own),
        label=label,
        error_kw={"linewidth": 0.8, "capsize": 2},
        **style,
    )


def _errors(own: Sequence[Bar]):
    """The lengths of the error bars, or None without any."""
    if not any(bar.low is not None for bar in own):
        return None
    ends = [(bar.value - bar.low, bar.high - bar.value) if bar.low is not None else (0, 0) for bar in own]
    return np.maximum(0, np.array(ends).T)


def _line_style(number: int) -> dict[str, str]:
    """The marker, dashes and colour of a series: eight that differ in all three, or in two."""
    color = ("#2b5c8a", "#000000", "#7a7a7a", "#b04a00")[number % 4]
    dashes = DASHES[(number + number // 4) % len(DASHES)]
    return {"marker": MARKERS[number % len(MARKERS)], "linestyle": dashes, "color": color}


def _moved(x: float, share: float, ticks: Sequence[float], log: bool) -> float:
    """x, moved aside by a share of the axis."""
    if log:
        return x * (max(ticks) / min(ticks)) ** share
    return x + share * (max(ticks) - min(ticks))


def _logarithmic(axis) -> None:
    """A logarithmic axis whose numbers are written out."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _rows_of(groups: Sequence[str], series: int) -> list[list[str]]:
    """The groups in rows of nearly the same number, in which their bars and the longest words of their names fit."""
    longest = max((len(word) for group in groups for word in _words(group)), default=1)
    fit = max(1, min(26 // max(1, series), LETTERS // (longest + 1)))
    count = -(-len(groups) // fit)
    across = -(-len(groups) // count)
    return [list(groups[start : start + across]) for start in range(0, len(groups), across)]


def _legend(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    labels = [_plain(label) for label in labels]
    if labels:
        figure.legend(handles, labels, loc="outside upper center", ncols=_beside(labels))


def _beside(labels: Sequence[str]) -> int:
    """The columns of a legend."""
    return min(len(labels), max(1, 54 // (max(map(len, labels)) + 8)))


def _wrapped(text: str, groups: int) -> str:
    """A group's name in lines that fit below it."""
    room, found = LETTERS // groups, [""]
    for word in _words(text):
        if found[-1] and len(found[-1]) + len(word) >= room:
            found.append("")
        space = "" if found[-1].endswith("-") else " "
        found[-1] = f"{found[-1]}{space}{word}".strip()
    return _plain("\n".join(found))


def _plain(text: str) -> str:
    """A text from data as matplotlib draws it: no formula, which it would read between two $ and may not understand."""
    return shown(text, keep="\n").replace("$", "\\$")


def _words(text: str) -> list[str]:
    """The parts between which a name can be broken; a hyphen stays with what is before it."""
    return re.sub(r"(?<=\w)-(?=\w)", "- ", text.replace("_", " ")).split()


def _laid_out(figure):
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
