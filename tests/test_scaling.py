"""The figures of a step that is compiled and not run: what the formulas say, and what is read in a compiled program."""

import json
import math
from types import SimpleNamespace

import jax
import pytest

from mend_jax import parallel, scaling, sharding
from mend_jax.benchmark_jax import Settings
from mend_jax.collectives import sent
from mend_jax.errors import UserError
from mend_jax.models.families import from_hf_config
from mend_jax.scaling_formulas import by_formula, count, meshes
from mend_jax.scaling_models import MODELS, gpt2, opt, t5, workload


def sizes(data=1, fsdp=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


@pytest.mark.parametrize("weights", ["full", "int8"])
@pytest.mark.parametrize("name", ["gpt2-large", "opt-6.7b", "flan-t5-xl", "llama-2-7b"])
def test_bytes_by_formula_are_those_of_the_shapes(name, weights):
    mesh, settings = sizes(fsdp=2, tensor=4), workload(name, 2, weights=weights)
    step = scaling.abstract_step(settings, parallel.make_layout("mesh", mesh))
    formula = by_formula(settings, mesh)
    for key, tree in (("state_bytes", step[1]), ("llm_bytes", step[2])):
        held = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
        )
        assert held == pytest.approx(formula[key], rel=0.03)  # norms and biases are whole everywhere


def test_sizes_of_the_models():
    published = {"gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200, "opt-6.7b": 6_658_473_984}
    published |= {"t5-large-lm-adapt": 783_150_080, "flan-t5-xl": 2_849_757_184}
    published |= {"smollm2-1.7b": 1_711_376_384, "llama-2-7b": 6_738_415_616}
    assert {name: count(workload(name, 8).llm) for name in MODELS} == published


PROGRAM = """HloModule jit_step

%body.1 (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %g = bf16[64,32]{1,0} all-gather(%w), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8,16]) tuple(%i, %x)
}

ENTRY %main.2 (w: f32[64]) -> f32[64] {
  %while.3 = (s32[], f32[8,16]) while(%init), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"12"}}
  %r = (f32[10]{0}, /*index=1*/f32[20]{0}) all-reduce(%a, %b), replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, to_apply=%add
  %s.1 = f32[10]{0} all-reduce(%a), replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}
  %s.2 = bf16[16]{0} all-gather(%a), replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}, dimensions={0}
  %q = f32[6]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
  ROOT %s = f32[64]{0} copy(%w)
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %z = f32[] add(%x, %y)
}
"""


def test_what_a_program_sends_counts_loops_in_full():
    assert sent(PROGRAM) == {
        "all-gather": 12 * 64 * 32 * 2 * 3 / 4 + 16 * 2 * 3 / 4,
        "all-reduce": 2 * 30 * 4 * 7 / 8 + 2 * 10 * 4 * 1 / 2,
        "collective-permute": 24,
    }
    with pytest.raises(ValueError, match="No groups of devices are found in %r = "):
        sent(PROGRAM.replace("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", "replica_groups={}"))


@pytest.mark.parametrize(("weights", "itemsize"), [("full", 4), ("int8", 1)])
def test_fsdp_gathers_weights_and_keeps_the_states_where_the_rows_are(weights, itemsize):
    """Left alone, the compiler takes the weights for what stays, and every device computes on all rows."""
    small = from_hf_config(gpt2(64, 3, 4, vocab_size=64, n_positions=64))
    settings = Settings(small, small.headless, "float32", 8, 24, 16, 4, 8, "xla", weights=weights)
    found = scaling.compiled(settings, sizes(fsdp=8))
    layers = count(small) - 2 * 64 * 64
    assert found["llm_bytes"] < count(small) * (itemsize / 8 + 0.2)  # norms, biases and scales are whole everywhere
    # Teacher, student and back, the distiller forward and back, at least; half as much again at most.
    least = (3 * itemsize + 2 * 4) * layers * 7 / 8 * 0.9
    assert least < found["sent_bytes"]["all-gather"] < 1.7 * least
    assert found["sent_bytes"].get("all-to-all", 0) < 0.1 * found["sent_bytes"]["all-gather"]


@pytest.mark.parametrize("source", [opt(64, 3, 4), t5(64, 3, 4, 128)], ids=["opt", "t5"])
def test_tensor_leaves_the_states_whole_between_the_layers(source):
    """Left alone, the compiler splits what goes round the scan, and every layer gathers it."""
    small = from_hf_config(source | {"vocab_size": 64})
    demos, query, vectors = 24, 16, 8
    settings = Settings(small, small.headless, "float32", 2, demos, query, 4, vectors, "xla")
    found = scaling.compiled(settings, sizes(data=2, tensor=4))["sent_bytes"]
    read = demos + query + 2 * (vectors + query) + 2 * (demos + vectors)  # by teacher, student and distiller, and back
    assert found["all-gather"] < 3 * read * 64 * 4 * 3 / 4 < found["all-reduce"]


def test_data_sums_the_gradients_of_t5_alone():
    """And not, in every layer, that of the bias by distance of every pair of tokens, which is larger."""
    small = from_hf_config(t5(64, 3, 4, 128) | {"vocab_size": 64})
    settings = Settings(small, small.headless, "float32", 8, 60, 16, 4, 8, "xla")
    found, formula = (figures(settings, sizes(data=8))["sent_bytes"] for figures in (scaling.compiled, by_formula))
    assert found["all-reduce"] == pytest.approx(formula["gradients"], rel=0.05)


def test_meshes_of_the_table_divide_every_model():
    for name in MODELS:
        for devices in (8, 64, 512):
            for mesh in meshes(devices):
                model = workload(name, 8)
                assert math.prod(mesh.values()) == devices
                for config in (model.llm, model.distiller):
                    assert config.width % (mesh[sharding.FSDP] * mesh[sharding.TENSOR]) == 0


def test_the_command_prints_and_writes_both_sides(tmp_path, capsys, monkeypatch):
    figures = {"llm_bytes": 2e9, "state_bytes": 1e9, "temporary_bytes": 5e8, "total_bytes": 3.5e9, "compile_seconds": 1}
    for sent_bytes, last in (({"all-reduce": 3e9}, "by the compiled program: all-reduce 3.000"), (None, "")):
        monkeypatch.setattr(scaling, "compiled", lambda *_, of=sent_bytes: figures | {"sent_bytes": of})
        assert scaling.scaling("gpt2-large", data=8, weights="int8", out=str(tmp_path / "out.json")) == 0
        text, report = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
        assert "gpt2-large, mesh data=8 x fsdp=1 x tensor=1, batch 8, bfloat16, LLM in 8 bits" in text
        assert "in all              3.50" in text and last in text and ("sent, GB" in text) == bool(last)
        assert report["weights"] == "int8" and report["compiled"]["total_bytes"] == 3.5e9


@pytest.fixture
def cache_setting():
    """What a step for a topology changes of JAX's settings is changed back."""
    kept = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", kept)


@pytest.mark.usefixtures("cache_setting")
def test_a_topology_that_cannot_be_compiled_for_is_one_sentence(monkeypatch):
    def missing(**_):
        raise RuntimeError("no TPU platform\nat line 3")

    monkeypatch.setattr(scaling.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"v5e:2x4 has no compiler here \(no TPU platform\): pip install libtpu, and name"):
        scaling.scaling("gpt2-large", data=8, topology="v5e:2x4")
    monkeypatch.setattr(scaling.topologies, "get_topology_desc", lambda **_: SimpleNamespace(devices=[0] * 4))
    with pytest.raises(UserError, match="v5e:2x2 has 4 devices, the mesh 8: give as many to its axes"):
        scaling.scaling("gpt2-large", data=8, topology="v5e:2x2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"data": 0}, "--data=0 is too small: give 1 or more"),
        ({"fsdp": -1}, "--fsdp=-1 is too small"),
        ({"data": 2, "batch_size": 3}, "--batch_size=3 does not divide over data x fsdp = 2 devices: use a multiple of 2"),
        ({"demos": 2000}, "The LLM would read 2124 tokens, its window is 1024: choose smaller sizes"),
        ({"demos": 900, "vectors": 125}, "The distiller would read 1025 tokens, its window is 1024"),
        ({"query": 4}, "--target=4 is the end of the query: give fewer tokens than --query=4"),
        ({"vectors": 0}, "--vectors=0 is too small"),
    ],
)
def test_sizes_that_cannot_be_are_said_before_anything_is_compiled(arguments, said):
    with pytest.raises(UserError, match=said):
        scaling.scaling("gpt2-large", **arguments)
