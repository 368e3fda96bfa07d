"""By which facts a message is asserted (facts.py): what is not stated, or stated of something else, is seen."""

import re

import pytest
from facts import says, states

from mend_jax.cli.errors import UserError

SENTENCE = 'runs/one/t_4_13.jsonl, line 2: config.data.k = 40 and loss.kd="0.5" do not go with 3 heads: give --fix.'


@pytest.mark.parametrize("fact", ["runs/one/t_4_13.jsonl, line 2", "data.k = 40", 40, '"0.5"', 0.5, "3 heads", "--fix", re.compile(r"\d heads")])  # fmt: skip
def test_what_is_stated(fact):
    states(SENTENCE, fact)


@pytest.mark.parametrize("fact", [4, 5, 13, 1, "data.k = 4", "runs/one", "runs", "one/t_4_13", "ata.k", "3 head", "--fi", "line 20", "HEADS", re.compile("5 heads")])  # fmt: skip
def test_what_is_not(fact):
    with pytest.raises(AssertionError, match="is not stated in: runs/one"):
        states(SENTENCE, 40, fact)


def test_a_block_must_raise_one_line():
    with pytest.raises(pytest.fail.Exception), says("a"):
        pass
    with pytest.raises(AssertionError), says("a"):
        raise UserError("a\nb")
    with pytest.raises(ValueError), says("a"):
        raise ValueError("a")
