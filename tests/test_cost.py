"""What a query costs: formula beside compiler, the paper's figures, when MEND pays."""

import dataclasses
import json

import jax
import pytest
from conftest import save_tokenizer
from evaluation_world import make_config, write_tasks
from facts import says

from configs import own_llm
from configs.base import get_config
from mend_jax.experiments import cost, paper
from mend_jax.measure import regimes
from mend_jax.measure.model_sizes import known_or_folder
from mend_jax.measure.regimes import METHODS, REGIMES, Models, Shape
from mend_jax.prefixes import Chunked
from mend_jax.scoring import costs

TINY = Models(
    dataclasses.replace(known_or_folder("gpt2"), width=64, hidden_width=64, head_width=16, score_width=16, heads=4, kv_heads=4, layers=3,
                        mlp_width=256, vocab_size=300, max_positions=512),
    dataclasses.replace(known_or_folder("gpt2").headless, width=32, hidden_width=32, head_width=16, score_width=16, heads=2, kv_heads=2,
                        layers=2, mlp_width=128, vocab_size=300, max_positions=512),
    10,
)  # fmt: skip
SHAPE = Shape("task", 200, 20, 3, 3)


@pytest.mark.parametrize("llm", paper.FIGURE_3)
def test_the_papers_figures_follow_from_its_lengths(llm):
    """The lengths that paper.py gives the tasks: Vanilla ICL, PromptTuning and MEND of Figure 3."""
    models = cost.sized(llm, "float32")
    for shape in paper.FIGURE_3_TASKS:
        counted = [
            regimes.as_the_paper_counts(models, shape, method) / 1e12 for method in ("icl", "prompt_tuning", "mend")
        ]
        near = 0.02 if llm == "gpt2-large" else 0.06
        assert counted == pytest.approx(paper.FIGURE_3[llm][shape.name], rel=near, abs=0.006)


def test_the_papers_ratios_are_met():
    """MEND over Vanilla ICL in regime (a), to the paper's two digits: both as the paper counts, and ours over the paper's ICL."""
    found = {row["task"]: row for row in cost.ratios() if row["llm"] == "gpt2-large"}
    wanted = {"Class": 0.29, "HR to LR": 0.24, "QA": 0.42, "NLI": 0.23, "Para": 0.16}
    for task, ratio in wanted.items():
        assert round(found[task]["as_the_paper_counts"], 2) <= ratio
        assert round(found[task]["ours_to_the_papers_icl"], 2) <= ratio


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("gpt2-large", "mend"), ("gpt2-xl", "zero_shot")])
def test_formula_and_compiler_agree(name, method):
    models, shape = cost.sized(name, "float32"), paper.FIGURE_3_TASKS[3]
    ours, theirs = regimes.query_flops(models, shape, method), regimes.compilers_query_flops(models, shape, method)
    for regime in REGIMES:
        for part in ("once", "query"):
            assert theirs[regime][part] == pytest.approx(ours[regime][part], rel=0.01), (regime, part)


def test_regimes_are_ordered_and_distillation_is_counted():
    flops = {method: regimes.query_flops(TINY, SHAPE, method) for method in METHODS}
    for method in METHODS:
        a, b, c = (flops[method][regime]["query"] for regime in REGIMES)
        assert a > b >= c  # a query shares more and more
        assert b == flops[method]["c"]["once"] + c  # (b) reads its prefix once, (c) before all queries
    extra = flops["mend"]["a"]["query"] - flops["prompt_tuning"]["a"]["query"]
    assert (
        extra == regimes.distil_flops(TINY, SHAPE) == flops["mend"]["c"]["once"] - flops["prompt_tuning"]["c"]["once"]
    )
    assert flops["zero_shot"]["c"]["once"] == 0 < flops["zero_shot"]["c"]["query"]


@pytest.mark.slow
def test_programs_have_bytes_and_seconds():
    found = {name: regimes.measured(p, 1) for name, p in regimes.programs(TINY, SHAPE, "mend", 1).items()}
    seconds = regimes.seconds_by_regime(found, SHAPE)
    assert seconds["b"]["query"] == pytest.approx(seconds["c"]["once"] + seconds["c"]["query"])
    assert min(seconds["a"]["query"], seconds["c"]["query"]) > 0
    weights = 4 * 64 * (300 + 512)  # of the LLM's tables alone
    peaks = regimes.peak_bytes(found)
    assert all(peak > weights for peak in peaks.values())
    held = regimes.held_bytes(TINY, SHAPE, "mend")
    assert held == {"cache": 2 * 3 * 10 * 64 * 4, "stored": 10 * 64 * 4}
    own, shared = (regimes.measured(regimes.item_program(TINY, 200, SHAPE, 4, one), 0) for one in (False, True))
    cache = regimes.held_bytes(TINY, SHAPE, "icl")["cache"]
    assert own["bytes"] - shared["bytes"] > 2 * cache  # a cache for each query, or one for all
    assert own["seconds"] is None
    assert set(regimes.programs(TINY, SHAPE, "icl", 4)) == {"reread", "read", "item", "read, for all", "item, for all"}


CHUNKS = dataclasses.replace(
    TINY,
    distiller=dataclasses.replace(TINY.distiller, width=64, hidden_width=64, heads=4, kv_heads=4),
    vectors=6,
    readings=16,
    projection="linear",
)


def test_chunks_are_read_alone_and_their_vectors_are_all_read():
    """A distiller of 16 chunks: 96 positions, of which each six come from a reading of a sixteenth of the demonstrations."""
    once, mean = (dataclasses.replace(CHUNKS, **fields) for fields in ({"readings": 1}, {"join": "mean"}))
    assert (CHUNKS.prefix("mend", SHAPE), mean.prefix("mend", SHAPE), once.prefix("mend", SHAPE)) == (96, 6, 6)
    assert regimes.held_bytes(CHUNKS, SHAPE, "mend") == {"cache": 2 * 3 * 96 * 64 * 4, "stored": 96 * 64 * 4}
    made = regimes.distil_flops(CHUNKS, SHAPE)
    assert made == regimes.distil_flops(mean, SHAPE)
    assert made == 16 * regimes.distil_flops(once, SHAPE._replace(demos=13))  # of 200 tokens
    flops = {one: regimes.query_flops(one, SHAPE, "mend") for one in (CHUNKS, mean)}
    for regime, part in (("a", "query"), ("b", "query"), ("c", "once"), ("c", "query")):
        assert flops[CHUNKS][regime][part] > flops[mean][regime][part]
    assert flops[CHUNKS]["c"]["once"] - made == regimes.computed(CHUNKS.llm, 96)
    assert made - regimes.distil_flops(dataclasses.replace(CHUNKS, projection="identity"), SHAPE) == 2 * 96 * 64 * 64
    assert cost.needed(CHUNKS, SHAPE) == (200 + 20 + 9, 13 + 6)
    assert cost.needed(CHUNKS, SHAPE._replace(demos=48))[0] == 96 + 20 + 9


@pytest.mark.parametrize("models", [CHUNKS, dataclasses.replace(CHUNKS, join="mean"), TINY])
def test_what_distilling_costs_is_what_its_program_computes(models):
    shape = SHAPE._replace(demos=96)  # one block of attention, as the formula has it
    program = regimes.distil_program(models, shape, 1)
    trips = models.distiller.layers - 1  # the last layer is outside of the loop
    assert costs.count_products(program.function, *program.arguments, while_trips=trips) == regimes.distil_flops(
        models, shape
    )
    made = jax.eval_shape(program.function, *program.arguments)
    assert made.shape == (1, models.positions, models.llm.width)


def test_when_mend_pays():
    icl = {"once": 10.0, "query": 4.0}
    assert regimes.pays_from({"once": 3.0, "query": 3.0}, icl, distil=5.0) == 1  # 8 + 3 < 10 + 4
    assert regimes.pays_from({"once": 3.0, "query": 3.0}, icl, distil=10.0) == 3  # 13 + 9 = 10 + 12
    assert regimes.pays_from({"once": 3.0, "query": 4.0}, icl, distil=10.0) is None
    assert regimes.pays_from({"once": 3.0, "query": 4.5}, icl, distil=1.0) == 1


def test_what_has_no_cost():
    with says("t5-large-lm-adapt", "decoder-only"):
        cost.sized("t5-large-lm-adapt", "float32")
    with says("gpt3", "gpt2-large"):
        cost.sized("gpt3", "float32")
    assert not cost.fits(TINY, SHAPE._replace(demos=500))


def test_the_lengths_of_a_partition_are_means_over_its_tasks(tmp_path):
    (tmp_path / "llm").mkdir()
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 96, "vocab_size": 64}
    settings = {"model_type": "gpt2", "n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
    (tmp_path / "llm" / "config.json").write_text(json.dumps(settings | sizes))
    save_tokenizer(tmp_path / "llm")
    config = make_config(write_tasks(tmp_path / "tasks"), tmp_path / "llm")
    (shape,) = cost.partition_shapes(config)
    assert shape.name == "tiny" and shape.options == 3.5  # three options in one task, four in the other
    assert 2 <= shape.query <= 6 and 4 * 4 <= shape.demos <= 48 and 1 <= shape.target <= 4
    config.prefix.backbone, config.prefix.length, config.experiment.cost_llms = config.llm.path, 8, ("gpt2-large",)
    found = cost.settings(config)
    assert [(models.name, shape.name) for models, shape in found[5:]] == [
        (tmp_path.name, "tiny"),
        ("gpt2-large", "tiny"),
    ]
    assert all(models.source == "the paper" and models.vectors == 100 for models, _ in found[:5])
    config.prefix.update(own_llm.get_config("chunked").prefix.to_dict() | {"backbone": config.llm.path, "layers": 1})
    own = cost.own_models(config)  # six vectors of each of 4 demonstrations
    assert own.positions == Chunked.positions(config) == 24
    assert (own.readings, own.vectors, own.join, own.projection) == (4, 6, "concat", "linear")


def test_what_is_computed_is_kept(tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(cost, "cost_of", lambda *asked: computed.append(asked) or {"method": asked[2]})
    asked = tmp_path, TINY, SHAPE, "icl", 1, 0
    assert cost._kept(*asked) == cost._kept(*asked) and len(computed) == 1
    cost._kept(*asked[:-1], 3)
    assert len(computed) == 2
    monkeypatch.setattr(cost, "FORMAT", cost.FORMAT + 1)  # numbers mean something else now
    cost._kept(*asked)
    assert len(computed) == 3


@pytest.mark.parametrize("content", ["{", "[1]", '{"flops": {"a": 1}}', '{"method": "icl", "checksum": "0"}'])
def test_what_is_kept_but_no_row_is_made_again(tmp_path, monkeypatch, caplog, content):
    monkeypatch.setattr(cost, "cost_of", lambda *asked: {"method": asked[2]})
    now = cost.run.origin()
    monkeypatch.setattr(cost.run, "origin", lambda: dict(now))  # the next one may be of another second, at another load
    asked = tmp_path, TINY, SHAPE, "icl", 1, 0
    made = cost._kept(*asked)
    assert made["method"] == "icl" and made["origin"]["command"]  # what counted it, however often it is printed
    [part] = (tmp_path / "parts").iterdir()
    whole = part.read_text()
    part.write_text(content)
    assert cost._kept(*asked) == made and json.loads(part.read_text()) == json.loads(whole)
    assert str(part) in caplog.text and "made again" in caplog.text


def test_seconds_of_a_query_are_its_share_of_a_pass():
    names = {"distil": 2.0, "reread": 8.0, "read": 4.0, "item": 6.0}
    own = {name: {"seconds": value} for name, value in names.items()}
    shared = {
        name + regimes.ONE: {"seconds": value} for name, value in {"distil": 1.0, "read": 1.5, "item": 5.0}.items()
    }
    found = regimes.seconds_by_regime(own | shared, SHAPE, 2)
    assert found["a"] == {"once": 0, "query": 1 + 3 * 4}  # three options
    assert found["b"] == {"once": 0, "query": 1 + 2 + 3}
    assert found["c"] == {"once": 2.5, "query": 2.5}
    found = regimes.seconds_by_regime({"reread": own["reread"], **shared}, SHAPE)
    assert [found[regime]["query"] for regime in REGIMES] == [1 + 24, 1 + 1.5 + 5, 5]


def test_lengths_that_no_model_reads_are_said(monkeypatch, caplog):
    """One line for each LLM, with the lengths and its windows."""
    config = get_config()
    config.experiment.cost_llms = ()
    lengths = [SHAPE, SHAPE._replace(name="long", demos=600), SHAPE._replace(name="longer", demos=700)]
    own = cost.Named(TINY.llm, TINY.distiller, TINY.vectors, name="tiny")
    monkeypatch.setattr(cost, "partition_shapes", lambda _: lengths)
    monkeypatch.setattr(cost, "own_models", lambda _: own)
    assert [shape.name for _, shape in cost.readable(cost.settings(config))] == ["task"]
    [said] = [record.getMessage() for record in caplog.records]
    assert all(fact in said for fact in ("tiny", "long (629 tokens, 610 to distil), longer (729", "window has 512"))
