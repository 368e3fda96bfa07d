"""The small pure functions that decide what a context and a query are."""

import numpy as np
import pytest

from mend_jax.data import sampling


def test_later_examples_are_omitted_and_none_is_cut():
    assert sampling.fit_demos([10, 10, 10], 30) == 3
    assert sampling.fit_demos([10, 10, 10], 29) == 2
    assert sampling.fit_demos([10, 50, 5], 20) == 1  # what stands after the first that does not fit is left out too
    assert sampling.fit_demos([31, 1], 30) == 0


def test_an_input_is_cut_at_its_end():
    assert sampling.cut_input([1, 2, 3, 4], 3) == [1, 2, 3]
    assert sampling.cut_input([1, 2], 3) == [1, 2]


def test_demonstrations_are_distinct_and_every_order_comes():
    seen = set()
    for row in range(200):
        chosen = sampling.sample_demos(sampling.row_rng(0, 1, row), 4, 3)
        assert len(set(chosen.tolist())) == 3
        seen.add(tuple(chosen.tolist()))
    assert len(seen) == 24
    with pytest.raises(ValueError):
        sampling.sample_demos(sampling.row_rng(0), 3, 4)


def test_random_numbers_depend_on_seed_and_place_only():
    draw = lambda *place: sampling.row_rng(*place).integers(1 << 60)  # noqa: E731
    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(1, 2, 4), draw(1, 3, 3), draw(2, 2, 3)}) == 4


def test_context_is_plain_concatenation():
    pairs = [([1, 2], [3]), (np.asarray([4], np.uint16), [5, 6])]
    assert sampling.join_demos(pairs).tolist() == [1, 2, 3, 4, 5, 6]
    assert sampling.join_demos([]).shape == (0,)


@pytest.mark.parametrize("length,beta,budget,expected", [
    (1000, 0.8, 900, (800, 200)), (1024, 0.9, 900, (900, 103)), (1024, 0.1, 900, (102, 922)),
    (2, 0.8, 900, (1, 1)), (10, 0.99, 900, (9, 1)), (10, 0.01, 900, (1, 9)),
])  # fmt: skip
def test_a_text_is_split_by_beta(length, beta, budget, expected):
    assert sampling.split_text(length, beta, budget) == expected


def test_the_budget_is_the_smallest_of_three():
    assert sampling.demo_budget(900, 1024, 24, 1024, 100) == 900
    assert sampling.demo_budget(900, 1024, 200, 1024, 100) == 824  # the LLM's window
    assert sampling.demo_budget(900, 2048, 24, 512, 100) == 412  # the distiller's


def test_release_truncation_cuts_the_last_example():
    demos = np.arange(1000)
    distiller, teacher = sampling.release_truncation(demos, 924, 900)
    assert len(distiller) == 642 and len(teacher) == 766  # fewer than 643 and 767
    distiller, teacher = sampling.release_truncation(demos, 50, 60)
    assert len(distiller) == 50 and len(teacher) == 60
    assert (teacher == np.arange(60)).all()


def test_buckets():
    assert [sampling.bucket(n, (4, 8)) for n in (0, 4, 5, 8)] == [4, 4, 8, 8]
    with pytest.raises(ValueError):
        sampling.bucket(9, (4, 8))


def test_a_window_is_a_permutation_that_pads_less():
    rng = np.random.default_rng(0)
    demos, queries = rng.integers(1, 100, 64), rng.integers(1, 30, 64)
    sizes = (25, 50, 75, 100), (10, 20, 30)
    plan = sampling.window_plan(demos, queries, *sizes, 16, rng)
    assert sorted(plan.ravel().tolist()) == list(range(64)) and plan.shape == (16, 4)

    def padded(batches):
        size = lambda of, buckets: sum(sampling.bucket(of[b].max(), buckets) for b in batches)  # noqa: E731
        return size(demos, sizes[0]) + size(queries, sizes[1])

    assert padded(plan) < 0.8 * padded(np.arange(64).reshape(16, 4))
