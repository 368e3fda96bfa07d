"""The figures of a step that is compiled and not run: what the formulas say, and what is read in a compiled program."""

import json
import math
from types import SimpleNamespace

import jax
import pytest
from conftest import save_tokenizer
from data_files import make_world, tiny_config
from facts import says, states

from configs import base
from mend_jax.cli import command_line as cli
from mend_jax.data.batches import make_batches
from mend_jax.data.readers import Readers
from mend_jax.measure import scaling
from mend_jax.measure.collectives import sent
from mend_jax.measure.formulas import by_formula, count, flops, formula_table, meshes
from mend_jax.measure.model_sizes import SIZES, gpt2, llama, opt, settings_of, t5
from mend_jax.measure.workloads import FOLDER, NAMES, STAGES, TABLE, load_workload, make_workload
from mend_jax.models.families import DecoderConfig, from_hf_config
from mend_jax.run import layout as parallel
from mend_jax.run import sharding
from mend_jax.scoring import costs

# Compiled quickly: bytes are settled before what it leaves out.
pytestmark = pytest.mark.slow


def sizes(data=1, fsdp=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def small(source, rows, demos, query, vectors, stage="finetune", backbone=None, dotted=None, **fields):
    """A workload of small models; in pretraining a text of demos + query tokens. `dotted`: fields of the config by their whole
    names; `fields`: of both models' sections."""
    c = base.get_config()
    c.stage, c.prefix.length, c.loss.chunk = stage, vectors, 512
    c.loss.pred = float(stage == "finetune")
    c.data.max_demo_tokens, c.data.max_text_tokens, c.data.beta = demos, demos + query, (demos + 0.5) / (demos + query)
    c.data.query_buckets, c.data.max_input_tokens = (query,), query - 4
    for name, value in fields.items():
        for section in (c.llm, c.prefix) if name != "weights" else (c.llm,):
            section[name] = value
    c.update_from_flattened_dict(dotted or {})
    config = from_hf_config(source)
    return make_workload(c, config, backbone or config, rows)


@pytest.mark.parametrize("weights", ["full", "int8"])
@pytest.mark.parametrize("name", ["gpt2_large", "opt_6_7b", "flan_t5_xl", "llama_2_7b"])
def test_bytes_by_formula_are_those_of_the_shapes(name, weights):
    mesh, work = sizes(fsdp=2, tensor=4), load_workload(name, "finetune", 2, weights=weights)
    step = scaling.abstract_step(work, parallel.make_layout("mesh", mesh))
    formula = by_formula(work, mesh)
    for key, tree in (("state_bytes", step[1]), ("llm_bytes", step[2])):
        held = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
        )
        assert held == pytest.approx(formula[key], rel=0.03)  # norms and biases are whole everywhere


def test_sizes_of_the_models():
    published = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    published |= {"facebook/opt-125m": 125_239_296, "facebook/opt-6.7b": 6_658_473_984}
    published |= {"google/t5-small-lm-adapt": 76_961_152, "google/t5-large-lm-adapt": 783_150_080}
    published |= {"google/flan-t5-base": 247_577_856, "google/flan-t5-xl": 2_849_757_184}
    published |= {"HuggingFaceTB/SmolLM2-135M": 134_515_008, "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384}
    published |= {"TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384, "meta-llama/Llama-2-7b-hf": 6_738_415_616}
    published |= {"google/gemma-3-270m": 268_098_176, "google/gemma-3-1b-pt": 999_885_952}
    published |= {"Qwen/Qwen3-0.6B-Base": 596_049_920}
    assert {path: count(settings_of(path)) for path in SIZES} == published


@pytest.mark.parametrize("stage", STAGES)
def test_the_batch_is_the_largest_that_the_data_give(stage, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), tiny_config(make_world(tmp_path / "world"), stage)
    backbone = DecoderConfig("gpt2", 64, 16, 1, 1, 16, 20)
    for llm in (DecoderConfig("gpt2", 64, 16, 1, 1, 16, 18), from_hf_config(t5(16, 1, 1, 16))):
        work = make_workload(config, llm, backbone, 4)
        rows = make_batches(
            config, Readers(tokenizer, llm.window, backbone.window, separate_targets=work.separate_targets)
        ).rows
        assert (work.demos, work.query) == (rows.demo_buckets[-1], rows.query_buckets[-1])
        assert work.inputs == (rows.input_columns if work.separate_targets else None)


def test_a_step_is_the_one_that_the_config_file_describes():
    works = {(name, stage): load_workload(name, stage, 16) for name in TABLE for stage in STAGES}
    assert {name for name, _ in works} == set(TABLE)
    for (_, stage), work in works.items():
        assert (work.demos, work.query, work.vectors) == ((819, 205, 100) if stage == "pretrain" else (900, 512, 100))
        assert work.config.stage == stage and work.config.loss.pred == (stage == "finetune")
    assert [works["t5_large", stage].rows for stage in STAGES] == [128, 16]
    assert [works["flan_t5_xl", stage].inputs for stage in STAGES] == [0, 256]
    gpt2_large = works["gpt2_large", "finetune"]
    assert (gpt2_large.rows, gpt2_large.inputs, gpt2_large.config.llm.weights) == (16, None, "int8")
    other = load_workload("gpt2_large", "finetune", 2, 6, "float32", "full", True)
    c = other.config
    assert (other.rows, c.llm.weights, c.llm.dtype, c.prefix.dtype) == (6, "full", "float32", "float32")
    assert c.llm.remat and c.prefix.remat and not gpt2_large.config.llm.remat


@pytest.mark.parametrize("name", NAMES)
def test_a_config_that_sends_its_reader_to_the_command_is_one_that_it_computes(name):
    text = (FOLDER / f"{name}.py").read_text()
    if "mend_jax.scaling" in text:
        llm = "HuggingFaceTB/SmolLM2-1.7B" if "--llm=" in text else ""  # for an LLM of one's own
        assert load_workload(name, "finetune", 1, llm=llm).rows


GATED = llama(24, 2, 4, 2, 40, vocab_size=64)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("source", [gpt2(16, 3, 2), GATED, t5(16, 3, 2, 40)], ids=["gpt2", "llama", "t5"])
def test_flops_are_those_of_the_program(source, stage, remat):
    backbone = from_hf_config(source | {"hidden_size": 16, "n_embd": 24, "d_model": 24})  # of another width: projected
    work = small(source | {"vocab_size": 64}, 2, 24, 12, 4, stage, backbone, remat=remat)
    layout = parallel.make_layout("mesh", sizes(), jax.devices()[:1])
    step, *arguments = scaling.abstract_step(work, layout)
    assert costs.count_products(step, *arguments, while_trips=1) == flops(work)


OWN = {"prefix.backbone": "gpt2-large", "prefix.train_embeddings": False}  # the LLM is the backbone: base.py's llm.path
CHUNKS = {"prefix.kind": "chunked", "prefix.chunk_demos": 1, "prefix.chunk_tokens": 10, "prefix.chunks": 3, "data.k": 3}
RECOMMENDED = OWN | CHUNKS | {"prefix.residual": True, "prefix.projection": "linear", "data.queries": 3}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "fields",
    [{"data.queries": 3}, CHUNKS, CHUNKS | {"prefix.join": "mean"}, OWN, RECOMMENDED],
    ids=["queries", "chunks", "mean", "frozen table", "recommended"],
)
@pytest.mark.parametrize(
    ("source", "remat"), [(gpt2(16, 3, 2), False), (GATED, False), (GATED, True)], ids=["gpt2", "llama", "remat"]
)
def test_flops_and_bytes_of_several_queries_and_chunks_are_those_of_the_program(source, remat, fields, stage):
    work = small(source | {"vocab_size": 64}, 2, 24, 12, 4, stage, dotted=fields, remat=remat)
    layout = parallel.make_layout("mesh", sizes(), jax.devices()[:1])
    step, *arguments = scaling.abstract_step(work, layout)
    assert costs.count_products(step, *arguments, while_trips=1) == flops(work)
    formula = by_formula(work, sizes())
    for key, tree in zip(("state_bytes", "llm_bytes"), arguments, strict=False):
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) == pytest.approx(
            formula[key], rel=0.05
        )


ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %z = f32[] add(%x, %y)
}
"""

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
"""


BEGUN = """ENTRY %main.2 (w: f32[64]) -> f32[64] {
  %g = (f32[8,4]{1,0:T(8,128)}, f32[64,4]{1,0:T(8,128)}) all-gather-start(%w), replica_groups=[1,8]<=[8], dimensions={0}
  %h = f32[64,4]{1,0} all-gather-done(%g)
  %q = (bf16[6]{0}, bf16[6]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %r = (f32[10]{0}, /*index=1*/f32[20]{0}) all-reduce-start(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
  %s = ((f32[16,2]{1,0}, f32[8]{0}), (f32[2,2]{1,0}, f32[1]{0}), u32[]) reduce-scatter-start(%a, %b), replica_groups=[1,8]<=[8]
  %t = ((f32[16]{0}), f32[16]{0}, u32[]) async-start(%a), calls=%wrapped
  ROOT %u = f32[16]{0} async-done(%t), calls=%wrapped
}

%wrapped (p: f32[16]) -> f32[16] {
  ROOT %a = f32[16]{0} all-to-all(%p), replica_groups=[2,4]<=[8], dimensions={0}
}
"""

BRANCHES = """%none (p: f32[16]) -> f32[16] {
  ROOT %a = f32[16]{0} negate(%p)
}

%some (p: f32[16]) -> f32[16] {
  ROOT %a = f32[16]{0} all-reduce(%p), replica_groups=[1,2]<=[2], to_apply=%add
}

%more (p: f32[16]) -> f32[16] {
  ROOT %a = f32[32]{0} all-gather(%p), replica_groups=[1,2]<=[2], dimensions={0}
}

ENTRY %main.2 (w: f32[64]) -> f32[64] {
  %b = f32[16]{0} conditional(%i, %a, %a, %a), branch_computations={%none, %some, %more}
  ROOT %c = f32[16]{0} conditional(%p, %a, %a), true_computation=%more, false_computation=%none
}
"""


def test_what_is_begun_and_ended_apart_counts_its_results_once():
    assert sent(BEGUN + ADD) == {
        "all-gather": 64 * 4 * 4 * 7 / 8,
        "collective-permute": 12,
        "all-reduce": 2 * 30 * 4 * 7 / 8,
        "reduce-scatter": 5 * 4 * 7,
        "all-to-all": 16 * 4 * 3 / 4,
    }


def test_of_the_branches_of_a_condition_the_one_that_sends_most_counts():
    assert sent(BRANCHES + ADD) == {"all-reduce": 2 * 16 * 4 / 2, "all-gather": 32 * 4 / 2}
    assert sent(ADD + BRANCHES.replace("f32[32]{0} all-gather", "f32[48]{0} all-gather")) == {
        "all-gather": 2 * 48 * 4 / 2
    }


def test_what_a_program_sends_counts_loops_in_full():
    assert sent(PROGRAM + ADD) == {
        "all-gather": 12 * 64 * 32 * 2 * 3 / 4 + 16 * 2 * 3 / 4,
        "all-reduce": 2 * 30 * 4 * 7 / 8 + 2 * 10 * 4 * 1 / 2,
        "collective-permute": 24,
    }
    with pytest.raises(ValueError, match="No groups of devices"):
        sent(ADD + PROGRAM.replace("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", "replica_groups={}"))


@pytest.mark.parametrize(("weights", "itemsize"), [("full", 4), ("int8", 1)])
def test_fsdp_gathers_weights_and_keeps_the_states_where_the_rows_are(weights, itemsize):
    """Left alone, the compiler takes the weights for what stays, and every device computes on all rows."""
    work = small(gpt2(64, 3, 4, vocab_size=64, n_positions=64), 8, 24, 16, 8, weights=weights)
    found = scaling.compiled(work, sizes(fsdp=8))
    layers = count(work.llm) - 2 * 64 * 64
    assert found["llm_bytes"] < count(work.llm) * (itemsize / 8 + 0.2)  # norms, biases and scales are whole everywhere
    # Teacher, student and back, the distiller forward and back, at least; half as much again at most.
    least = (3 * itemsize + 2 * 4) * layers * 7 / 8 * 0.9
    assert least < found["sent_bytes"]["all-gather"] < 1.7 * least
    assert found["sent_bytes"].get("all-to-all", 0) < 0.1 * found["sent_bytes"]["all-gather"]


@pytest.mark.parametrize("source", [opt(64, 3, 4), t5(64, 3, 4, 128)], ids=["opt", "t5"])
def test_tensor_leaves_the_states_whole_between_the_layers(source):
    """Left alone, the compiler splits what goes round the scan, and every layer gathers it."""
    demos, query, vectors = 24, 16, 8
    work = small(source | {"vocab_size": 64}, 2, demos, query, vectors)
    found = scaling.compiled(work, sizes(data=2, tensor=4))["sent_bytes"]
    read = demos + query + 2 * (vectors + query) + 2 * (demos + vectors)  # by teacher, student and distiller, and back
    assert found["all-gather"] < 3 * read * 64 * 4 * 3 / 4 < found["all-reduce"]


def test_data_sums_the_gradients_of_t5_alone_and_holds_its_scores():
    """It does not sum, in every layer, the gradient of the bias by distance of every pair of tokens, which is larger."""
    work = small(t5(64, 3, 4, 128) | {"vocab_size": 64}, 8, 300, 40, 20)
    found, formula = (figures(work, sizes(data=8)) for figures in (scaling.compiled, by_formula))
    assert found["sent_bytes"]["all-reduce"] == pytest.approx(formula["sent_bytes"]["gradients"], rel=0.05)
    assert found["total_bytes"] == pytest.approx(formula["total_bytes"], rel=0.1)


def test_bytes_by_formula_are_the_compilers():
    work = small(gpt2(64, 6, 4, vocab_size=64), 64, 100, 24, 20, remat=True)
    found, formula = (figures(work, sizes(data=8))["total_bytes"] for figures in (scaling.compiled, by_formula))
    assert found == pytest.approx(formula, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "vectors"),
    [
        ({"data.queries": 4, "data.query_buckets": (256,), "data.max_input_tokens": 96}, 6),  # scores weigh most
        (RECOMMENDED | {"data.queries": 4, "prefix.chunk_tokens": 32, "prefix.chunks": 8, "data.k": 8}, 48),
    ],
    ids=["queries", "recommended"],
)
def test_bytes_of_several_queries_and_chunks_are_the_compilers(fields, vectors):
    work = small(gpt2(64, 6, 4, vocab_size=64), 16, 100, 24, 6, dotted=fields)
    assert work.vectors == vectors
    found, formula = (figures(work, sizes(data=8))["total_bytes"] for figures in (scaling.compiled, by_formula))
    assert found == pytest.approx(formula, rel=0.1)


def test_the_recommended_configs_have_a_step():
    """96 vectors of the whole context or, of a chunk of each demonstration, six; four queries to a context, a distiller of the
    LLM's first layers."""
    own, chunked, gemma = (
        load_workload("own_llm", "finetune", 8, llm="SmolLM2-135M"),
        load_workload("own_llm:chunked", "finetune", 8, llm="SmolLM2-135M"),
        load_workload("gemma3_270m", "finetune", 1),
    )
    assert (own.rows, own.parts, own.part, own.vectors, own.queries, own.demos) == (16, 1, 2048, 96, 4, 2048)
    assert (chunked.rows, chunked.parts, chunked.part, chunked.vectors, chunked.demos) == (16, 16, 128, 96, 2048)
    assert (own.backbone.layers, own.llm.layers, gemma.backbone.layers, gemma.llm.width) == (6, 30, 6, 640)
    text = load_workload("own_llm:chunked", "pretrain", 8, llm="SmolLM2-135M")  # 819 tokens are seven chunks
    assert (text.parts, text.vectors, text.queries, text.query) == (7, 42, 1, 205)
    plain = load_workload("smollm2_135m", "finetune", 8)
    assert (plain.parts, plain.part, plain.vectors, plain.queries) == (1, 900, 100, 4)


@pytest.mark.parametrize(
    ("name", "mesh", "gigabytes"),
    [("gpt2_large", sizes(data=8), 16), ("llama_2_7b", sizes(fsdp=8), 24)],
)
def test_the_real_step_fits_eight_devices(name, mesh, gigabytes):
    """The paper's machine has 24 GB a device; nothing is allocated."""
    work = load_workload(name, "finetune", 8)
    assert (work.rows, work.vectors) == (8, 100)
    assert scaling.compiled(work, mesh)["total_bytes"] < gigabytes * 1e9


def test_meshes_of_the_table_divide_every_model():
    for name in TABLE:
        work = load_workload(name, "finetune", 8)
        for devices in (8, 64, 512):
            for mesh in meshes(devices):
                assert math.prod(mesh.values()) == devices
                for config in (work.llm, work.backbone):
                    assert config.width % (mesh[sharding.FSDP] * mesh[sharding.TENSOR]) == 0


def test_the_table_has_a_row_of_each_config_stage_and_number_of_devices():
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in formula_table().splitlines()[2:]]
    assert [tuple(row[:3]) for row in rows] == [
        (name, stage, str(devices)) for name in TABLE for stage in STAGES for devices in (1, 8, 64, 512)
    ]
    t5_large = [row[3:] for row in rows if row[0] == "t5_large"]
    assert [row[0] for row in t5_large] == ["8", "64", "512", "4096", "1", "8", "64", "512"]
    assert all(len(row) == 11 for row in rows) and t5_large[1][4] == "–"  # T5's small one has 6 heads


def test_the_command_prints_and_writes_both_sides(tmp_path, capsys, monkeypatch):
    figures = {"llm_bytes": 2e9, "state_bytes": 1e9, "temporary_bytes": 5e8, "total_bytes": 3.5e9, "compile_seconds": 1}
    for sent_bytes in ({"all-reduce": 3e9}, None):
        monkeypatch.setattr(scaling, "compiled", lambda *_, of=sent_bytes: figures | {"sent_bytes": of})
        assert scaling.scaling("gpt2_large", "pretrain", data=8, remat=True, out=str(tmp_path / "out.json")) == 0
        text, report = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
        lines = text.splitlines()
        states(lines[0], "gpt2_large", "pretrain", "data=8", "fsdp=1", "tensor=1", "bfloat16", "8 bits", "llm.remat")
        [total] = (line for line in lines if line.startswith("in all"))
        states(total, "3.50")
        sent = [line for line in lines if "all-reduce" in line and "compiled" in line]
        assert len(sent) == bool(sent_bytes) == ("sent, GB" in text)
        for line in sent:
            states(line, "3.000")
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
    with says("--topology=v5e:2x4", "no TPU platform", "pip install libtpu"):
        scaling.scaling("gpt2_large", data=8, topology="v5e:2x4")
    monkeypatch.setattr(scaling.topologies, "get_topology_desc", lambda **_: SimpleNamespace(devices=[0] * 4))
    with says("--topology=v5e:2x2", "4 devices", 8):
        scaling.scaling("gpt2_large", data=8, topology="v5e:2x2")


@pytest.mark.parametrize(
    ("name", "arguments", "facts"),
    [
        ("gpt2_large", {"data": 0}, ["--data=0", 1]),
        ("gpt2_large", {"fsdp": -1}, ["--fsdp=-1", 1]),
        ("gpt2_large", {"data": 2, "batch_size": 3}, ["--batch_size=3", "data x fsdp", "2 devices"]),
        ("gpt2_large", {"batch_size": -1}, ["--batch_size=-1"]),
        ("own_llm", {}, ["configs/own_llm.py", "--llm="]),
        ("own_llm:chunked", {}, ["configs/own_llm.py", "--llm="]),
    ],
)
def test_sizes_that_cannot_be_are_said_before_anything_is_compiled(name, arguments, facts):
    with says(*facts):
        scaling.scaling(name, **arguments)


def test_another_backbone_than_the_llm_is_said_where_vectors_begin_as_tokens():
    run = load_workload("own_llm", "finetune", 1, llm="gpt2-large").config
    with run.unlocked():
        run.prefix.backbone = "gpt2"
    with says("prefix.residual", "llm.path"):
        make_workload(run, settings_of("gpt2-large"), settings_of("gpt2"), 16)


def test_a_name_that_no_config_file_has_is_told_the_names(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(scaling.scaling, ["scaling", "gpt3"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "gpt2_large, gpt2_xl, " in said and '"gpt3" is not understood' in said


def test_a_variant_of_a_config_is_named_on_the_command_line():
    assert cli.parse(scaling.scaling, ["scaling", "own_llm:chunked", "--llm=SmolLM2-135M"])[0] == "own_llm:chunked"
