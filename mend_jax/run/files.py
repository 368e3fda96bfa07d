"""Files that appear whole or not at all: written beside their place under another name, then renamed."""

import contextlib
import glob
import json
import os
import socket
from pathlib import Path

from mend_jax.cli.errors import UserError


def temporary_for(path: Path) -> Path:
    """Where this process writes a file before it is renamed to `path`: `.<name>.<machine>.<process>.tmp`, in the same folder.

    What processes of this machine that were killed left there is removed; of those that live, and of others, it stays.
    """
    mine = f".{path.name}.{socket.gethostname()}"
    for other in path.parent.glob(f"{glob.escape(mine)}.*.tmp"):
        number = other.name.split(".")[-2]
        if number.isdigit() and not _lives(int(number)):
            with contextlib.suppress(OSError):  # litter is no reason to stop
                other.unlink()
    return path.with_name(f"{mine}.{os.getpid()}.tmp")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def write_report(path: str, report: dict) -> None:
    """A report as JSON, whole or not at all. Raises UserError where it cannot be written."""
    target = Path(path).expanduser()
    try:
        temporary = temporary_for(target)
        temporary.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): give another --out.") from None
