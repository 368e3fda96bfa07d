"""What a run is made of, as its config says: the LLM, what is trained, the batches, the evaluation; and what must fit."""

import dataclasses
import math
from pathlib import Path

import jax

from mend_jax.cli.errors import UserError
from mend_jax.data.batches import find_tasks, make_batches
from mend_jax.data.bos import NONE, bos_token
from mend_jax.data.c4 import text_files, tfds_folder
from mend_jax.data.readers import Readers
from mend_jax.data.rows.windows import check_windows
from mend_jax.data.tokenize import check_backbone, check_tokenizer, other_tokenizer
from mend_jax.llm.decoder_only import init_llm, load_llm, with_layers
from mend_jax.models.families import DecoderConfig, EncoderDecoderConfig, from_hf_config
from mend_jax.models.folders import has_weights, load_tokenizer, local_folder
from mend_jax.prefixes import kind_of
from mend_jax.run import checkpoint, reporting, sharding
from mend_jax.scoring.tasks import check_truncation, dev_score, dev_tasks


def load(config, place=None):
    """The LLM of a run: from its weights, or, in stage "lm" with a config.json alone, from random ones.

    `place` as in `load_llm`.
    """
    c, bos = config.llm, config.data.bos
    if config.stage != "lm":
        return load_llm(c.path, c.dtype, c.attention, c.remat, c.weights, place, bos)
    if not isinstance(from_hf_config(local_folder(c.path)), DecoderConfig):
        raise UserError(
            f'Stage "lm" trains decoder-only models, {c.path} is an encoder–decoder: name another llm.path.'
        )
    if has_weights(c.path):
        llm = load_llm(c.path, "float32", c.attention, c.remat, place=place, bos=bos)
    else:
        llm = init_llm(c.path, config.seed, "float32", c.attention, c.remat, place, bos)
    return dataclasses.replace(with_layers(llm, c.layers, config.seed), dtype=c.dtype)


def build(config, llm, begins: bool = True, place=None):
    """What is trained (prefix.kind); if the run `begins` there, with the params of `prefix.start_from`."""
    model = kind_of(config).init(config, llm, config.seed, place)
    if begins and config.prefix.start_from:
        params, meta = checkpoint.load_best(Path(config.prefix.start_from).expanduser(), place)
        checkpoint.check_shapes(meta["shapes"], checkpoint.shapes_of(model.params), config.prefix.start_from)
        model = dataclasses.replace(model, params=params)
    return model


def check_settings(config):
    """Raises UserError where the config asks for what its models cannot do, by their config.json alone, or names data that
    is not there. Nothing large is read."""
    llm, backbone, vectors = from_hf_config(local_folder(config.llm.path)), None, None
    if config.stage != "lm":
        kind = kind_of(config)
        backbone = from_hf_config(local_folder(kind.backbone(config))) if kind.backbone(config) else None
        kind.check(config, backbone, llm)
        vectors = kind.positions(config)
    check_windows(config, llm, backbone, vectors)
    if config.train.parallel == "mesh":
        tensor = sharding.mesh_sizes(config.mesh, jax.device_count())[sharding.TENSOR]
        sharding.check_heads(llm, tensor, config.llm.path)
        if backbone is not None:
            sharding.check_heads(backbone, tensor, config.prefix.backbone)
    text = str(config.data.text)
    if config.stage != "finetune" and text and not tfds_folder(text):
        text_files(text)
    if config.stage != "pretrain" and config.data.tasks:
        find_tasks(config, "train")


def check_tokenizers(config, llm, model):
    """Raises UserError where the LLM has no tokenizer, or the LLM's or the distiller's does not fit its model."""
    check_tokenizer(llm.tokenizer, llm.config.vocab_size, config.llm.path)
    if config.data.bos == NONE and bos_token("auto", llm.tokenizer, llm.path) is not None:
        reporting.say(
            f'The LLM\'s tokenizer begins every text with {llm.tokenizer.bos_token}, which data.bos="{NONE}" leaves out; "auto" puts it'
            " before every prefix."
        )
    if model is None or model.reader is None:
        return
    check_backbone(llm.tokenizer, model.tokenizer, model.reader.vocab_size, config.prefix.backbone)
    if other_tokenizer(llm.tokenizer, model.tokenizer) is not None:
        check_truncation(config)
        reporting.say("The distiller has a tokenizer of its own: what it reads is tokenised for it as well as for the LLM.")


def batches(config, llm, model, split, layout):
    """This process's rows of the batches of a split ("train" or "validation")."""
    return make_batches(config, readers(config, llm, model), split, layout.share)


def readers(config, llm, model) -> Readers:
    """What the LLM, and the kind of prefix that is trained (None in stage "lm"), are to the data."""
    own = None if model is None else model.reader
    return _readers(config, llm.tokenizer, llm.config, None if own is None else model.tokenizer, own)


def readers_by_folders(config) -> Readers:
    """As `readers`, before anything is loaded: by the config.json and the tokenizers of the models' folders."""
    llm, backbone = local_folder(config.llm.path), "" if config.stage == "lm" else kind_of(config).backbone(config)
    own = local_folder(backbone) if backbone else None
    models = [None if folder is None else (load_tokenizer(folder), from_hf_config(folder)) for folder in (llm, own)]
    return _readers(config, *models[0], *(models[1] or (None, None)))


def _readers(config, tokenizer, llm, own_tokenizer, own) -> Readers:
    """`llm`, `own`: the settings of the LLM and of the model that reads demonstrations for it, None where there is none."""
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
    """evaluate(params on the devices) -> {name: value}: the score on the validation data, which is read and checked now."""
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
