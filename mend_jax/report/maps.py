"""Maps in shades of grey."""

import contextlib

import numpy as np

from mend_jax.report.drawing import STYLE, WIDTH, Drawing, laid_out, plain

with contextlib.suppress(ImportError):  # drawing.require_matplotlib says so
    import matplotlib
    from matplotlib import ticker
    from matplotlib.figure import Figure


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
            axis.set_title(plain(title), fontsize=8)
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
    return Drawing(name, caption, ["map", labels[0], labels[1], "value"], data, laid_out(figure))
