"""Builds the parts of a run from its config: the LLM, the model that is trained, the batches, the evaluation."""

import dataclasses
import math
from pathlib import Path

from mend_jax.data.batches import make_batches
from mend_jax.data.readers import Readers
from mend_jax.data.tokenize import other_tokenizer
from mend_jax.llm.decoder_only import init_llm, load_llm, with_layers
from mend_jax.models.families import EncoderDecoderConfig, from_hf_config
from mend_jax.models.folders import has_weights, load_tokenizer, local_folder
from mend_jax.prefixes import kind_of
from mend_jax.run import checkpoint
from mend_jax.scoring.tasks import dev_score, dev_tasks


def load(config, place=None):
    """The LLM of a run, with its weights or, in stage "lm" with only a config.json, with random ones.

    `place` is as in `load_llm`.
    """
    c = config.llm
    if config.stage != "lm":
        return load_llm(c.path, c.dtype, c.attention, c.remat, c.weights, place)
    if has_weights(c.path):
        llm = load_llm(c.path, "float32", c.attention, c.remat, place=place)
    else:
        llm = init_llm(c.path, config.seed, "float32", c.attention, c.remat, place)
    return dataclasses.replace(with_layers(llm, c.layers, config.seed), dtype=c.dtype)


def build(config, llm, begins: bool = True, place=None):
    """The model that is trained (prefix.kind); if the run `begins` now, with the params of `prefix.start_from`."""
    model = kind_of(config).init(config, llm, config.seed, place)
    if begins and config.prefix.start_from:
        params, meta = checkpoint.load_best(Path(config.prefix.start_from).expanduser(), place)
        checkpoint.check_shapes(meta["shapes"], checkpoint.shapes_of(model.params), config.prefix.start_from)
        model = dataclasses.replace(model, params=params)
    return model


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
    return Readers(
        tokenizer,
        llm.window,
        distiller_window=None if own is None or packing is not None else own.window,
        distiller_tokenizer=None if own is None else other_tokenizer(tokenizer, own_tokenizer),
        separate_targets=isinstance(llm, EncoderDecoderConfig),
        reads_demos=kind is None or kind.reads_demos,
        vectors=None if kind is None else kind.positions(config),
        packing=packing,
    )


def evaluation(config, llm, model, loss_fn, layout, frozen):
    """evaluate(params on the devices) -> {name: value}, the score on the validation data, which is read and checked here."""
    if config.stage == "finetune":
        tasks = dev_tasks(config, llm, model)
        return lambda params: {"dev_score": dev_score(config, llm, model, layout.scored(params), tasks)}
    loss = layout.compile_loss(lambda *args: loss_fn(*args)[0])
    held_out = batches(config, llm, model, "validation", layout)
    parts = [held_out[i] for i in range(held_out.steps)]

    def validation_loss(params):
        losses = [loss(params, frozen, layout.split(part.replace(ids=None))) for part in parts]
        return {"validation_loss": math.fsum(float(layout.fetch(value)) for value in losses) / len(losses)}

    return validation_loss
