"""The values that a config's fields may have: `check(config)` reports the first wrong one in one sentence."""

import math
from collections.abc import Iterable
from difflib import SequenceMatcher

from ml_collections import ConfigDict

from mend_jax.cli.errors import UserError
from mend_jax.data.templates import TEMPLATES

CHOICES = {
    "stage": ("pretrain", "finetune", "lm"),
    "llm.dtype": ("float32", "bfloat16"),
    "llm.weights": ("full", "int8"),
    "llm.attention": ("xla", "cudnn"),
    "prefix.join": ("concat", "mean"),
    "prefix.placeholder_init": ("vocabulary", "normal"),
    "prefix.projection": ("auto", "tanh", "linear", "identity"),
    "prefix.dtype": ("float32", "bfloat16"),
    "loss.kd_tokens": ("all", "outputs"),
    "loss.clm_tokens": ("all", "outputs"),
    "data.template": tuple(TEMPLATES),
    "data.bos": ("auto", "true", "false"),
    "train.parallel": ("pmap", "mesh"),
    "evaluate.split": ("test", "dev"),
    "evaluate.parallel": ("auto", "tasks", "mesh"),
    "evaluate.option_score": ("mean", "sum"),
    "evaluate.demos": ("file", "pool", "random", "bm25", "dense"),
    "evaluate.perturb": (
        "none",
        "no_label",
        "no_input",
        "random_label",
        "wrong_label",
        "adversarial",
        "typos",
        "irrelevant",
    ),  # fmt: skip
}
PATHS = (
    "llm.path",
    "prefix.backbone",
    "prefix.start_from",
    "loss.teacher_cache",
    "data.text",
    "data.tasks",
    "data.cache",
    "evaluate.encoder",
    "experiment.domains",
)
METHODS = ("zero_shot", "prompt_tuning", "icl", "hypertuning", "mend")  # for experiment.methods
# (lowest, highest) of a number; those not listed are at least 1. A bound in NOT_REACHED is itself not allowed.
RANGES = {
    "seed": (0, 2**31 - 1),
    "loss.kd": (0, math.inf),
    "loss.pred": (0, math.inf),
    "loss.temperature": (0, math.inf),
    "loss.mix": (0, 1),
    "loss.clm": (0, math.inf),
    "data.beta": (0, 1),
    "data.text_share": (0, 1),
    "data.symbols": (0, 1),
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.warmup_steps": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "optimizer.clip": (0, math.inf),
    "llm.layers": (0, math.inf),
    "prefix.layers": (0, math.inf),
    "loss.top_k": (2, math.inf),  # of one word, which has all of the mass, the KL is always 0
    "prefix.chunk_tokens": (0, math.inf),
    "prefix.rms": (-1, math.inf),
    "evaluate.limit": (0, math.inf),
    "evaluate.perturb_share": (0, 1),
    "evaluate.order": (0, math.inf),
    "experiment.pretrain_batch_size": (0, math.inf),
    "experiment.prompt_tuning_learning_rate": (0, math.inf),
    "experiment.first_seeds": (0, math.inf),
    "experiment.cost_repeats": (0, math.inf),
    "mesh.data": (-1, math.inf),
    "mesh.fsdp": (-1, math.inf),
    "mesh.tensor": (-1, math.inf),
}
NOT_REACHED = {
    "data.beta": (0, 1),
    "loss.temperature": (0,),
    "loss.mix": (0, 1),
    "optimizer.learning_rate": (0,),
    "optimizer.clip": (0,),
    "optimizer.b1": (1,),
    "optimizer.b2": (1,),
}
TUPLES = {  # the type of the elements, and whether the tuple may be empty
    "data.demo_buckets": (int, False),
    "data.query_buckets": (int, False),
    "data.validation_seeds": (int, True),
    "prefix.nested": (int, True),
    "evaluate.methods": (str, False),
    "evaluate.seeds": (int, False),
    "evaluate.tasks": (str, True),
    "experiment.methods": (str, False),
    "experiment.cost_llms": (str, True),
    "experiment.cost_rows": (int, False),
    "experiment.training_seeds": (int, False),
    "experiment.trained": (str, True),
    "experiment.partitions": (str, True),
    "experiment.num_demonstrations": (int, False),
    "experiment.num_vectors": (int, False),
    "experiment.many_demonstrations": (int, False),
    "experiment.betas": (float, False),
    "experiment.gammas": (float, False),
    "experiment.lambdas": (float, False),
    "experiment.templates": (str, False),
    "experiment.shares": (float, False),
}
ELEMENTS = {  # the field that each element of a tuple becomes, whose values it may have; other numbers are at least 1
    "experiment.training_seeds": "seed",
    "experiment.betas": "data.beta",
    "experiment.gammas": "loss.clm",
    "experiment.lambdas": "loss.kd",
    "experiment.templates": "data.template",
    "experiment.shares": "evaluate.perturb_share",
}


def check(config: ConfigDict) -> None:
    """Raises UserError for a value that no run can have; the sentence says what is allowed.

    Names that come from a dict elsewhere (kinds of prefix, objectives) are checked by the command line.
    """
    for key, value in dotted_fields(config).items():
        if key in CHOICES:
            check_choice(key, value, CHOICES[key])
        elif isinstance(value, tuple):
            _check_tuple(key, value, *TUPLES[key])
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_range(key, value)
    for method in config.experiment.methods:
        check_choice("experiment.methods", method, METHODS)
    _check_nested(config)
    _check_weights(config)
    _check_text_share(config)
    _check_attention(config)
    _check_frozen(config)


def dotted_fields(config: ConfigDict | dict, before: str = "") -> dict:
    """{"section.field": value} of every field, in the config's order, for a ConfigDict or nested dicts."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            fields |= dotted_fields(value, f"{before}{name}.")
        else:
            fields[before + name] = value
    return fields


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most similar to `name`, as a whole or in its last part."""

    def likeness(other: str) -> float:
        last = SequenceMatcher(None, name.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        return SequenceMatcher(None, name, other).ratio() + last

    return max(known, key=likeness)


def _check_nested(config: ConfigDict) -> None:
    """Each shorter length is one, and is named once."""
    nested, length = config.prefix.nested, config.prefix.length
    wrong = [count for count in nested if not 0 < count < length or nested.count(count) > 1]
    if wrong:
        raise UserError(
            f"prefix.nested holds {wrong[0]}: name lengths below prefix.length={length}, at least 1, each once."
        )


def _check_weights(config: ConfigDict) -> None:
    """A loss that is always 0 would not train anything."""
    read = {"pretrain": ("kd", "clm"), "finetune": ("kd", "pred")}.get(config.stage, ())
    if read and not any(config.loss[name] for name in read):
        names = " and ".join(f"loss.{name}" for name in read)
        raise UserError(f'{names} are both 0, so stage "{config.stage}" has nothing to learn: set one of them above 0.')


def _check_text_share(config: ConfigDict) -> None:
    """Each batch has a whole number of text rows (data/rows/lm.py: SequenceRows.text_number)."""
    share, rows = config.data.text_share, config.train.batch_size
    if config.stage == "lm" and config.data.text and config.data.tasks and share > 0 and int(rows * share + 1e-9) < 1:
        raise UserError(
            f"data.text_share = {share} of train.batch_size = {rows} is less than one row of text: set it to 0, or to "
            f"at least {1 / rows:.3g}."
        )


def _check_attention(config: ConfigDict) -> None:
    """cuDNN's kernel does not support float32; the distiller uses the LLM's attention."""
    if config.llm.attention != "cudnn":
        return
    for section in ("llm",) if config.stage == "lm" else ("llm", "prefix"):
        if config[section].dtype != "bfloat16":
            raise UserError(
                f'llm.attention="cudnn" computes in bfloat16, but {section}.dtype is "{config[section].dtype}": set '
                f"--config.{section}.dtype=bfloat16, or --config.llm.attention=xla."
            )


def _check_frozen(config: ConfigDict) -> None:
    """Integers cannot be trained."""
    if config.stage == "lm" and config.llm.weights != "full":
        raise UserError(
            f'Stage "lm" trains the LLM\'s own weights, which llm.weights="{config.llm.weights}" cannot hold: set '
            "--config.llm.weights=full."
        )


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises UserError, which names the nearest of `choices`, if the field `key` has a value that is not one of them."""
    if value not in choices:
        raise UserError(
            f'{key} must be one of {", ".join(choices)}, not "{value}": did you mean "{nearest(value, choices)}"?'
        )


def _check_tuple(key: str, value: tuple, kind: type, may_be_empty: bool) -> None:
    what = {int: "whole numbers", float: "numbers", str: "names"}[kind]
    if not value and not may_be_empty:
        raise UserError(f"{key} must hold at least one of its {what}: separate them with commas.")
    for element in value:
        if type(element) is not kind and (kind, type(element)) != (float, int):
            raise UserError(f"{key} must hold {what}, not {element!r}: separate them with commas.")
        if key.startswith("experiment."):
            _check_element(key, element)
        if key.startswith(("experiment.", "evaluate.", "data.validation_seeds")) and value.count(element) > 1:
            raise UserError(f"{key} holds {element!r} twice, which would count as two: leave one out.")
        if key.endswith("_buckets") and element < 1:
            raise UserError(f"{key} holds lengths in tokens, which are at least 1, not {element}: take it out.")


def _check_element(key: str, value) -> None:
    field = ELEMENTS.get(key, key)
    if field in CHOICES:
        check_choice(key, value, CHOICES[field])
    elif not isinstance(value, str):
        _check_range(key, value, field)


def _check_range(key: str, value: float, field: str = "") -> None:
    """`field`: whose values are allowed, if it is not `key`."""
    lowest, highest = RANGES.get(field or key, (1, math.inf))
    excluded = NOT_REACHED.get(field or key, ())
    if lowest <= value <= highest and value not in excluded and math.isfinite(value):
        return
    words = [f"more than {lowest}" if lowest in excluded else f"at least {lowest}"]
    if highest < math.inf:
        words.append(f"less than {highest}" if highest in excluded else f"at most {highest}")
    raise UserError(f"{key} must be {' and '.join(words)}, not {value}: set it with --config.{key}=NUMBER.")
