"""The progress of long work, for the user: a bar on a terminal, an occasional line in a log."""

import sys
import time

from tqdm import tqdm

from mend_jax.cli.text import clock, size
from mend_jax.run import distributed

QUIET_SECONDS = 30  # the least time between lines if the output is not a terminal


class Progress:
    """Counts finished units of `total`; only the first process of a command shows it."""

    def __init__(self, total: int, unit: str, scale: bool = False):
        self.total, self.unit, self.scale, self.done, self.what, self.more = total, unit, scale, 0, "", ""
        self.shown = distributed.is_first()
        self.began = self.last_line = time.monotonic()
        self.bar = None
        if self.shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, unit=unit, unit_scale=scale, dynamic_ncols=True)

    def at(self, what: str) -> None:
        """Names the current piece of work."""
        self.what = what
        if self.bar is not None:
            self.bar.set_description(what, refresh=False)

    def add(self, more: str) -> None:
        """Sets a text that is shown beside the count."""
        self.more = f", {more}"
        if self.bar is not None:
            self.bar.set_postfix_str(more, refresh=False)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def update(self, count: int = 1) -> None:
        """Counts `count` more units as finished."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown and (time.monotonic() - self.last_line > QUIET_SECONDS or self.done == self.total):
            self._line()

    def skip(self, count: int) -> None:
        """Takes `count` units that need no work out of the estimate of the time left."""
        self.total -= count
        if self.bar is not None:
            self.bar.total -= count

    def _line(self) -> None:
        self.last_line = time.monotonic()
        passed = self.last_line - self.began
        left = passed / max(self.done, 1) * (self.total - self.done)
        rest = f", {clock(left)} left" if self.done < self.total else f" in {clock(passed)}"
        what = f"{self.what}: " if self.what else ""
        amounts = [size(count) if self.scale else f"{count:,}" for count in (self.done, self.total)]
        unit = "" if self.scale else f" {self.unit}s"
        print(f"{what}{amounts[0]} of {amounts[1]}{unit}{self.more}{rest}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
