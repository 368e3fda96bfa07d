"""What is done to demonstrations: each perturbation's property, and that it depends on the seed and the example alone."""

import collections

import pytest
from facts import says

from mend_jax.data.metaicl import Example
from mend_jax.data.perturbations import NOT_SHOWN, PERTURBATIONS, perturbed, reordered

OPTIONS = ("amber", "blue", "coral")
EXAMPLES = [Example("t", f"some words ({i}) z{i}", OPTIONS[i % 3], OPTIONS) for i in range(48)]
OTHERS = [Example(f"u{i % 2}", f"elsewhere {i}", "yes", ("yes", "no")) for i in range(8)]


def changed(kind, share=1.0, seed=0, examples=EXAMPLES):
    return perturbed(examples, kind, share, seed, OTHERS)


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_nothing_but_the_seed_and_the_example_decides(kind):
    made = changed(kind)
    assert made == changed(kind)
    assert changed(kind, examples=EXAMPLES[::-1]) == made[::-1]
    assert changed(kind, examples=EXAMPLES[5:9]) == made[5:9]
    drawn = kind in ("random_label", "wrong_label", "typos", "irrelevant")
    assert (changed(kind, seed=1) != made) == drawn


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_a_share_is_changed_and_a_larger_one_changes_more_of_the_same(kind):
    before = set()
    for share in (0.0, 0.25, 0.5, 1.0):
        made = changed(kind, share)
        here = {i for i, (old, new) in enumerate(zip(EXAMPLES, made, strict=True)) if old != new}
        assert len(here) == round(share * 48) or (kind == "random_label" and len(here) <= round(share * 48))
        assert before <= here
        assert all(made[i] == changed(kind)[i] for i in here)
        before = here
    assert perturbed(EXAMPLES, "none", 1.0, 0) == EXAMPLES


def test_parts_that_are_not_shown():
    assert {e.output for e in changed("no_label")} == {e.input for e in changed("no_input")} == {NOT_SHOWN}
    assert [e.input for e in changed("no_label")] == [e.input for e in EXAMPLES]
    assert [e.output for e in changed("no_input")] == [e.output for e in EXAMPLES]


def test_labels():
    right = [e.output for e in EXAMPLES]
    for seed in range(20):
        wrong = [e.output for e in changed("wrong_label", seed=seed)]
        assert all(new in OPTIONS and new != old for new, old in zip(wrong, right, strict=True))
    drawn = collections.Counter(e.output for seed in range(20) for e in changed("random_label", seed=seed))
    assert set(drawn) == set(OPTIONS) and min(drawn.values()) > 0.8 * 20 * 48 / 3  # the right one among them
    exchanged = collections.defaultdict(set)
    for old, new in zip(right, changed("adversarial"), strict=True):
        exchanged[old].add(new.output)
    assert exchanged == {"amber": {"blue"}, "blue": {"coral"}, "coral": {"amber"}}
    spaced = [Example("t", f"x{i}", "y", ("y", "y ", "z")) for i in range(9)]
    assert {e.output for kind in ("wrong_label", "adversarial") for e in changed(kind, examples=spaced)} == {"z"}
    one = [Example("t", "x", "y", ("y",))]
    for kind in ("wrong_label", "adversarial"):
        with says("'t'", "'y'", "evaluate.perturb"):
            changed(kind, examples=one)


def test_typos_are_of_neighbouring_letters():
    for old, new in zip(EXAMPLES, changed("typos"), strict=True):
        before, after = old.input.split(), new.input.split()
        for one, other in zip(before, after, strict=True):
            assert sorted(one) == sorted(other) and (one != other) == (len(one) > 1)
            assert sum(a != b for a, b in zip(one, other, strict=True)) in (0, 2)
    assert changed("typos", examples=[Example("t", "aa  b", "y", ())])[0].input == "a  b"


def test_irrelevant_ones_are_of_other_tasks():
    assert {e.task for e in changed("irrelevant")} == {"u0", "u1"}
    with says("'t'", "evaluate.perturb"):
        perturbed(EXAMPLES, "irrelevant", 1.0, 0, EXAMPLES)


def test_orders():
    orders = [tuple(reordered(4, number, seed=13)) for number in range(24)]
    assert orders[0] == (0, 1, 2, 3) and len(set(orders)) == 24
    assert reordered(4, 24, 13) == [0, 1, 2, 3]  # there are no more
    assert reordered(16, 5, 13) == reordered(16, 5, 13) != reordered(16, 5, 21)
    assert sorted(reordered(16, 9, 13)) == list(range(16)) and reordered(1, 3, 13) == [0]
