"""The progress of long work: lines without a terminal, by a fake clock; a bar on a terminal that goes away."""

import sys

import pytest
from facts import states

from mend_jax.cli import progress
from mend_jax.cli.progress import QUIET_SECONDS, Progress


class Clock:
    """Seconds that pass only when told to."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_log_has_at_most_half_a_minute_without_a_line():
    assert QUIET_SECONDS + progress.BAR_SECONDS <= 30


def test_a_line_when_it_is_due_and_at_the_end(clock, capsys):
    bar = Progress(4, "item", what="emo 13")
    clock.now += QUIET_SECONDS - 1
    bar.update()
    assert lines(capsys) == []  # not yet due
    clock.now += 1
    bar.update()
    [line] = lines(capsys)
    states(line, "emo 13", 2, 4, "items", "0:00:20 left")  # two in 20 s, two left
    bar.at("emo 21")
    clock.now += 1
    bar.update()
    assert lines(capsys) == []  # quiet again
    bar.update()
    [line] = lines(capsys)
    states(line, "emo 21", "4 of 4", "0:00:21")
    assert "left" not in line


def test_several_queries_are_no_querys(clock, capsys):
    for total in (1, 2):
        Progress(total, "query").update(total)
    one, two = lines(capsys)
    states(one, "1 of 1 query")
    states(two, "2 of 2 queries")


def test_a_unit_that_takes_long_is_not_silent(clock, capsys):
    bar = Progress(1, "step")
    found = []
    for _ in range(3 * QUIET_SECONDS):
        clock.now += 1
        bar.tick()
        found += lines(capsys)
    assert len(found) == 3
    for line, passed in zip(found, ("0:00:20", "0:00:40", "0:01:00"), strict=True):
        states(line, "0 of 1", passed)
        assert "left" not in line  # nothing is known of it yet


def test_a_part_of_other_work_prints_no_last_line(clock, capsys):
    with Progress(2, "part", leave=False) as bar:
        bar.update(2)
    assert lines(capsys) == []


def test_what_needs_no_work_is_not_waited_for(clock, capsys):
    bar = Progress(10, "item")
    bar.skip(6)
    clock.now += QUIET_SECONDS
    bar.update(2)
    [line] = lines(capsys)
    states(line, "2 of 4", "0:00:20 left")


def test_other_processes_are_silent(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.distributed, "is_first", lambda: False)
    with Progress(1, "item") as bar:
        clock.now += QUIET_SECONDS
        bar.tick()
        bar.update()
    assert lines(capsys) == []


@pytest.mark.parametrize("leave", [True, False])
def test_a_bar_on_a_terminal(leave, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(2, "item", what="emo 13", leave=leave) as bar:
        bar.update(2)
        bar.tick()
    shown = capsys.readouterr().err
    assert "emo 13" in shown and "2/2" in shown and ("emo 13" in shown.split("\r")[-1]) == leave
