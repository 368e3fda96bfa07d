"""All checks before work starts, in one place and in the order in which they run: the cheapest come first.

Each check raises `UserError`: one sentence that says what is wrong, where, and what to do.

| when | what must hold | check |
| --- | --- | --- |
| a config is read | fields are known, have the right type and range, and do not exclude each other | `cli.settings.check` |
| a workdir is opened | a resumed run has the settings that it began with | `resume.check_resume` |
| | the run that it starts from has a model of this kind | `resume.check_start` |
| only config.json files are read | `CONFIG_CHECKS`, in their order | `check_config` |
| models are loaded | tokenizers fit their models and each other | `check_models` |
| | saved weights have the model's shapes; an exported folder has its backbone's | `checkpoint.check_shapes`, `trained.check_backbone_params` |
| data are read | a task has enough examples; an item has several options | `finetune.check_enough_examples`, `evaluation.check_options` |
| | texts, contexts and items fit the windows | `windows.check_window`, `windows.check_sequence_length`, `tasks.check_longest`, `options.check_items`, `options.check_rows` |
| | the data are those that the run began with | `resume.check_data` |
| an evaluation has its models and tasks | `EVALUATION_CHECKS`, in their order, for each method | `check_evaluation` |
| an experiment of several trainings begins | its workdir has none of another config | `experiments.run.open_workdir` |
| | all of the above that needs no weights, for each training and evaluation | `check_experiment` |
"""

import dataclasses
import logging

import jax

from mend_jax.cli.errors import UserError, at_place
from mend_jax.data.batches import find_tasks
from mend_jax.data.bos import NONE, bos_token
from mend_jax.data.c4 import text_files, tfds_folder
from mend_jax.data.demonstrations import as_in_validation
from mend_jax.data.evaluation import load_tasks
from mend_jax.data.rows.windows import check_windows
from mend_jax.data.templates import chosen
from mend_jax.data.tokenize import check_backbone, check_tokenizer, other_tokenizer
from mend_jax.interchange.trained import method_spec
from mend_jax.llm.decoder_only import without_weights
from mend_jax.llm.sentence_encoder import is_sentence_encoder, require_sentence_transformers
from mend_jax.models.families import DecoderConfig, from_hf_config
from mend_jax.models.folders import load_tokenizer, local_folder
from mend_jax.objectives import Objective
from mend_jax.prefixes import KINDS, Kind, kind_of
from mend_jax.run import reporting, resume, sharding, teacher_cache
from mend_jax.run.layout import batch_parts, check_batch_size
from mend_jax.scoring.tasks import check_longest, check_truncation, demos_read


@dataclasses.dataclass(frozen=True)
class Models:
    """The settings in the config.json files of a run's models; no weights."""

    llm: object  # settings of the LLM
    kind: type[Kind] | None  # the kind of prefix; None in stage "lm"
    backbone: object | None  # settings of the model that reads demonstrations

    @classmethod
    def of(cls, config) -> "Models":
        with at_place("config.llm.path"):
            llm, kind = from_hf_config(local_folder(config.llm.path)), None if config.stage == "lm" else kind_of(config)
        folder = kind.backbone(config) if kind else ""
        with at_place("config.prefix.backbone"):
            return cls(llm, kind, from_hf_config(local_folder(folder)) if folder else None)


def check_lm(config, models: Models) -> None:
    """Stage "lm" predicts one sequence, so its model has no encoder."""
    if config.stage == "lm" and not isinstance(models.llm, DecoderConfig):
        raise UserError(
            f'Stage "lm" trains decoder-only models, but {config.llm.path} is an encoder–decoder: set another llm.path.'
        )


def check_kind(config, models: Models) -> None:
    """This LLM and this backbone can have the kind of prefix."""
    if models.kind is not None:
        models.kind.check(config, models.backbone, models.llm)


def check_nested(config, models: Models) -> None:
    """The kind of prefix can be trained with several lengths."""
    if config.stage != "lm" and config.prefix.nested and not models.kind.can_nest:
        able = ", ".join(name for name, kind in KINDS.items() if kind.can_nest)
        raise UserError(
            f'prefix.nested trains several lengths, which prefix.kind="{config.prefix.kind}" cannot: use {able}, or set it to ().'
        )


def check_lengths(config, models: Models) -> None:
    """Prefix, queries and sequences fit the models' windows."""
    vectors = None if models.kind is None else models.kind.positions(config)
    check_windows(config, models.llm, models.backbone, vectors)


def check_mesh(config, models: Models) -> None:
    """The mesh divides the heads of both models."""
    if config.train.parallel != "mesh":
        return
    tensor = sharding.mesh_sizes(config.mesh, jax.device_count())[sharding.TENSOR]
    sharding.check_heads(models.llm, tensor, config.llm.path)
    if models.backbone is not None:
        sharding.check_heads(models.backbone, tensor, config.prefix.backbone)


def check_contrast(config, models: Models) -> None:
    """The objective info_nce has other queries to contrast with: with a single one the loss is always 0."""
    del models
    if config.stage == "lm" or config.loss.objective != "info_nce" or not config.loss.kd:
        return
    parts, over = batch_parts(config)
    queries = config.data.queries if config.stage == "finetune" else 1
    if config.train.batch_size // (parts * config.train.accumulate) * queries < 2:
        raise UserError(
            'loss.objective="info_nce" contrasts the queries that a device reads at a time, but there is only one, since'
            f" train.batch_size={config.train.batch_size} is split over {over} x train.accumulate={config.train.accumulate}: raise"
            " train.batch_size or data.queries."
        )


def check_teacher_cache(config, models: Models) -> None:
    """What is cached of the teacher is what the loss reads, and one process computes all of it."""
    if not teacher_cache.is_used(config):
        return
    if Objective.of(config.loss).on_states:
        raise UserError(
            f'loss.objective="{config.loss.objective}" compares states, but loss.teacher_cache keeps predictions: set it to "".'
        )
    if jax.process_count() > 1:
        raise UserError('loss.teacher_cache is for runs of one process: set it to "".')
    if config.loss.teacher_top_k > models.llm.vocab_size:
        raise UserError(
            f"loss.teacher_top_k={config.loss.teacher_top_k} is more than the {models.llm.vocab_size} tokens of the LLM: lower it."
        )


def check_files(config, models: Models) -> None:
    """The texts and tasks that the stage reads exist."""
    del models
    text = str(config.data.text)
    if config.stage != "finetune" and text and not tfds_folder(text):
        text_files(text)
    if config.stage != "pretrain" and config.data.tasks:
        find_tasks(config, "train")


CONFIG_CHECKS = (
    check_lm,
    check_kind,
    check_nested,
    check_lengths,
    check_mesh,
    check_contrast,
    check_teacher_cache,
    check_files,
)


def check_config(config, batch_size: str = "train.batch_size") -> None:
    """Checks a training's config against its models' config.json files alone; reads nothing large.

    `batch_size` is the name of the field that the user set.
    """
    check_batch_size(config, batch_size)
    models = Models.of(config)
    for check in CONFIG_CHECKS:
        check(config, models)


def check_workdir(workdir, config, resumes: bool, finished: bool) -> None:
    """A resumed workdir has the same settings; if it is new, the run that it starts from has a fitting model."""
    if resumes:
        resume.check_resume(workdir, config, finished)
    elif config.stage != "lm" and config.prefix.start_from:
        resume.check_start(config)


def check_models(config, llm, model: Kind | None) -> None:
    """The LLM has a tokenizer that fits it, and so has the model that reads demonstrations for it (None: stage "lm")."""
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
        reporting.say("The distiller has its own tokenizer: contexts are tokenised both for it and for the LLM.")


def check_method_heads(config, llm, method, tasks, mesh) -> None:
    """The mesh divides the heads of the LLM and of the model that reads demonstrations."""
    del tasks
    if mesh is None:
        return
    sharding.check_heads(llm.config, mesh.shape[sharding.TENSOR], config.llm.path)
    if method.model.reader is not None:
        sharding.check_heads(method.model.reader, mesh.shape[sharding.TENSOR], method.path)


def check_method_llm(config, llm, method, tasks, mesh) -> None:
    """What was trained was trained for this LLM (a warning)."""
    del config, tasks, mesh
    if not method.path:
        return
    resume.check_llm(method_spec(method.path).path, llm.path)


def check_method_template(config, llm, method, tasks, mesh) -> None:
    """What was trained reads the tasks with the template of its training (a warning)."""
    del llm, tasks, mesh
    trained, here = method.model.template, chosen(config.data.template)
    if method.path and trained != here:
        logging.warning(
            "What was trained in %s read the template %s, and now reads %s, which lowers its scores: set --config.data.template=%s.",
            method.path,
            trained.name,
            here.name,
            trained.name,
        )


def check_method_use(config, llm, method, tasks, mesh) -> None:
    """The method can be used with the config's other fields."""
    del llm, tasks, mesh
    try:
        method.model.check_use(config)
    except UserError as error:
        raise UserError(f"{method.name}: {error}") from error


def check_method_items(config, llm, method, tasks, mesh) -> None:
    """The longest item of each task fits the LLM's window after the method's prefix."""
    del mesh
    check_longest(llm, method.model.num_vectors, tasks, config.evaluate.split)


def check_method_demos(config, llm, method, tasks, mesh) -> None:
    """The method reads all demonstrations that the tasks have (a warning: those that do not fit are left out)."""
    del mesh
    if not method.model.reads_demos or config.data.release_truncation:
        return
    found = [(*demos_read(config, llm, method.model, task), task) for task in tasks]
    if cut := [one for one in found if one[0] < one[1]]:
        read, given, task = min(cut, key=lambda one: one[0] - one[1])
        logging.warning(
            "%s leaves out demonstrations in %d of %d pairs of task and seed; most in %s, seed %d, where it reads %d of %d: the next does"
            " not fit into %d tokens (data.max_demo_tokens), the models' windows%s.",
            method.name, len(cut), len(found), task.task, task.seed, read, given, config.data.max_demo_tokens, method.model.holds,
        )  # fmt: skip


EVALUATION_CHECKS = (
    check_method_heads,
    check_method_llm,
    check_method_template,
    check_method_use,
    check_method_items,
    check_method_demos,
)


def check_evaluation(config, llm, methods, tasks, mesh) -> None:
    """Checks each method of an evaluation, loaded, with the tasks that it will answer."""
    for method in methods:
        for check in EVALUATION_CHECKS:
            check(config, llm, method, tasks, mesh)


def check_experiment(config, trainings, evaluations) -> None:
    """Checks an experiment before hours of training: reads all test data and checks that it fits the models' windows.

    Args:
        config: the experiment's config.
        trainings: (config, name of the field of its batch size) of each training.
        evaluations: the config of each evaluation.
    """
    for c, batch_size in trainings:
        check_config(c, batch_size)
    for path in {c.evaluate.encoder for c in evaluations if c.evaluate.demos == "dense"} - {""}:
        check_encoder(path)
    llm = without_weights(config.llm.path, config.llm.dtype, config.data.bos)
    finetunings = {c.data.to_json(): c for c, _ in trainings if c.stage == "finetune"}
    reads = [(_without_encoder(c), c.evaluate.split) for c in evaluations]
    reads += [(as_in_validation(c), "dev") for c in finetunings.values()]
    for c, split in {(c.to_json(), split): (c, split) for c, split in reads}.values():
        tasks, _ = load_tasks(c, llm, split)
        if finetunings:
            check_longest(llm, max(c.prefix.length for c, _ in trainings), tasks, split)


def check_encoder(path) -> None:
    """That config.evaluate.encoder can be read, without its weights."""
    if is_sentence_encoder(path):
        require_sentence_transformers(path)
        return
    folder = local_folder(path)
    check_tokenizer(load_tokenizer(folder), from_hf_config(folder).vocab_size, path, "encoder")


def _without_encoder(config):
    """The config with drawn neighbours in the place of near ones: the pool must be as large, but no model is needed."""
    if config.evaluate.demos != "dense":
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.evaluate.demos = "random"
    return config
