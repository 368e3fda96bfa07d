"""The demonstrations of a test task, as an evaluation shows them: where they come from, what is done to them, in which order."""

from collections.abc import Sequence

from mend_jax.data import metaicl
from mend_jax.data.metaicl import Example
from mend_jax.data.perturbations import perturbed, reordered
from mend_jax.data.retrieval import PER_ITEM, Encode, cached_neighbours, drawn, read_pool

AS_IN_FILES = {
    "demos": "file",
    "perturb": "none",
    "order": 0,
}  # of config.evaluate: the file's, unchanged, in its order


def as_in_validation(config):
    """A copy of the config whose evaluations show what validation in training does: the files' demonstrations as they are, or with
    evaluate.demos="pool" these and more of the pool, for a K that no file has; of data.validation_seeds, where there are some."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.evaluate.update(AS_IN_FILES | {"demos": "pool" if config.evaluate.demos == "pool" else "file"})
        config.evaluate.seeds = metaicl.validation_seeds(config)
    return config


def files_for(config) -> int:
    """The K of the files that an evaluation reads: only demonstrations from the files themselves need that many."""
    return config.data.k if config.evaluate.demos == "file" else 1


def demonstrations(
    config,
    task: str,
    seed: int,
    items: Sequence[Example],
    others: Sequence[str],
    encoder: tuple[str, Encode] | None = None,
) -> list[list[Example]]:
    """The demonstrations of a task and seed: one list for all items, or one for each item.

    Args:
        config: the config of a whole run.
        task: its name.
        seed: one of config.evaluate.seeds.
        items: all its test items.
        others: the names of the other test tasks.
        encoder: of evaluate.demos "dense": (what it is, as text; texts -> embeddings).
    Raises:
        UserError: bad files, too few examples, or examples that cannot be perturbed.
    """
    shown, k = config.evaluate, config.data.k
    if shown.demos == "file":
        found = [metaicl.read_examples(config.data.tasks, task, k, seed, "train")]
    else:
        pool = read_pool(config.data.tasks, task)
        if shown.demos in PER_ITEM:
            name, encode = encoder or ("", None)
            rows = cached_neighbours(config.data.cache, name, pool, items, k, shown.demos, seed, encode)
            found = [[pool[i] for i in row] for row in rows]
        else:
            found = [drawn(pool, items, k, seed, _of_file(config, task, seed))]
    elsewhere = _of_others(config, seed, others) if shown.perturb == "irrelevant" else []
    changed = [perturbed(one, shown.perturb, shown.perturb_share, seed, elsewhere) for one in found]
    return [[one[i] for i in reordered(len(one), shown.order, seed)] for one in changed]


def _of_file(config, task: str, seed: int) -> list[Example]:
    file = metaicl.largest_file(config.data.tasks, task, seed, "train")
    return [] if file is None else metaicl.read_file(file)


def _of_others(config, seed: int, others: Sequence[str]) -> list[Example]:
    files = (metaicl.example_file(config.data.tasks, task, 1, seed, "train") for task in others)
    return [example for file in files for example in metaicl.read_file(file)]
