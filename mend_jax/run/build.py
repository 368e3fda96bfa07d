"""Builds the parts of a run from its config: the LLM, the model that is trained, the batches, the evaluation."""

import dataclasses
import math

import jax.numpy as jnp

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.data.batches import make_batches
from mend_jax.data.bos import NONE, bos_token
from mend_jax.data.readers import Readers
from mend_jax.data.tokenize import other_tokenizer
from mend_jax.interchange.trained import is_exported, read_trained
from mend_jax.llm.decoder_only import init_llm, load_llm, with_layers
from mend_jax.models.families import EncoderDecoderConfig, from_hf_config
from mend_jax.models.folders import has_weights, load_tokenizer, local_folder
from mend_jax.objectives import Objective
from mend_jax.prefixes import kind_of
from mend_jax.prefixes.kind import FROZEN
from mend_jax.prefixes.start import first_rms
from mend_jax.run import checkpoint, saved_config, saved_steps
from mend_jax.scoring.recovered import dev_batches, make_recovered
from mend_jax.scoring.tasks import dev_score, dev_tasks
from mend_jax.step import make_kd_fn

UNWRITTEN = {"residual": False, "bos": NONE}  # what an exported folder's settings mean that do not say it
FREE = ("max_input_tokens",)  # of these settings another value may follow: where texts were cut is no part of a model


def load(config, place=None):
    """The LLM of a run, with its weights or, in stage "lm" with only a config.json, with random ones.

    `place` is as in `load_llm`.
    """
    c, bos = config.llm, config.data.bos
    if config.stage != "lm":
        return load_llm(c.path, c.dtype, c.attention, c.remat, c.weights, place, bos)
    if has_weights(c.path):
        llm = load_llm(c.path, "float32", c.attention, c.remat, place=place, bos=bos)
    else:
        llm = init_llm(c.path, config.seed, "float32", c.attention, c.remat, place, bos)
    return dataclasses.replace(with_layers(llm, c.layers, config.seed), dtype=c.dtype)


def measured(config, llm, workdir):
    """The config with what a run measures when it begins: `prefix.rms` of the LLM's embeddings. A run that resumes keeps its own,
    and one that starts from another's params measures nothing."""
    if (
        config.stage == "lm"
        or config.prefix.rms >= 0
        or config.prefix.start_from
        or not kind_of(config).backbone(config)
    ):
        return config
    config = config.copy_and_resolve_references()
    begun = saved_steps.has_checkpoint(workdir)  # else nothing of an earlier start is kept
    saved = saved_config.read_config(workdir)["prefix"].get("rms", 0.0) if begun else -1.0
    with config.unlocked():
        config.prefix.rms = first_rms(config.prefix, llm) if saved < 0 else saved
    return config


def build(config, llm, begins: bool = True, place=None):
    """The model that is trained (prefix.kind); if the run `begins` now, with the params of `prefix.start_from`."""
    if not begins or config.prefix.start_from:  # a checkpoint's params take the place of these: they need no scaling
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.prefix.rms = 0.0
    model = kind_of(config).init(config, llm, config.seed, place)
    if begins and config.prefix.start_from:
        given, (wanted, own) = config.prefix.start_from, model.split_params()
        params, shapes = _exported(given, model, llm, place) if is_exported(given) else _of_run(given, place)
        checkpoint.check_shapes(shapes, checkpoint.shapes_of(wanted), given)
        model = dataclasses.replace(model, params=model.whole(params, _beside(own)))
    return model


def _of_run(workdir, place):
    """(the params that an earlier training trained, their shapes)."""
    params, meta = checkpoint.load_best(workdir, place)
    return params, meta["shapes"]


def _exported(path, model, llm, place):
    """The same of an exported folder. Raises UserError if it holds a model with other settings than `model`."""
    found = read_trained(path, place=place).read_by(llm)
    here, other = UNWRITTEN | model.settings(), UNWRITTEN | found.settings()
    if found.name not in (model.name, *model.begins_with):
        raise UserError(
            f"prefix.start_from={path} holds {found.title}, which {model.title} cannot begin with: name another."
        )
    for name, there in other.items():
        if there != here.get(name) and name not in FREE:
            raise UserError(
                f"prefix.start_from={path} holds a model with {name}={there}, this run's has {here.get(name)}: set the config as it was"
                " there, or start from another."
            )
    params = found.split_params()[0]
    return params, checkpoint.shapes_of(params)


def split(llm, model):
    """(the params that are trained, those that are not): the step's two trees."""
    if model is None:
        return llm.params, {}
    params, own = model.split_params()
    return params, llm.params | _beside(own)


def _beside(own) -> dict:
    """A kind's own frozen parameters as they stand beside the LLM's (`Kind.whole`)."""
    return {FROZEN: own} if own else {}


def batches(config, llm, model, split, layout):
    """This process's rows of the batches of a split ("train" or "validation")."""
    return make_batches(config, readers(config, llm, model), split, layout.share)


def readers(config, llm, model) -> Readers:
    """What the data must know about the LLM and the kind of prefix that is trained (None in stage "lm")."""
    own = None if model is None else model.reader
    return _readers(config, llm.tokenizer, llm.config, None if own is None else model.tokenizer, own)


def readers_by_folders(config) -> Readers:
    """As `readers`, but before anything is loaded: from the config.json and the tokenizers in the models' folders."""
    llm, backbone = local_folder(config.llm.path), "" if config.stage == "lm" else kind_of(config).backbone(config)
    own = local_folder(backbone) if backbone else None
    models = [None if folder is None else (load_tokenizer(folder), from_hf_config(folder)) for folder in (llm, own)]
    return _readers(config, *models[0], *(models[1] or (None, None)))


def _readers(config, tokenizer, llm, own_tokenizer, own) -> Readers:
    """`llm`, `own`: the settings of the LLM and of the model that reads demonstrations for it (None if there is none)."""
    kind = None if config.stage == "lm" else kind_of(config)
    packing = None if own is None else kind.packing(config, own.window)
    bos = bos_token(config.data.bos, tokenizer, config.llm.path)
    return Readers(
        tokenizer,
        llm.window - (bos is not None),
        distiller_window=None if own is None or packing is not None else own.window,
        distiller_tokenizer=None if own is None else other_tokenizer(tokenizer, own_tokenizer),
        separate_targets=isinstance(llm, EncoderDecoderConfig),
        reads_demos=kind is None or kind.reads_demos,
        vectors=None if kind is None else kind.positions(config),
        packing=packing,
    )


def evaluation(config, llm, model, loss_fn, layout, frozen):
    """evaluate(params on the devices) -> {name: value}: the score on the validation data, which is read and checked now, and,
    where a prefix is trained, `recovered` (scoring/recovered.py)."""
    if config.stage == "finetune":
        tasks = dev_tasks(config, llm, model)
        parts = dev_batches(config, llm, model, tasks, layout.share)
        recovered = _recovered(config, llm, model, layout, frozen, parts, ("all", "outputs"))
        own = _beside(model.split_params()[1])  # as loaded: scoring under "pmap" is the first device's alone
        return lambda params: {
            "dev_score": dev_score(config, llm, model, model.whole(layout.scored(params), own), tasks),
            **dict(zip(("recovered", "recovered_outputs"), recovered(params), strict=True)),
        }
    held_out = batches(config, llm, model, "validation", layout)
    parts = [held_out[i].replace(ids=None) for i in range(held_out.steps)]

    def loss_and_kd(*args):
        loss, metrics = loss_fn(*args)
        return jnp.stack([loss, metrics["kd"]])

    losses = _values_of("validation_loss", layout.compile_loss(loss_and_kd), layout, frozen, parts)
    recovered = None if model is None else _recovered(config, llm, model, layout, frozen, parts)
    has_kl = bool(config.loss.kd) and Objective.of(config.loss).is_kl_of_teacher  # the loss has computed it on the way

    def validation(params):
        loss, kd = zip(*losses(params), strict=True)
        found = {"validation_loss": math.fsum(loss) / len(parts)}
        if recovered is not None:
            [found["recovered"]] = recovered(params, [[value] for value in kd] if has_kl else None)
        return found

    return validation


def _recovered(config, llm, model, layout, frozen, parts, kd_tokens=("all",)):
    """recovered(params on the devices) -> a float for each of `kd_tokens`, on held-out batches."""
    of_prefix, of_nothing = (
        layout.compile_loss(make_kd_fn(llm, made, config.loss.chunk, layout.mesh, kd_tokens)) for made in (model, None)
    )
    return make_recovered(*(_values_of("recovered", kd, layout, frozen, parts) for kd in (of_prefix, of_nothing)))


def _values_of(name, function, layout, frozen, parts):
    """values(params on the devices) -> [float, or list of float]: of a compiled function of (params, frozen params, batch), for
    each batch.

    The user sees the progress under `name`.
    """

    def values(params):
        numbers = []
        with Progress(len(parts), "part", what=name, leave=False) as bar:
            for value in [function(params, frozen, layout.split(part)) for part in parts]:
                numbers.append(layout.fetch(value).tolist())
                bar.update()
        return numbers

    return values
