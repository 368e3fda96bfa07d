"""Numbers and tables as text for people: durations, sizes, aligned columns."""


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


def printable(text: str) -> str:
    """A text of somebody else's in one line, whose control characters do nothing to a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are also aligned as plain text."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([line(header), line(["-" * w for w in widths]), *(line(row) for row in rows)])


def columns(rows: list[list[str]], left: int = 1) -> str:
    """A table as plain text: the first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
