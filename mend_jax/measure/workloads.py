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

    Axes: B batch, N demonstration tokens, L vectors, Q query tokens, X and Y tokens of x and y.
    """

    config: ConfigDict  # that of the stage's run
    llm: Config
    backbone: Config  # the distiller's, without a head
    rows: int  # B, in the whole step
    demos: int  # N
    query: int  # Q
    inputs: int | None  # X, if the LLM is an encoder–decoder, which reads x and y separately

    @property
    def vectors(self) -> int:
        return self.config.prefix.length

    @functools.cached_property
    def model(self) -> Kind:
        """What makes the prefix; its params are shapes."""
        return KINDS[self.config.prefix.kind].sketch(self.config.prefix, self.backbone, self.llm)

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
    name: str, stage: str, over: int, batch_size: int = 0, dtype: str = "", weights: str = "", remat: bool = False
) -> Workload:
    """The step of a config file's stage, as its training would compute it.

    Args:
        name: that of the file in configs/, without ".py".
        stage: "pretrain" or "finetune", for MEND's run of it.
        over: the number of devices that split the batch; each gets an eighth of the config's batch.
        batch_size: sequences per step instead; 0 means the config's.
        dtype, weights: replace the config's, for both models and for the LLM.
        remat: both models recompute their layers, whatever the config says.
    Raises:
        UserError: a config that cannot be read, several queries per context or the release's budgets, lengths that do not fit
            the models' windows, a batch that cannot be divided.
    """
    config = load_config(str(FOLDER / f"{name}.py"))
    if dtype:
        config.llm.dtype = config.prefix.dtype = dtype
    if weights:
        config.llm.weights = weights
    if remat:
        config.llm.remat = config.prefix.remat = True
    for field, usual in (("data.queries", 1), ("data.release_truncation", False), ("prefix.kind", "distiller")):
        if (value := dotted_fields(config)[field]) != usual:
            raise UserError(f"configs/{name}.py sets {field}={value}: scaling only computes steps with {usual}.")
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
    check_windows(config, llm, backbone)
    data, vectors = config.data, config.prefix.length
    demos = sampling.demo_budget(data.max_demo_tokens, llm.window, 1, backbone.window, vectors)
    if config.stage == "pretrain":
        inputs = 0  # the decoder predicts all of a text's continuation
        text = data.max_text_tokens
        _, query = sampling.split_text(text, data.beta, text)
        demos, _ = sampling.split_text(text, data.beta, demos)
    else:
        inputs, query = data.max_input_tokens, min(max(data.query_buckets), llm.window - vectors)
    separate = not isinstance(llm, DecoderConfig)
    return Workload(
        config, llm, kind_of(config).reader_settings(config, backbone), rows, demos, query, inputs if separate else None
    )
