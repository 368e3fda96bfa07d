"""Files and folders that appear complete or not at all: written beside their place under another name, then renamed.

The content reaches the disk before the renaming, so that not even a power cut leaves an empty file under a final name.
"""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mend_jax.cli.errors import UserError

FORSAKEN = 24 * 3600  # seconds after which a temporary file that nobody can tell the owner of is taken for left behind


def write_text(path: str | Path, text: str) -> None:
    """Writes or replaces a text file (UTF-8)."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content, indent: int | None = 1, **options) -> None:
    """Writes or replaces a JSON file; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(content, indent=indent, **options) + "\n")


def write_report(path: str, report: dict) -> None:
    """Writes a benchmark's report as JSON. Raises UserError if it cannot be written."""
    target = Path(path).expanduser()
    try:
        write_json(target, report, indent=2)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): give another --out.") from None


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Where to write the content of the file `path`: renamed to it at the end of the block, or removed on an error."""
    path = Path(path)
    temporary = temporary_for(path)
    with _removed_on_error(temporary):
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)


@contextlib.contextmanager
def whole_folder(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """A new folder beside `path`, renamed to it at the end of the block, or removed on an error.

    Creates the parents of `path`. `sync`: wait until every file has reached the disk, which is slow for thousands of files.
    Raises OSError if `path` is a folder with content by the end of the block.
    """
    path = Path(path)
    temporary = temporary_for(path)
    temporary.mkdir(parents=True)
    with _removed_on_error(temporary):
        yield temporary
        for file in temporary.rglob("*"):
            if sync and file.is_file():
                sync_file(file)
        os.replace(temporary, path)


def temporary_for(path: Path) -> Path:
    """Where to write before renaming to `path`: `.<name>.<machine>.<process>.<random>.tmp` in the same folder, never the same.

    Removes what killed processes of this machine left there, and of all others what nobody has written to for a day; leaves
    the files of live processes.
    """
    mine = f".{path.name}.{_machine()}."
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = other.name.removeprefix(mine).split(".")[0]
        if number.isdecimal() and other.name.startswith(mine):
            left = not _lives(int(number))
        else:
            left = _clock_of(path.parent) - _last_written(other) > FORSAKEN
        if left:
            _remove(other)
    return path.with_name(f"{mine}{os.getpid()}.{secrets.token_hex(4)}.tmp")


@functools.cache
def _machine() -> str:
    """What process numbers are unique in: the machine since it was started, or a container on it. Names of hosts are not enough,
    since the pods of a cluster may share one, and a disk."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux has both
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return f"{facts[0]}-{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:8]}"


def _clock_of(folder: Path) -> float:
    """This moment, in seconds, by the clock that stamps the folder's files: that of this machine may be wrong by years."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError:  # nothing can be written there, nor removed
        return 0.0


def _last_written(path: Path) -> float:
    """When a file, or one in a folder, was last written to, in seconds; of one that is gone by now, never yet."""
    try:
        return max(file.stat().st_mtime for file in [path, *path.rglob("*")])
    except OSError:
        return math.inf


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or one of its causes, says that no space is left on the device."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in text or "ENOSPC" in text or "Disk quota exceeded" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _removed_on_error(temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    """Removes a file or folder; if that fails, the rest is harmless and no reason to stop."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def sync_file(file: Path) -> None:
    """Waits until what a file holds has reached the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        pass
    return True
