"""What a command says of the machine and of odd things in data: one sentence, which the terminal shows and does not obey."""

import errno
from logging import BASIC_FORMAT, Formatter, StreamHandler, getLogger

from mend_jax.cli.text import shown
from mend_jax.run.files import is_disk_full


def of_the_machine(error: BaseException) -> str:
    """What the machine lacks, in a sentence, if that is what an error of any library comes from; else ""."""
    if is_disk_full(error):
        return "the disk is full: free some space, then run the same command again."
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return "too many files are open at once: raise the limit (ulimit -n 1024), then run the same command again."
    if isinstance(error, RuntimeError) and "home directory" in text:
        return "this user has no home folder, where ~ would lead: set HOME, or give paths without ~."
    if type(error).__name__ == "PanicException":  # of the tokenizers' own code; its class is no Exception
        return (
            f"the tokenizer cannot read a text ({text[:200]}): its tokenizer.json holds a pattern that cannot be used."
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return (
            f"{error.filename} cannot be read or written ({error.strerror}): check that it is there and that you may."
        )
    return ""


def plain_warnings() -> None:
    """Prints warnings as "warning: SENTENCE", each once: two stages of one command may give the same warning."""
    handler, printed = StreamHandler(), set()
    handler.setFormatter(_Shown("warning: %(message)s"))
    handler.addFilter(lambda record: not (record.getMessage() in printed or printed.add(record.getMessage())))
    root = getLogger()
    for other in list(root.handlers):  # a library may have called logging.basicConfig, whose format is for programmers
        if getattr(other.formatter, "_fmt", "") == BASIC_FORMAT:
            root.removeHandler(other)
    if not root.handlers:
        root.addHandler(handler)


class _Shown(Formatter):
    """Warnings name what stands in data: nothing of it is obeyed by the terminal."""

    def format(self, record) -> str:
        return shown(super().format(record), keep="\n")
