"""The train steps that `scaling` computes: those of a config's stage, on the largest batch that the stage can get."""

import dataclasses
import functools

from ml_collections import ConfigDict

from mend_jax.cli.config_files import ROOT, load_config
from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import dotted_fields
from mend_jax.data import sampling
from mend_jax.data.rows.windows import check_windows
from mend_jax.experiments.methods import stage_configs
from mend_jax.measure.model_sizes import settings_of
from mend_jax.models.families import Config, DecoderConfig
from mend_jax.prefixes import KINDS, Kind, kind_of
from mend_jax.prefixes.embeddings import whose

FOLDER = ROOT / "configs"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.py")))
TABLE = (
    "gpt2_large",
    "gpt2_xl",
    "opt_6_7b",
    "t5_large",
    "flan_t5_xl",
    "smollm2",
    "llama_2_7b",
)  # whose step is of real size
STAGES = ("pretrain", "finetune")
CONFIGS_DEVICES = 8  # devices that a config's batch is for (the paper's machine, Table 5): with more the batch grows


@dataclasses.dataclass(frozen=True)
class Workload:
    """One train step of MEND.

    Axes: B batch, N demonstration tokens, C parts of W tokens that the distiller reads alone, L vectors, R queries of Q tokens,
    X and Y tokens of x and y.
    """

    config: ConfigDict  # that of the stage's run
    llm: Config
    backbone: Config  # the distiller's, without a head
    rows: int  # B, in the whole step
    demos: int  # N, that the teacher reads
    parts: int  # C: 1 where the distiller reads in no chunks
    part: int  # W, then N
    query: int  # Q
    inputs: int | None  # X, if the LLM is an encoder–decoder, which reads x and y separately

    @property
    def made(self) -> int:
        """Vectors that the distiller makes of a context."""
        return self.parts * self.config.prefix.length

    @property
    def vectors(self) -> int:
        """L: those that the LLM reads."""
        return self.model.vectors_of_chunks(self.parts)

    @property
    def queries(self) -> int:
        """R."""
        return self.config.data.queries if self.config.stage == "finetune" else 1

    @functools.cached_property
    def model(self) -> Kind:
        """What makes the prefix; its params are shapes."""
        prefix = self.config.prefix.copy_and_resolve_references()
        prefix.chunk_tokens = self.part
        return KINDS[prefix.kind].sketch(prefix, self.backbone, self.llm, whose(self.config))

    @property
    def separate_targets(self) -> bool:
        return self.inputs is not None

    @property
    def targets(self) -> int | None:
        """Y: no y is longer than a whole query."""
        return self.query if self.separate_targets else None

    @property
    def read(self) -> int:
        """The number of tokens after the prefix: Q, or X for an encoder."""
        return self.inputs if self.separate_targets else self.query


def load_workload(
    name: str,
    stage: str,
    over: int,
    batch_size: int = 0,
    dtype: str = "",
    weights: str = "",
    remat: bool = False,
    llm: str = "",
) -> Workload:
    """The step of a config file's stage, as its training would compute it.

    Args:
        name: that of the file in configs/, without ".py"; after a colon, as in "own_llm:chunked", one of its variants.
        stage: "pretrain" or "finetune", for MEND's run of it.
        over: the number of devices that split the batch; each gets an eighth of the config's batch.
        batch_size: sequences per step instead; 0 means the config's.
        dtype, weights: replace the config's, for both models and for the LLM.
        remat: both models recompute their layers, whatever the config says.
        llm: the LLM instead of the config's, and its backbone: a name of model_sizes.py, or a folder; "" is the config's.
    Raises:
        UserError: a config that cannot be read, one that names no LLM without `llm`, soft prompts or the release's budgets, several queries to a context of an
            encoder–decoder, lengths that do not fit the models' windows, a batch that cannot be divided.
    """
    file, *variant = name.split(":", 1)
    config = load_config(":".join([str(FOLDER / f"{file}.py"), *variant]))
    if dtype:
        config.llm.dtype = config.prefix.dtype = dtype
    if weights:
        config.llm.weights = weights
    if llm:
        config.llm.path = config.prefix.backbone = llm
    if not config.llm.path:
        raise UserError(f"configs/{file}.py is for an LLM of your own: name it with --llm=.")
    if remat:
        config.llm.remat = config.prefix.remat = True
    known = {"data.release_truncation": (False,), "prefix.kind": ("distiller", "chunked")}
    for field, usual in known.items():
        if (value := dotted_fields(config)[field]) not in usual:
            computed = " or ".join(map(str, usual))
            raise UserError(f"configs/{file}.py sets {field}={value}: scaling only computes steps with {computed}.")
    run = dict(stage_configs(config, "mend"))[stage]
    parts = run.train.accumulate
    rows = batch_size or max(parts, run.train.batch_size // CONFIGS_DEVICES) * over
    if rows < 1 or rows % (over * parts):
        raise UserError(
            f"--batch_size={rows} cannot be divided by data x fsdp = {over} devices x train.accumulate={parts}: use a multiple"
            f" of {over * parts}."
        )
    return make_workload(run, settings_of(run.llm.path), settings_of(run.prefix.backbone), rows)


def make_workload(config: ConfigDict, llm: Config, backbone: Config, rows: int) -> Workload:
    """The step of a stage's config with these models, on the largest batch that `data/rows/` can make: most batches are
    smaller. Raises UserError if it does not fit the models' windows."""
    kind, data = kind_of(config), config.data
    kind.check(config, backbone, llm)
    vectors, packing = kind.positions(config), kind.packing(config, backbone.window)
    check_windows(config, llm, backbone, vectors)
    distillers = backbone.window if packing is None else 2**31  # chunk by chunk it reads any number
    demos = sampling.demo_budget(data.max_demo_tokens, llm.window, 1, distillers, config.prefix.length)
    if config.stage == "pretrain":
        inputs = 0  # the decoder predicts all of a text's continuation
        text = data.max_text_tokens
        _, query = sampling.split_text(text, data.beta, text)
        demos, _ = sampling.split_text(text, data.beta, demos)
        demos = demos if packing is None else min(demos, packing.columns * packing.chunks)
    else:
        inputs, query = data.max_input_tokens, min(max(data.query_buckets), llm.window - vectors)
    parts, part = (1, demos) if packing is None else (kind.readings(config), packing.columns)
    if packing is not None and config.stage == "pretrain":
        parts = len(packing.pieces(demos))
    separate = not isinstance(llm, DecoderConfig)
    made = Workload(
        config,
        llm,
        kind.reader_settings(config, backbone),
        rows,
        demos,
        parts,
        part,
        query,
        inputs if separate else None,
    )
    if separate and made.queries > 1:
        raise UserError(
            f"data.queries is {made.queries}: of an encoder–decoder scaling only computes steps with one query to a context."
        )
    return made
