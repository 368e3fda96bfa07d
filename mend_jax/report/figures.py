"""Bars, curves and lines: each figure with the data that it shows."""

import contextlib
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from mend_jax.report.drawing import STYLE, WIDTH, Bar, Drawing, beside, laid_out, legend, plain
from mend_jax.report.looks import KNOWN, Look, looks

with contextlib.suppress(ImportError):  # drawing.require_matplotlib says so
    import matplotlib
    from matplotlib import ticker
    from matplotlib.figure import Figure

LETTERS = 50  # beside each other below an axis
DASHES = ("--", "-.", ":")  # of lines across


def bars(
    name: str,
    caption: str,
    values: Sequence[Bar],
    ylabel: str,
    references: dict[str, float] | None = None,
    log=False,
    xlabel: str = "",
) -> Drawing:
    """Groups of bars, a look for each series, or of a single series for each group that is a known method; `references` are lines
    across. What does not fit beside each other is in rows of one scale."""
    groups, series = (list(dict.fromkeys(getattr(bar, what) for bar in values)) for what in ("group", "series"))
    chunks, drawn_as = _rows_of(groups, len(series)), looks(series)
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 2.3 * len(chunks) + 0.9), layout="constrained")
        axes = figure.subplots(len(chunks), 1, squeeze=False, sharey=True)[:, 0]
        for axis, chunk in zip(axes, chunks, strict=True):
            for i, one in enumerate(series):
                own = [b for b in values if b.series == one and b.group in chunk]
                _bars_of(axis, own, chunk, i, len(series), drawn_as[one])
            _lines_across(axis, references)
            axis.set_xticks(range(len(chunk)), [_wrapped(group, len(chunks[0])) for group in chunk])
            axis.set_xlim(-0.55, len(chunks[0]) - 0.45)  # bars are as wide in every row
            axis.set_ylabel(ylabel)
            if log:
                _logarithmic(axis)
        axes[-1].set_xlabel(plain(xlabel))
        legend(figure, axes[0])
    header = ["group", "series", "value", "low", "high"]
    return Drawing(name, caption, header, [list(dataclasses.astuple(bar)) for bar in values], laid_out(figure))


def curves(name: str, caption: str, values: Sequence[Bar], xlabel: str, ylabel: str, references=None) -> Drawing:
    """Values over a number, which is the `group` of each; logarithmic where the numbers go over more than a factor of 20."""
    drawn = panels(name, caption, {"": values}, xlabel, ylabel, references)
    return dataclasses.replace(drawn, header=drawn.header[1:], rows=[row[1:] for row in drawn.rows])


def panels(
    name: str, caption: str, values: dict[str, Sequence[Bar]], xlabel: str, ylabel: str, references=None
) -> Drawing:
    """`curves` beside each other with one scale, {title: values}."""
    every = [bar for own in values.values() for bar in own]
    series = list(dict.fromkeys(bar.series for bar in every))
    names = [*series, *(references or {})]
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 2.9 + 0.17 * -(-len(names) // beside(names))), layout="constrained")
        axes = figure.subplots(1, len(values), squeeze=False, sharey=True)[0]
        for axis, (title, own) in zip(axes, values.items(), strict=True):
            _curves_on(axis, own, series)
            _lines_across(axis, references)
            axis.set_title(plain(title), fontsize=9)
        figure.supxlabel(plain(xlabel), fontsize=9)
        axes[0].set_ylabel(ylabel)
        legend(figure, axes[0])
    rows = [[title, *dataclasses.astuple(bar)] for title, own in values.items() for bar in own]
    return Drawing(name, caption, ["panel", xlabel, "series", "value", "low", "high"], rows, laid_out(figure))


def lines(name: str, caption: str, values: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str) -> Drawing:
    """A line through the points of each series."""
    drawn_as = looks(list(values))
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 2.9 + 0.17 * -(-len(values) // beside(list(values)))), layout="constrained")
        axis = figure.subplots()
        for i, (one, points) in enumerate(values.items()):
            x, y = zip(*points, strict=True)
            often = max(1, len(points) // 6)
            style = _line_style(drawn_as[one])
            axis.plot(x, y, label=one, linewidth=1.1, markersize=4, markevery=(i % often, often), **style)
        axis.set_xlabel(plain(xlabel))
        axis.set_ylabel(ylabel)
        legend(figure, axis)
    rows = [[one, *point] for one, points in values.items() for point in points]
    return Drawing(name, caption, ["series", xlabel, ylabel], rows, laid_out(figure))


def _bars_of(axis, own: list[Bar], groups: list[str], number: int, of: int, look: Look) -> None:
    """The bars of one of `of` series."""
    width = 0.82 / of
    x = [groups.index(bar.group) + (number - (of - 1) / 2) * width for bar in own]
    each = [KNOWN.get(bar.group, look) if of == 1 else look for bar in own]
    axis.bar(
        x,
        [bar.value for bar in own],
        width,
        yerr=_errors(own),
        label=own[0].series if own and of > 1 else None,
        error_kw={"linewidth": 0.8, "capsize": 2},
        color=[one.face for one in each],
        hatch=[one.hatch for one in each],
        edgecolor="black",
        linewidth=0.6,
    )


def _curves_on(axis, values: Sequence[Bar], series: Sequence[str]) -> None:
    """A curve with its intervals for each series of the figure."""
    ticks = sorted({float(bar.group) for bar in values})
    if log := min(ticks) > 0 and max(ticks) > 20 * min(ticks):
        axis.set_xscale("log")
    for i, (one, look) in enumerate(looks(series).items()):
        own = sorted((bar for bar in values if bar.series == one), key=lambda bar: float(bar.group))
        aside = 0.012 * (i - (len(series) - 1) / 2)  # of the axis, so that intervals stand beside each other
        x, y = [_moved(float(bar.group), aside, ticks, log) for bar in own], [bar.value for bar in own]
        style = {"capsize": 2.5, "linewidth": 1.3, "markersize": 5, "elinewidth": 0.8, **_line_style(look)}
        axis.errorbar(x, y, _errors(own), label=one, **style)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(ticker.NullLocator())


def _lines_across(axis, references: dict[str, float] | None) -> None:
    for number, (text, value) in enumerate((references or {}).items()):
        axis.axhline(value, color="black", linewidth=0.8, linestyle=DASHES[number % 3], label=text)


def _errors(own: Sequence[Bar]):
    """The lengths of the error bars, or None without any."""
    if not any(bar.low is not None for bar in own):
        return None
    ends = [(bar.value - bar.low, bar.high - bar.value) if bar.low is not None else (0, 0) for bar in own]
    return np.maximum(0, np.array(ends).T)


def _line_style(look: Look) -> dict[str, str]:
    return {"marker": look.marker, "linestyle": look.dashes, "color": look.line}


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


def _wrapped(text: str, groups: int) -> str:
    """A group's name in lines that fit below it."""
    room, found = LETTERS // groups, [""]
    for word in _words(text):
        if found[-1] and len(found[-1]) + len(word) >= room:
            found.append("")
        space = "" if found[-1].endswith(("-", "_")) else " "
        found[-1] = f"{found[-1]}{space}{word}".strip()
    return plain("\n".join(found))


def _words(text: str) -> list[str]:
    """The parts between which a name can be broken; a hyphen, or an underscore between longer words, stays with what is before it."""
    return re.sub(r"(?<=\w)(-)(?=\w)|(?<=[^\W_]{3})(_)(?=[^\W_]{3})", r"\1\2 ", text).split()
