"""Near-valid files for every reader of JSON: what comes of one is a result, or one sentence. Never a trace, never nonsense.

A run is repeated by MEND_ATTACK_SEED=N, which a failure prints; `./launch/test.sh attack` tries a hundred times as many.
"""

import dataclasses
import gzip
import json
import math
import shutil

import numpy as np
import pytest
from attack_scale import SEED, times
from hypothesis import HealthCheck, given, seed, settings
from near_valid import contents, values
from safetensors.numpy import save_file

from mend_jax.cli.errors import UserError
from mend_jax.cli.text import shown
from mend_jax.data import c4, metaicl, prepared, retrieval
from mend_jax.data.templates import chosen
from mend_jax.experiments.methods import Times
from mend_jax.models import weights
from mend_jax.models.families import FAMILIES, from_hf_config, key_table, to_hf_config
from mend_jax.models.gguf.config import hf_fields  # noqa: F401  (imported here, so that no example waits for it)
from mend_jax.packs.demonstrations import read_demonstrations
from mend_jax.packs.pack import Pack, load_pack
from mend_jax.packs.queries import options_of, read_queries
from mend_jax.prefixes.distiller_folder import read_settings
from mend_jax.report.results import read_results
from mend_jax.run import reporting, resume, saved_config, saved_steps
from mend_jax.run.sealed import write_sealed
from mend_jax.scoring import results
from mend_jax.scoring.answers import Source, read_answers, read_scores

EXAMPLES = times(12, 400)
LINE = {"task": "t", "input": "a film", "output": "good", "options": ["good", "bad"]}
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "gpt2": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96, "n_inner": None, "layer_norm_epsilon": 1e-5,
             "activation_function": "gelu_new", "tie_word_embeddings": True},
    "opt": SIZES | {"ffn_dim": 32, "max_position_embeddings": 96, "word_embed_proj_dim": 16, "activation_function": "relu",
                    "do_layer_norm_before": True, "enable_bias": True},
    "llama": SIZES | {"intermediate_size": 32, "max_position_embeddings": 96, "hidden_act": "silu", "rms_norm_eps": 1e-5, "head_dim": 8,
                      "num_key_value_heads": 1, "rope_theta": 1e4, "attention_bias": False, "rope_scaling": {
                          "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192}},
    "qwen3": SIZES | {"intermediate_size": 32, "max_position_embeddings": 96, "hidden_act": "silu", "rms_norm_eps": 1e-5, "head_dim": 8,
                      "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None,
                      "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}},
    "gemma3_text": SIZES | {"intermediate_size": 32, "max_position_embeddings": 96, "rms_norm_eps": 1e-6, "head_dim": 8,
                            "num_key_value_heads": 1, "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8,
                            "layer_types": ["sliding_attention", "full_attention"]},
    "t5": {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
           "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-6,
           "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
}  # fmt: skip
assert MODELS.keys() <= FAMILIES.keys()


def one_sentence(read, *arguments):
    """What `read` returns, or None where it raises UserError; that is one line, as a person is shown it."""
    try:
        return read(*arguments)
    except UserError as error:
        said = shown(str(error))
        assert said and "\n" not in said and said.rstrip(")").endswith((".", "?")), said
        return None


def attacked(test):
    """Tries `test` on as many examples as the scale says, from the attack's seed."""
    healthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    many = settings(
        max_examples=EXAMPLES, deadline=None, database=None, print_blob=False, suppress_health_check=healthy
    )
    return seed(SEED)(many(test))


@attacked
@given(contents(LINE, lines=True))
def test_task_files(tmp_path, data):
    (tmp_path / "t.jsonl").write_bytes(data)
    for example in one_sentence(metaicl.read_file, tmp_path / "t.jsonl") or ():
        assert example.output.encode() is not None and all(option.encode() is not None for option in example.options)
        assert example.options == () or example.output in example.options
        assert len(set(example.options)) == len(example.options)


@attacked
@given(contents({"text": "some words", "timestamp": "2019", "url": "http://a.b"}, lines=True))
def test_texts(tmp_path, data):
    (tmp_path / "c4-train.json.gz").write_bytes(gzip.compress(data))
    for row in one_sentence(lambda path: list(c4.read_documents(path)), tmp_path / "c4-train.json.gz") or ():
        assert row["text"].encode() is not None


@attacked
@given(contents({"tiny": {"train": ["a", "b"], "test": ["t"]}, "other": {"train": [], "test": []}}))
def test_partitions(tmp_path, data):
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "partitions.json").write_bytes(data)
    found = one_sentence(metaicl.load_partition, tmp_path, "tiny")
    for task in (found or {"train": [], "test": []})["train"]:
        path = metaicl.meta_train_file(tmp_path, task).resolve()
        assert path.is_relative_to((tmp_path / "data").resolve())
        one_sentence(metaicl.present_tasks, tmp_path, [task], "test", 4, (13,))


@attacked
@given(contents({"t": {"task_type": "classification"}}))
def test_kinds_of_tasks(tmp_path, data):
    (tmp_path / "tasks.json").write_bytes(data)
    one_sentence(metaicl.is_classification, tmp_path, "t", [metaicl.Example("t", "x", "y", ("y", "z"))])


@attacked
@given(contents({"input": "a film", "output": "good", "options": ["good", "bad"]}, lines=True))
def test_demonstrations_and_queries(tmp_path, data):
    (tmp_path / "d.jsonl").write_bytes(data)
    for x, y in one_sentence(read_demonstrations, tmp_path / "d.jsonl") or ():
        assert x.encode().strip() and y.encode().strip()
    for where, row in one_sentence(read_queries, tmp_path / "d.jsonl") or ():
        options = one_sentence(options_of, where, row, "yes,no") or ()
        assert all(option.encode().strip() for option in options) and len(set(options)) == len(options)


@pytest.mark.parametrize("family", MODELS)
def test_model_configs(family, tmp_path):
    @attacked
    @given(contents({"model_type": family} | MODELS[family]))
    def attack(data):
        (tmp_path / "config.json").write_bytes(data)
        config = one_sentence(from_hf_config, tmp_path)
        if config is None:
            return
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            assert not isinstance(value, float) or math.isfinite(value) or value > 0
            assert field.type is not int or (type(value) is int and 0 <= value < 2**32), (field.name, value)
            assert field.type is not bool or type(value) is bool, (field.name, value)
        assert config.layers < 10_000 and len(key_table(config)) < 10**6
        json.dumps(to_hf_config(config), allow_nan=False)

    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | MODELS[family]))
    assert from_hf_config(tmp_path).layers == 2
    attack()


@attacked
@given(contents({"metadata": {"total_size": 8}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
def test_indices_of_weights(tmp_path, data):
    for name in ("m-1.safetensors", "m-2.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    for file in one_sentence(weights.weight_files, tmp_path) or ():
        assert file.parent == tmp_path and file.is_file()


@attacked
@given(contents({"projection": "tanh", "llm_width": 16, "separator": " ", "bos": "false"}))
def test_settings_of_an_exported_distiller(tmp_path, data):
    (tmp_path / "distiller_config.json").write_bytes(data)
    one_sentence(read_settings, tmp_path)


WORKDIR = {
    "stage": "pretrain", "llm": {"path": "gpt2"}, "prefix": {"kind": "distiller", "length": 4}, "loss": {"kd": 1.0},
    "data": {"template": "space", "bos": "false"}, "train": {"steps": 12, "patience": 5},
}  # fmt: skip


@attacked
@given(
    contents(WORKDIR), contents({"llm.path": {"folder": "/a", "fingerprint": "0123"}, "data.text": {"folder": "/c4"}})
)
def test_what_a_workdir_says(tmp_path, config, sources):
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "sources.json").write_bytes(sources)
    one_sentence(saved_config.read_config, tmp_path)
    for entry in (one_sentence(resume.read_sources, tmp_path) or {}).values():
        assert entry["folder"].encode() is not None


@attacked
@given(contents({"step": 4, "loss": 2.5, "learning_rate": 1e-3, "tokens": 300}, lines=True))
def test_lines_of_a_run(tmp_path, data):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data)
    strict = one_sentence(reporting.read_lines, path)
    loose = reporting.read_lines(path, strict=False)
    assert strict is None or strict == loose or strict != strict  # NaN
    for line in loose:
        assert type(line["step"]) is int


@attacked
@given(contents({"meta/metadata": [3, "ab"], "params/a": [2, "cd"]}))
def test_checksums_of_a_checkpoint(tmp_path, data):
    (tmp_path / "1").mkdir(exist_ok=True)
    (tmp_path / "1" / "checksums.json").write_bytes(data)
    assert saved_steps.find_damage(tmp_path / "1")


@attacked
@given(
    contents(
        {
            "dtype": "uint16",
            "shards": [{"file": "a.array_record", "split": "train", "task": "", "items": 3, "tokens": 9}],
        }
    )
)
def test_manifests(tmp_path, data):
    """One without a checksum is not believed: its shard, which is none, is asked."""
    (tmp_path / "text.json").write_bytes(data)
    (tmp_path / "a.array_record").write_bytes(b"")
    job = {"out": str(tmp_path / "a.array_record"), "split": "train", "dtype": "uint16", "kind": "text"}
    assert one_sentence(prepared._read_manifest, tmp_path / "text.json", [job], "c4", 1) is None


PREDICTION = {"item": 0, "scores": [-1.0, -2.0], "options": ["a", "b"], "prediction": "a", "gold": "b"}


@attacked
@given(contents(PREDICTION, lines=True), values({"content": "c", "prefix_length": 4.0, "compiled": False}))
def test_predictions(tmp_path, data, cost):
    store = results.Store(tmp_path, "mend", {})
    store._predictions("t", 13).write_bytes(data)
    if isinstance(cost, dict):
        write_sealed(store._cost("t", 13), json.loads(json.dumps(cost).replace("\\ud", "d")))
    else:
        store._cost("t", 13).write_text(json.dumps(cost))
    kept = store.read("t", 13, "c", 1)
    for line in kept[0] if kept else ():
        best = max(line["scores"])
        assert line["prediction"] in [o for o, s in zip(line["options"], line["scores"], strict=True) if s == best]


SCORES = {
    "methods": {"mend": {"path": "runs/m", "per_task": {"t": {"primary": "accuracy", "score": {"per_seed": {"13": 0.0}}}}}},
    "seeds": [13],
}  # fmt: skip


@attacked
@given(contents(SCORES), contents({"format": 2, "method": "mend"}), contents(PREDICTION, lines=True))
def test_answers(tmp_path, scores, made_of, predictions):
    store = results.Store(tmp_path, "mend", {"method": "mend"})
    store.write("t", 13, [PREDICTION], {"content": "c"})
    for path, content in (
        (tmp_path / "scores.json", scores),
        (store.folder / "made_of.json", made_of),
        (store._predictions("t", 13), predictions),
    ):
        path.write_bytes(content)
    for method in (one_sentence(read_scores, tmp_path) or {"methods": ()})["methods"]:
        found = one_sentence(read_answers, Source(tmp_path, method))
        for of_task in found.lines.values() if found else ():
            assert of_task == {13: [PREDICTION]}


EXPERIMENT = dict.fromkeys(("experiment", "title", "paper", "command", "commit", "machine", "date"), "order") | {
    "config": {"llm": {"path": "m"}, "data": {"partition": "tiny"}}, "varied": ["K"], "x": "K",
    "rows": [{"labels": {"method": "mend", "K": "4"}, "training_seed": 0, "evaluation": "e/f", "method": "mend"}],
}  # fmt: skip


@attacked
@given(contents(EXPERIMENT))
def test_experiments(tmp_path, data):
    for folder in ("order", "e/f"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "e" / "f" / "scores.json").touch()
    (tmp_path / "order" / "experiment.json").write_bytes(data)
    for result in one_sentence(read_results, tmp_path) or ():
        assert isinstance(result.llm, str) and isinstance(result.partition, str)
        for row in result.rows:
            assert all(source.folder == tmp_path / "e" / "f" for source in row.sources) and isinstance(
                row.label("method").encode(), bytes
            )


@attacked
@given(contents({"numbers": [[0, 1], [2, 3]]}))
def test_neighbours(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    kept = one_sentence(retrieval._kept, tmp_path / "a.json", 2, 2, 4)
    assert kept is None or kept.shape == (2, 2)


@attacked
@given(contents({"mend/pretrain": {"seconds": 3.5, "finished": True}}))
def test_times(tmp_path, data):
    (tmp_path / "times.json").write_bytes(data)
    times = Times(tmp_path / "times.json")
    assert times.run("mend/pretrain", lambda: 0) == 0
    assert times.parts["mend/pretrain"]["finished"]


@attacked
@given(
    values(
        {"num_vectors": "2", "num_demonstrations": "3", "dropped": "[3]", "template": '[" ", "", " "]', "bos": "false"}
    )
)
def test_packs(tmp_path, facts):
    pack = Pack(np.ones((2, 4), np.float32), "gpt2", "0", "0", "runs/m", "0", "distiller", chosen("space"), "false", 3)
    if isinstance(facts, dict):
        facts = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
        facts = {k.encode(errors="replace").decode(): v.encode(errors="replace").decode() for k, v in facts.items()}
    save_file(
        {"vectors": pack.vectors},
        tmp_path / "a.safetensors",
        metadata=pack.metadata() | (facts if isinstance(facts, dict) else {}),
    )
    found = one_sentence(load_pack, tmp_path / "a.safetensors")
    assert found is None or (found.num_vectors == 2 and type(found.num_demonstrations) is int)


@attacked
@given(contents({"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict", "featuresDict": {"features": {
    "text": {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}}}}))  # fmt: skip
def test_features_of_a_prepared_dataset(tmp_path, data):
    (tmp_path / "features.json").write_bytes(data)
    one_sentence(c4._require_plain_features, tmp_path)


def test_the_seed_repeats_a_run(tmp_path):
    """Two runs from one seed try the same files."""
    tried = []

    @seed(5)
    @settings(max_examples=5, database=None)
    @given(contents(LINE, lines=True))
    def attack(data):
        tried.append(data)

    attack()
    first = list(tried)
    tried.clear()
    attack()
    assert tried == first
    shutil.rmtree(tmp_path)
