"""The one thread that uses the device. Requests of a kind that wait at the same time are answered in one call.

Nothing waits for company: whoever comes first begins at once, and those who come meanwhile are the next batch.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from mend_jax.cli.errors import UserError
from mend_jax.serving.refusal import busy

# (kind, what is asked) -> an answer or a UserError for each
Answer = Callable[[Hashable, Sequence[Any]], Sequence[Any]]


@dataclasses.dataclass(eq=False)
class Job:
    """A request that waits for the device. Its future ends with `Done`, or with the exception of its answer."""

    kind: Hashable
    rows: int  # how much of a batch it takes
    asked: Any
    future: Future = dataclasses.field(default_factory=Future)
    since: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(frozen=True)
class Done:
    """An answer."""

    value: Any
    waited: float  # seconds before it began
    seconds: float  # that its batch took
    together: int  # requests of the batch


class Worker:
    """Answers jobs in the order in which they came, each with those of its kind that wait."""

    def __init__(self, answer: Answer, max_rows: int, max_waiting: int, count: Callable[[int], None]):
        """`max_rows` of a batch; a job that has more is a batch by itself. `max_waiting` jobs may wait. `count` is called with the
        number of jobs of each batch."""
        self._answer, self._max_rows, self._max_waiting, self._count = answer, max_rows, max_waiting, count
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    @property
    def busy(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    def submit(self, kind: Hashable, rows: int, asked: Any) -> Job:
        """Lets a job wait. Raises `Refused` where too many do, or where the server stops."""
        with self._changed:
            if self._stopping:
                raise busy("The server is stopping: ask another, or later.")
            if len(self._jobs) >= self._max_waiting:
                raise busy(f"{len(self._jobs)} requests are waiting, the most that may: try again in a moment.", 429)
            self._jobs.append(job := Job(kind, rows, asked))
            self._changed.notify()
        return job

    def drop(self, job: Job) -> bool:
        """Takes a job back; returns False where it has begun."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
        return job.future.cancel()

    def stop(self, seconds: float) -> None:
        """Finishes the jobs that wait, takes no others, and returns when that is done, or after some seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        while batch := self._next():
            begun = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if begun:
                self._count(len(begun))
                self._finish(begun)

    def _next(self) -> list[Job]:
        """The jobs of the next batch; none at the end."""
        with self._changed:
            while not self._jobs and not self._stopping:
                self._changed.wait()
            batch, rows = [], 0
            for job in self._jobs:
                if batch and (job.kind != batch[0].kind or rows + job.rows > self._max_rows):
                    continue
                batch.append(job)
                rows += job.rows
            taken = set(map(id, batch))
            self._jobs = [job for job in self._jobs if id(job) not in taken]
            return batch

    def _finish(self, batch: list[Job]) -> None:
        start = time.monotonic()
        try:
            values = self._answer(batch[0].kind, [job.asked for job in batch])
        except Exception as error:
            if len(batch) > 1:  # it may be the fault of one of them alone
                for job in batch:
                    self._finish([job])
                return
            logging.getLogger(__name__).error("a request failed", exc_info=error)
            values = [error]
        seconds = time.monotonic() - start
        for job, value in zip(batch, values, strict=True):
            if isinstance(value, UserError | Exception):
                job.future.set_exception(value)
            else:
                job.future.set_result(Done(value, start - job.since, seconds, len(batch)))
