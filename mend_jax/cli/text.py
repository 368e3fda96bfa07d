"""Numbers and tables as text for people: durations, sizes, counts, aligned columns; names from data, which may hold anything."""

import re

# What a terminal or a page would obey instead of showing: control characters, marks that turn the direction of writing, ends of
# lines, half characters. Not all of the class Cf: it holds what joins the parts of an emoji.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_BAR = re.compile(r"(?<!\\)\|")
_MARKS = re.compile(r"([\\`|<>])")  # of Markdown: what would end a cell, begin HTML or code


def shown(text: str, keep: str = "") -> str:
    """A text with every character escaped that a terminal would obey, as Python writes it (\\x1b), but for those in `keep`."""
    escape = lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1]  # noqa: E731
    return _OBEYED.sub(escape, text)


def in_markdown(text: str) -> str:
    """A text from data as it is read in a Markdown page, in a cell of a table too."""
    return _MARKS.sub(r"\\\1", shown(text))


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, for work in progress."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def minutes(seconds: float) -> str:
    """A duration as "N min N s", or "N s" below a minute, for finished work."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest} s" if whole else f"{rest} s"


def size(count: float) -> str:
    """A number of bytes in B, kB, MB or GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{number(count)} {unit}"
        count /= 1000
    return f"{number(count)} GB"


def number(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.3g}"


def counted(count: int, thing: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are also aligned as plain text. Cells are `shown`, and none ends
    before its end; a text from data wants `in_markdown` too.
    """
    header, *rows = [[_BAR.sub(r"\\|", shown(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([line(header), line(["-" * w for w in widths]), *(line(row) for row in rows)])


def columns(rows: list[list[str]], left: int = 1) -> str:
    """A table as plain text: the first `left` columns are left-aligned, the others right-aligned. Cells are `shown`."""
    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
