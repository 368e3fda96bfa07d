"""GGUF files as the LLM and as the backbone of a training, by the commands."""

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("torch")

from data_files import make_world, tiny_config  # noqa: E402
from facts import says  # noqa: E402
from gguf_files import write_with_words  # noqa: E402
from test_family_training import predicted  # noqa: E402

from mend_jax import evaluate, load_distiller, load_llm, train  # noqa: E402
from mend_jax.interchange.export import export  # noqa: E402
from mend_jax.run import reporting  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_with_words(path)
    return path


def test_it_is_trained_from_resumed_and_evaluated(file, tmp_path):
    c = tiny_config(make_world(tmp_path), "finetune", max_demo_tokens=24)
    c.data.demo_buckets, c.data.query_buckets = (24,), (12,)
    write_with_words(tmp_path / "backbone" / "model.gguf", "gpt2", "Q4_0")
    c.llm.path, c.prefix.backbone = str(file), str(tmp_path / "backbone" / "model.gguf")
    c.llm.weights, c.train.batch_size, c.train.steps, c.train.eval_every, c.evaluate.seeds = "int8", 8, 1, 1, (13,)
    assert train.train(c, tmp_path / "run") == 0
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(file.read_bytes())
    c.llm.path = str(moved)
    assert train.train(c, tmp_path / "run") == 0  # the same bytes
    write_with_words(moved, kind="Q4_0")
    with says(tmp_path / "run", "llm.path"):
        train.train(c, tmp_path / "run")
    c.evaluate.methods = ("icl", f"mend={tmp_path / 'run'}")
    c.llm.path = str(file)
    evaluate.evaluate(c, tmp_path / "scores")
    assert np.isfinite(predicted(tmp_path / "scores", "mend")).all()
    export(tmp_path / "run", tmp_path / "out")
    llm = load_llm(file)
    vectors = [load_distiller(tmp_path / name, llm).distill([[5, 3, 9]]).embeds for name in ("run", "out")]
    np.testing.assert_array_equal(*vectors)


@pytest.mark.parametrize("stage", ["pretrain", "lm"])
def test_its_weights_are_split_over_a_mesh_and_trained(stage, file, tmp_path):
    c = tiny_config(make_world(tmp_path), stage, demo_buckets=(24,), query_buckets=(24,), max_demo_tokens=24)
    c.llm.path = c.prefix.backbone = str(file)
    c.train.parallel, c.train.batch_size, c.train.steps, c.train.eval_every = "mesh", 8, 1, 1
    assert train.train(c, tmp_path / "run") == 0
    lines = reporting.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert np.isfinite(lines[-1]["validation_loss"])
