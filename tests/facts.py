"""What a user's message is asserted by: the facts its reader needs (file, line, field, value, remedy), in whatever words."""

import re
from contextlib import contextmanager

import pytest

from mend_jax.cli.errors import UserError


@contextmanager
def says(*facts):
    """`with says(path, "config.data.k", 4):` where the block must raise UserError, in one line that states every fact."""
    with pytest.raises(UserError) as error:
        yield
    states(str(error.value), *facts)


def states(sentence, *facts):
    """Asserts that a message is one line and states every fact.

    A fact is a text, a path, a number, or a compiled pattern where a part is not known. It is found as a whole: 4 is not in
    40, in 0.4 nor in t_4_13, and a folder is not in the path of a file within it.
    """
    assert "\n" not in sentence, sentence
    for fact in facts:
        found = fact if isinstance(fact, re.Pattern) else re.compile(_whole(str(fact)))
        assert found.search(sentence), f"{fact!r} is not stated in: {sentence}"


def _whole(fact):
    """The pattern of a fact with nothing at its ends that would make another name, path or number of it."""
    before = r"(?<![\w/.-])" if fact[0].isdigit() else r"(?<!\w)" if fact[0].isalpha() else ""
    behind = r"(?![\w/]|[.-]\w)" if re.match(r"\w", fact[-1]) else ""
    return before + re.escape(fact) + behind
