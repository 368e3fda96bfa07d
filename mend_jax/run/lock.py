"""A folder that one command at a time writes."""

import contextlib
import fcntl
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.run import distributed
from mend_jax.run.files import is_disk_full


@contextlib.contextmanager
def alone_in(workdir: Path, name: str, doing: str) -> Iterator[None]:
    """Locks a workdir, so that no other command of the same kind writes its files. The system ends a lock with its process.

    A new workdir is removed if a UserError leaves it empty.

    Args:
        workdir: the folder, which is made where it is not there.
        name: of the file in it that is locked; it stays.
        doing: what the other command does, for the message: "training".
    Raises:
        UserError: another command has the lock, or the folder cannot be written. OSError: a full disk.

    On a file system without locks it warns and goes on.
    """
    new, first = not workdir.exists(), distributed.is_first()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / name, "a")  # noqa: SIM115
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"The workdir {workdir} cannot be written ({error.strerror}): name another.") from error
    with file:
        if first:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"Another run is {doing} in {workdir}: wait for it, or name another workdir.") from None
            except OSError as error:
                logging.warning(
                    "The file system of %s has no locks (%s): see to it yourself that no other run is %s there.",
                    workdir, error.strerror, doing,
                )  # fmt: skip
        try:
            yield
        except UserError:
            if new and first:
                _remove_unused(workdir, name)
            raise


def _remove_unused(workdir: Path, name: str) -> None:
    """Removes a workdir that holds nothing but the lock and empty folders."""
    if all(path.is_dir() or path.name == name for path in workdir.rglob("*")):
        shutil.rmtree(workdir)
