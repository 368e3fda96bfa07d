"""One look for each method in every figure, told apart in black and white too: bars by hatches and shades, curves by markers and dashes."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from mend_jax.report.names import METHODS


class Look(NamedTuple):
    """A bar's colour and hatch, a curve's colour, marker and dashes."""

    face: str
    hatch: str
    line: str
    marker: str
    dashes: str


KNOWN = {
    METHODS["zero_shot"]: Look("#ffffff", "", "#7a7a7a", "x", ":"),
    METHODS["prompt_tuning"]: Look("#f6dfbd", "...", "#a86200", "D", "-."),
    METHODS["icl"]: Look("#c4c4c4", "", "#000000", "o", "-"),
    METHODS["hypertuning"]: Look("#dce8cc", "\\\\\\", "#4b7a28", "^", "--"),
    METHODS["mend"]: Look("#6397c6", "", "#2b5c8a", "s", "-"),
    f"{METHODS['icl']}, paper": Look("#e4e4e4", "///", "#000000", "o", ":"),
    f"{METHODS['mend']}, paper": Look("#c9dbec", "\\\\\\", "#2b5c8a", "s", ":"),
}
ALONE = Look("#d3e3f0", "", "#2b5c8a", "o", "-")
OTHERS = (  # for series that are no method of the paper, in their order
    Look("#d3e3f0", "xxx", "#b04a00", "v", "--"),
    Look("#f0e3e8", "---", "#8a3b6e", "P", "-."),
    Look("#e8e4f4", "+++", "#5a4a9a", "X", ":"),
    Look("#fdf3c8", "|||", "#7a6a00", "*", "--"),
    Look("#d8efee", "ooo", "#1f7a76", "<", "-."),
    Look("#efefef", "///", "#555555", ">", "--"),
    Look("#c4c4c4", "...", "#c0392b", "h", ":"),
    Look("#86add0", "\\\\\\", "#222222", "d", "-."),
)


def looks(series: Sequence[str]) -> dict[str, Look]:
    """The look of each series of a figure: a known method's own, for others the next that is free; a single one needs no hatch."""
    if len(series) == 1:
        return {series[0]: KNOWN.get(series[0], ALONE)}
    free = itertools.cycle(OTHERS)
    return {name: KNOWN[name] if name in KNOWN else next(free) for name in series}
