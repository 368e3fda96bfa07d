"""A table of the report: as it is read, and as numbers."""

import dataclasses
from collections.abc import Sequence

from mend_jax.report.names import joined
from mend_jax.scoring.cells import Cell, Value, as_data, as_rows


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts, and the same as numbers for its CSV; `folded` ones are closed at first."""

    name: str  # of its file
    title: str
    header: list[str]
    rows: list[list[str]]
    data_header: list[str]
    data_rows: list[list[Value]]
    folded: bool = False
    labels: int = 1  # the first columns, which name a row
    note: str = ""  # what must be known to read it

    @classmethod
    def of(cls, name: str, title: str, lines: Sequence[Sequence[Cell]], **more) -> "Table":
        """Of lines with the same columns, at least one."""
        return cls(name, title, *as_rows(lines), *as_data(lines), **more)

    def row_label(self, row: Sequence[str]) -> str:
        """What names a row, as one text: on a phone it stays in sight."""
        return joined(zip(self.header[: self.labels], row, strict=False))
