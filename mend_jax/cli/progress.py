"""The progress of long work, for the user: a bar on a terminal, an occasional line in a log."""

import sys
import threading
from time import monotonic

from tqdm import tqdm

from mend_jax.cli.text import clock, shown, size
from mend_jax.run import distributed

QUIET_SECONDS = 20  # the least time between lines if the output is not a terminal
BAR_SECONDS = 1  # a bar's clock moves at least this often, and a missing line is noticed as soon


class Progress:
    """Counts finished units of `total`; only the first process of a command shows it.

    A unit may take minutes: within `with`, a thread keeps the bar's clock moving and prints the lines that are due. With `leave`
    false the work is a part of something that reports its end itself: the bar goes away, and there is no last line.
    """

    def __init__(self, total: int, unit: str, scale: bool = False, what: str = "", leave: bool = True):
        self.total, self.unit, self.scale, self.leave = total, unit, scale, leave
        self.done, self.what, self.more = 0, what, ""
        self.shown = distributed.is_first()
        self.began = self.last_line = monotonic()
        self.lock, self.over = threading.Lock(), threading.Event()
        self.bar = None
        if self.shown and sys.stderr.isatty():
            self.bar = tqdm(
                total=total, unit=unit, unit_scale=scale, desc=what or None, leave=leave, dynamic_ncols=True
            )

    def at(self, what: str) -> None:
        """Names the current piece of work."""
        what = self.what = shown(what)
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
        return monotonic() - self.began

    def update(self, count: int = 1) -> None:
        """Counts `count` more units as finished."""
        with self.lock:
            self.done += count
            if self.bar is not None:
                self.bar.update(count)
            else:
                self._line_if_due(ends=self.done == self.total and self.leave)

    def skip(self, count: int) -> None:
        """Takes `count` units that need no work out of the estimate of the time left."""
        with self.lock:
            self.total -= count
            if self.bar is not None:
                self.bar.total -= count

    def tick(self) -> None:
        """Shows that the work goes on, between two updates."""
        with self.lock:
            if self.bar is not None:
                self.bar.refresh()
            else:
                self._line_if_due()

    def _line_if_due(self, ends: bool = False) -> None:
        if self.shown and (ends or monotonic() - self.last_line >= QUIET_SECONDS):
            self._line()

    def _line(self) -> None:
        self.last_line = monotonic()
        passed = self.last_line - self.began
        rest = f" in {clock(passed)}"
        if self.done < self.total:
            rest = (
                f", {clock(passed / self.done * (self.total - self.done))} left"
                if self.done
                else f" after {clock(passed)}"
            )
        what = f"{self.what}: " if self.what else ""
        amounts = [size(count) if self.scale else f"{count:,}" for count in (self.done, self.total)]
        unit = "" if self.scale else f" {self.unit if self.total == 1 else _plural(self.unit)}"
        print(f"{what}{amounts[0]} of {amounts[1]}{unit}{self.more}{rest}", file=sys.stderr, flush=True)

    def _keep_ticking(self) -> None:
        while not self.over.wait(BAR_SECONDS):
            self.tick()

    def __enter__(self) -> "Progress":
        if self.shown:
            self.thread = threading.Thread(target=self._keep_ticking, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        if self.shown:
            self.thread.join()
        if self.bar is not None:
            self.bar.close()


def _plural(unit: str) -> str:
    return unit.removesuffix("y") + "ies" if unit.endswith("y") else unit + "s"


class Parts:
    """Work in parts of several kinds, and how long the rest of it will take, kind by kind."""

    def __init__(self, parts: list[tuple[str, float]]):
        """`parts`: (kind, weight) of each that is left, in the order in which they will be done."""
        self.left, self.total, self.spent = list(parts), len(parts), {}

    def begin(self) -> str:
        """Where the next part stands: "part 3 of 21, 0:14:05 left"; without a time before any part has ended."""
        place = f"part {self.total - len(self.left) + 1} of {self.total}"
        seconds = self.seconds_left()
        return place if seconds is None else f"{place}, {clock(seconds)} left"

    def end(self, kind: str, weight: float, seconds: float) -> None:
        """The next part of this kind has ended after so many seconds."""
        before = self.spent.get(kind, (0.0, 0.0))
        self.spent[kind] = before[0] + weight, before[1] + seconds
        at = next((i for i, (other, _) in enumerate(self.left) if other == kind), None)
        if at is not None:
            del self.left[at]

    def seconds_left(self) -> float | None:
        """By the seconds per weight of each kind so far; a kind of which nothing has ended yet is not counted. None if there is
        nothing to go by."""
        known = [(weight, self.spent[kind]) for kind, weight in self.left if kind in self.spent]
        return sum(weight * seconds / done for weight, (done, seconds) in known) if known else None
