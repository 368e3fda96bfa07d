"""Programs of a model: compiled once for all with the same settings, and none of them is kept."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import pytest
from tiny_training import config, model_folder

from mend_jax import load_llm, score_options
from mend_jax.models.programs import Shell, program
from mend_jax.prefixes import Chunked, Demonstrations, Distiller
from mend_jax.scoring.tasks import programs_compiled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "model")


def used(folder):
    """References to an LLM and a distiller that were used and left, their scores, and the programs that they compiled."""
    before, llm = programs_compiled(), load_llm(str(folder))
    distiller = Distiller.init(config(folder), llm, seed=0)
    scores = score_options(llm, distiller.distill([[1, 2, 3]]), [1, 2], [[3], [4, 5]])
    return [weakref.ref(llm), weakref.ref(distiller)], scores, programs_compiled() - before


def test_a_model_that_is_read_again_compiles_nothing_and_the_first_is_freed(folder):
    first, scores, _ = used(folder)
    again, same, compiled = used(folder)
    gc.collect()
    assert not [one() for one in (*first, *again) if one() is not None]
    assert compiled == 0 and same == scores


def test_what_a_program_depends_on(folder):
    llm, c = load_llm(str(folder)), config(folder)
    other = load_llm(str(folder))
    assert Shell(llm) == Shell(other) and hash(Shell(llm)) == hash(Shell(other))
    assert not [a for a in jax.tree.leaves(Shell(llm).model.params) if isinstance(a, jax.Array)]
    for field, value in {"dtype": "bfloat16", "bos": 3, "attention": "cudnn", "remat": True}.items():
        assert Shell(llm) != Shell(dataclasses.replace(other, **{field: value})), field
    one, two = (Distiller.init(c, llm, seed) for seed in (0, 1))
    assert Shell(one) == Shell(two) != Shell(dataclasses.replace(two, residual=not two.residual))
    assert Shell(Chunked.around(one)) == Shell(Chunked.around(two)) != Shell(Chunked.around(two, "mean"))
    assert Shell(Chunked.around(one)).model.num_vectors == one.num_vectors
    assert Shell(two) != Shell(Distiller.init(config(folder, **{"prefix.length": 2}), llm, 0))
    shown = [Demonstrations.beside(which) for which in (llm, other)]
    assert Shell(shown[0]) == Shell(shown[1])
    assert not [a for a in jax.tree.leaves(Shell(shown[0]).model.llm.params) if isinstance(a, jax.Array)]


def test_models_of_other_settings_have_programs_of_their_own(folder):
    made = []

    @program
    def scale(model, params, x):
        made.append(model.dtype)
        return x * len(model.dtype)

    llm = load_llm(str(folder))
    half = dataclasses.replace(llm, dtype="bfloat16")
    x = jnp.ones(2)
    for model, wanted in ((llm, 7), (half, 8), (llm, 7), (load_llm(str(folder)), 7)):
        assert scale(model, model.params, x).tolist() == [wanted, wanted]
    assert made == ["float32", "bfloat16"]
