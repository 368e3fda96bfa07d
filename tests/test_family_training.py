"""Rows of the table of families through the commands: a step of both stages and an evaluation; and the export.

The decoder-only rows are family_rows.py's, those of T5 test_t5.py's. Weights are random and tiny.
"""

import json

import jax
import numpy as np
import pytest
import test_t5
from data_files import make_world, tiny_config
from family_rows import COMMON, ROWS, save_random, smaller, tokens
from tiny_training import config as training_config

from mend_jax import evaluate, train
from mend_jax.interchange.trained import read_distiller
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.distiller_folder import write_folder
from mend_jax.run import build, checkpoint, reporting

pytestmark = pytest.mark.slow
T5 = test_t5.COMMON | {"model_type": "t5"}
LM_ADAPT = (T5 | test_t5.ROWS["t5-large-lm-adapt"] | {"d_model": 32}, T5 | test_t5.ROWS["t5-small-lm-adapt"])
FLAN = tuple(
    T5 | test_t5.ROWS[f"flan-t5-{size}"] | {"d_model": d, "d_ff": 48} for size, d in (("xl", 32), ("base", 24))
)
PAIRS = {  # row: config.json's fields of the LLM and of its distiller's backbone
    **{name: (COMMON | fields, COMMON | smaller(fields)) for name, fields in ROWS.items() if name != "qwen2-sliding"},
    "t5-small": (T5 | test_t5.V1, T5 | test_t5.V1),
    "t5-small-lm-adapt to t5-large-lm-adapt": LM_ADAPT,
    "flan-t5-base to flan-t5-xl": FLAN,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Texts and tasks, tokenised once for all rows: they have one tokenizer."""
    return make_world(tmp_path_factory.mktemp("world"))


def settings(world, folder, name):
    c = tiny_config(world, "pretrain", max_text_tokens=40, max_demo_tokens=24)
    c.data.demo_buckets, c.data.query_buckets = (24,), (12,)  # one shape
    c.llm.path, c.prefix.backbone = (save_random(folder / str(i), fields, i) for i, fields in enumerate(PAIRS[name]))
    c.optimizer.learning_rate, c.loss.chunk = 1e-3, 32
    c.train.batch_size, c.train.steps, c.train.eval_every, c.evaluate.seeds = jax.device_count(), 1, 1, (13,)
    return c


# Those whose parameters or layers differ in kind: learnt positions and a projection of the embeddings; RoPE, RMSNorm, grouped
# heads and sliding windows; an encoder–decoder. The arithmetic and gradients of all rows are test_families.py's, and GPT-2 is
# trained and evaluated in most other files.
TRAINED = ("opt-350m", "gemma3", "flan-t5-base to flan-t5-xl")


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_of_both_stages_and_an_evaluation(name, world, tmp_path):
    c, workdir = settings(world, tmp_path, name), ""
    params = build.build(c, build.load(c)).params
    for stage, score in (("pretrain", "validation_loss"), ("finetune", "dev_score")):
        c.stage, c.prefix.start_from, workdir = stage, str(workdir), tmp_path / stage
        assert train.train(c, workdir) == 0
        lines = reporting.read_lines(workdir / "metrics.jsonl")
        [step], [evaluated] = ([line for line in lines if name in line] for name in ("kd", score))
        assert step["kd"] > 0 and np.isfinite(step["grad_norm"]) and np.isfinite(evaluated[score])
        assert ("pred" in step and step["pred"] > 0) == (stage == "finetune")
        before, params = params, checkpoint.read_step(workdir, 1)
        moved = jax.tree.map(lambda a, b: np.any(a != b), before, params)
        assert jax.tree.all(moved), [path for path, leaf in jax.tree.leaves_with_path(moved) if not leaf]
    c.evaluate.methods = ("icl", f"mend={workdir}")
    found = evaluate.evaluate(c, tmp_path / "scores")["methods"]
    scores = {method: predicted(tmp_path / "scores", method) for method in found}
    assert all(len(values) == 14 and np.isfinite(values).all() for values in scores.values())
    assert not np.allclose(scores["icl"], scores["mend"])


def predicted(workdir, method):
    """Every option's score of the test task's items."""
    [path] = (workdir / "predictions").glob(f"{method}*/*.jsonl")
    return [score for line in path.read_text().splitlines() for score in json.loads(line)["scores"]]


@pytest.mark.parametrize("name", [name for name in PAIRS if name in ROWS])
def test_an_exported_distiller_reads_alike_here_and_in_pytorch(name, tmp_path):
    pytest.importorskip("torch")
    from mend_jax.prefixes.mend_distiller import MendDistiller

    llm, backbone = (save_random(tmp_path / str(i), fields, i) for i, fields in enumerate(PAIRS[name]))
    llm = load_llm(llm)
    model = Distiller.init(training_config(llm, **{"prefix.backbone": backbone}), llm, seed=0)
    assert "head" not in model.params["backbone"]["embed"]
    context = tokens(12).tolist()
    vectors = model.distill(context).embeds
    assert vectors.shape == (1, model.num_vectors, llm.config.width)
    write_folder(model, tmp_path / "out")
    theirs = MendDistiller.from_pretrained(tmp_path / "out").distill(context).numpy()
    assert np.abs(vectors - theirs).max() < 1e-5
    assert jax.tree.all(jax.tree.map(np.array_equal, read_distiller(tmp_path / "out").params, model.params))
