"""Where a text can be cut for two tokenizers at once; when two tokenizers are one."""

import copy

import numpy as np
import pytest
import tokenizer_files
from tokenizers import Tokenizer

from mend_jax.data.alignment import common_ends, cut
from mend_jax.data.tokenize import other_tokenizer, readings, tokenizer_text


def test_marks_are_where_both_end_a_token():
    #        w    1    2    _w3      |  w12       _    w3
    first, second = [(0, 1), (1, 2), (2, 3), (3, 6)], [(0, 3), (3, 4), (4, 6)]
    marks = common_ends(first, second)
    assert [row.astype(int).tolist() for row in marks] == [[0, 0, 1, 0], [1, 0, 0]]
    assert cut(marks, (4, 3)) == (4, 3)  # all of it
    assert cut(marks, (3, 3)) == cut(marks, (4, 2)) == (3, 1)
    assert cut(marks, (2, 3)) == (0, 0)


@pytest.mark.parametrize("offsets", [
    [(0, 2), (1, 2), (1, 2), (2, 4)],  # a space with the first of three bytes of one character, then a word
    [(0, 1), (0, 1), (0, 2), (2, 4)],  # a character that became several letters
])  # fmt: skip
def test_no_character_is_cut_apart(offsets):
    marks = common_ends(offsets, [(0, 2), (2, 3), (3, 4)])
    assert marks[0].astype(int).tolist() == [0, 0, 1, 0] and marks[1].astype(int).tolist() == [1, 0, 0]


def test_texts_without_tokens_or_without_a_common_place():
    empty, one = common_ends([], [(0, 4)])
    assert empty.shape == (0,) and cut((empty, one), (0, 1)) == (0, 1) and cut((empty, one), (0, 0)) == (0, 0)
    apart = common_ends([(0, 1), (1, 4)], [(0, 2), (2, 4)])
    assert not any(row.any() for row in apart) and cut(apart, (1, 9)) == (0, 0)


def test_a_tokenizer_is_another_where_a_text_has_other_ids(tmp_path):
    words, same = (tokenizer_files.load(tokenizer_files.save_word_tokenizer(tmp_path / name)) for name in "ab")
    pieces = tokenizer_files.load(tokenizer_files.save_byte_tokenizer(tmp_path / "c"))
    assert other_tokenizer(words, same) is None and other_tokenizer(words, words) is None
    assert other_tokenizer(words, None) is None and other_tokenizer(words, pieces) is pieces
    offsets = copy.deepcopy(pieces)  # of no matter for ids
    offsets.backend_tokenizer.pre_tokenizer.trim_offsets = False
    assert tokenizer_text(offsets) != tokenizer_text(pieces) and other_tokenizer(pieces, offsets) is None
    for name, value in (("add_prefix_space", True), ("use_regex", False)):
        other = copy.deepcopy(pieces)
        setattr(other.backend_tokenizer.pre_tokenizer, name, value)
        assert other_tokenizer(pieces, other) is other
    more = copy.deepcopy(words)
    more.add_tokens(["w60"])
    assert other_tokenizer(words, more) is more


TEXTS = [
    "A great film,  well made\nand naïve: ﬁne 漢字, emoji 👍🏽 ok! " * 3,
    "Answer:\tpositive (the 2nd) — déjà vu… “quoted” 3.14159 https://example.org/?q=1#x ½",
    "漢字かな交じり文" * 4,
    "",
    "\n\n",
]


@pytest.mark.parametrize("pair", [("gpt2", "opt"), ("gpt2", "t5"), ("t5", "opt")])
def test_real_tokenizers_read_the_same_beginnings(pair, shared):
    """Wherever a text is cut, each reads the beginning of it that the other reads."""
    from mend_jax.models.folders import load_tokenizer

    own = [load_tokenizer(shared / "tokenizers" / name) for name in pair]
    plain = [Tokenizer.from_str(tokenizer_text(one)) for one in own]
    cuts = 0
    for ids, marks in readings(plain, TEXTS):
        assert marks[0].sum() == marks[1].sum()
        for limit in range(1, 60):
            kept = cut(marks, (limit, limit))
            assert all(count <= limit for count in kept)
            read = [one.decode(row[:count]) for one, row, count in zip(own, ids, kept, strict=True)]
            if "t5" in pair:  # it has one kind of white space, and few characters: what the other read, in its tokens
                t5 = own[pair.index("t5")]
                read = [t5.decode(t5(words, add_special_tokens=False)["input_ids"]) for words in read]
            assert "".join(read[0].split()) == "".join(read[1].split())
            cuts += 0 < kept[0] < len(ids[0])
    assert cuts > 50
    np.testing.assert_array_equal(list(readings(plain, [""]))[0][0], [[], []])
