"""MetaICL's files: `<folder>/data/<task>/<task>_<k>_<seed>_<split>.jsonl`, one JSON object a line:

    {"task": "ag_news", "input": "Stocks rose.", "output": "Business", "options": ["Business", "Sports", "World"]}

`options` is empty (or null) if the output is free text: usable for training, not for evaluation. Options with the same text
count as one, where the first of them stands (MetaICL's commonsense_qa, openbookqa and social_i_qa have some). A folder may have
its own `partitions.json` ({name: {"train": [tasks], "test": [tasks]}}) and `tasks.json` ({task: {"task_type": ...}}).
"""

import functools
import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import nearest
from mend_jax.data.json_lines import instead, parse_object, text_field
from mend_jax.run.reading import described, is_inside, read_json, read_lines

LONGEST_NAME = 120  # bytes of a task's name: file systems take 255 for the name of a file, which holds more than this
LAYOUT = "data/<task>/<task>_<k>_<seed>_<split>.jsonl"  # of the files in a folder of tasks
META_TRAIN = "16384_100_train"  # MetaICL's file of up to 16,384 training examples of a task, drawn with seed 100


@dataclass(frozen=True)
class Example:
    """One input x, its output y and the outputs to choose from (empty: free text)."""

    task: str
    input: str
    output: str
    options: tuple[str, ...]  # each once
    repeated: tuple[str, ...] = ()  # those that the line lists more than once


def data_folder(folder) -> Path:
    """The folder that holds the task folders: `<folder>/data`. Raises UserError if it is missing."""
    if not str(folder):
        raise UserError("No tasks are given: set config.data.tasks to a folder of MetaICL's files.")
    root = Path(folder).expanduser()
    if root.is_file():
        holds = next((above.parent for above in root.parents if above.name == "data"), root.parent)
        raise UserError(f"{root} is a file: set config.data.tasks to the folder {holds}, which must hold {LAYOUT}.")
    path = root / "data"
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: config.data.tasks must hold {LAYOUT}.")
    return path


def meta_train_file(folder, task: str) -> Path:
    """The path of a task's meta-training examples, whether or not the file exists."""
    return data_folder(folder) / task / f"{task}_{META_TRAIN}.jsonl"


def example_file(folder, task: str, k: int, seed: int, split: str) -> Path:
    """The file of a task, seed and split ("train", "dev", "test"); if there is none for k, the file of a larger k.

    Raises UserError if no file is named for k or more examples.
    """
    found = _find_examples(folder, task, k, seed, split)
    if found is None:
        path = data_folder(folder) / task / f"{task}_{k}_{seed}_{split}.jsonl"
        raise UserError(f"Task {task!r} has no {path}: add the file or leave the task out.")
    return found


def largest_file(folder, task: str, seed: int, split: str) -> Path | None:
    """The file of a task and seed with the most examples, which is not the pool of all; None where there is none."""
    files = _files_by_size(folder, task, seed, split).values()
    pool = f"{task}_{META_TRAIN}.jsonl"
    return max((path for path in files if path.name != pool), key=_size_named, default=None)


def _size_named(path: Path) -> int:
    """The number of examples that a file's name says."""
    return int(path.stem.rsplit("_", 3)[1])


def _find_examples(folder, task: str, k: int, seed: int, split: str) -> Path | None:
    """The smallest file with `k` examples or more."""
    files = _files_by_size(folder, task, seed, split)
    return next((path for size, path in sorted(files.items()) if size >= k), None)


def _files_by_size(folder, task: str, seed: int, split: str) -> dict[int, Path]:
    """{examples by its name: file} of a task, seed and split."""
    here = data_folder(folder) / task
    pattern = re.compile(re.escape(task) + rf"_([0-9]+)_{seed}_{split}\.jsonl")
    names = (pattern.fullmatch(path.name) for path in (here.iterdir() if here.is_dir() else ()) if path.is_file())
    sizes = {int(match[1]) for match in names if match}
    return {size: here / f"{task}_{size}_{seed}_{split}.jsonl" for size in sizes}


def read_file(path) -> list[Example]:
    """All examples of a file. Raises UserError (file and line) for a line that is not a MetaICL example, or an empty file."""
    path = Path(path)
    try:
        examples = [parse_line(line, where) for where, line in read_lines(path, "write the file again")]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check config.data.tasks and the task's name.") from None
    if not examples:
        raise UserError(f"{path} holds no examples: remove the task from its partition or fill the file.")
    return examples


def parse_line(line: str, where: str) -> Example:
    """The example in one line. Raises UserError, whose message begins with `where` (file and line)."""
    row = parse_object(line, where)
    task, given, output = (text_field(row, field, where) for field in ("task", "input", "output"))
    options = row.get("options") or []
    if not isinstance(options, list):
        raise UserError(
            f"{where}: 'options' must be a list of texts, empty for a free-form task, but is {described(options)}."
        )
    other = next((option for option in options if not isinstance(option, str)), "")
    if other != "":
        raise UserError(f"{where}: 'options' must be a list of texts{instead(other)}.")
    if options and output not in options:
        raise UserError(f"{where}: the output {output!r} is not among the options {options}.")
    once = tuple(dict.fromkeys(options))
    repeated = tuple(option for option in once if options.count(option) > 1) if len(once) < len(options) else ()
    return Example(task, given, output, once, repeated)


def read_examples(folder, task: str, k: int, seed: int, split: str) -> list[Example]:
    """The k demonstrations ("train", "dev") of a task and seed, or all its test items ("test"). UserError if there are fewer."""
    path = example_file(folder, task, k, seed, split)
    examples = read_file(path)
    if split == "test":
        return examples
    if len(examples) < k:
        raise UserError(
            f"{path} holds {len(examples)} examples, fewer than config.data.k = {k}: lower k or add examples."
        )
    return examples[:k]


def load_partition(folder, name: str) -> dict[str, list[str]]:
    """{"train": tasks, "test": tasks} of a partition, from `<folder>/partitions.json` or else from MetaICL's seven.

    Raises UserError for a missing folder, an unknown name, or a partition of another form.
    """
    own = data_folder(folder).parent / "partitions.json"
    yours, partitions = _read_json(own), metaicl_partitions()
    if name not in yours and name not in partitions:
        hint = f"did you mean {nearest(name, yours or partitions)!r}?"
        there = "" if not yours else f"{own} has {', '.join(yours)}, "
        raise UserError(
            f"There is no partition {name!r} in {own} or in MetaICL: {hint} ({there}MetaICL {', '.join(partitions)}.)"
        )
    partition = yours[name] if name in yours else partitions[name]
    sides = [partition.get(side) for side in ("train", "test")] if isinstance(partition, dict) else [None]
    if not all(isinstance(side, list) and all(isinstance(task, str) for task in side) for side in sides):
        raise UserError(
            f"The partition {name!r} in {own} must be an object with two lists of task names, 'train' and 'test'."
        )
    for task in (*sides[0], *sides[1]):
        _require_name(task, f"The partition {name!r} in {own}")
    return {split: list(dict.fromkeys(partition[split])) for split in ("train", "test")}


def _require_name(task: str, where: str) -> None:
    """Raises UserError for a name of a task that would lead out of the folder of tasks, or that no file can have."""
    what = ""
    if not is_inside(task):
        what = "would lead out of the folder of tasks"
    elif len(task.encode()) > LONGEST_NAME:
        what = f"has {len(task.encode()):,} bytes, more than the {LONGEST_NAME} of a file's name"
    if what:
        raise UserError(f"{where} names the task {task[:LONGEST_NAME]!r}, which {what}: give it another name.")


@functools.cache
def metaicl_partitions() -> dict[str, dict[str, list[str]]]:
    """MetaICL's seven settings (Min et al. 2022): the task names of each side."""
    text = resources.files("mend_jax.data").joinpath("metaicl_partitions.json").read_text(encoding="utf-8")
    return json.loads(text)


def partition_names(folder, split: str, k: int = 16, seeds: tuple[int, ...] = ()) -> list[str]:
    """The partitions that have a meta-test task with files, as `present_tasks` asks for them."""
    own = data_folder(folder).parent / "partitions.json"
    names = [*metaicl_partitions(), *(_read_json(own) if own.is_file() else {})]
    tests = {name: load_partition(folder, name)["test"] for name in dict.fromkeys(names)}
    return [name for name, tasks in tests.items() if present_tasks(folder, tasks, split, k, seeds)[0]]


def present_tasks(folder, tasks: list[str], split: str, k: int = 16, seeds: tuple[int, ...] = ()) -> tuple[list, list]:
    """(present, missing) tasks. Split "train" needs the meta-training file; "test" or "dev" needs files for every seed."""
    present, missing = [], []
    for task in tasks:
        (missing if _first_missing(folder, task, split, k, seeds) else present).append(task)
    return present, missing


def validation_seeds(config) -> tuple[int, ...]:
    """The seeds whose files a run's validation reads."""
    return tuple(config.data.validation_seeds or config.evaluate.seeds)


def seeds_field(config, seeds: tuple[int, ...]) -> str:
    """The field that says that these are the seeds, of evaluate.seeds and data.validation_seeds."""
    return "config.evaluate.seeds" if seeds != tuple(config.data.validation_seeds) else "config.data.validation_seeds"


def held_out_files(config) -> list[Path]:
    """The files that a run's validation reads: demonstrations and dev examples of the meta-test tasks that have files."""
    data, seeds = config.data, validation_seeds(config)
    lm = config.stage == "lm"  # its held-out sequences are of every task's own examples
    chosen, from_pool = () if lm else config.evaluate.tasks, config.evaluate.demos == "pool" and not lm
    k = 1 if from_pool else data.k
    names = [name for name in load_partition(data.tasks, data.partition)["test"] if name in chosen or not chosen]
    present, _ = present_tasks(data.tasks, names, "dev", k, seeds)
    parts = [(task, seed, split) for task in present for seed in seeds for split in ("train", "dev")]
    pools = [path for task in present if from_pool and (path := meta_train_file(data.tasks, task)).is_file()]
    files = [example_file(data.tasks, task, k, seed, split) for task, seed, split in parts]
    more = [largest_file(data.tasks, task, seed, "train") for task in present if from_pool for seed in seeds]
    return list(dict.fromkeys([*files, *filter(None, more), *pools]))


def none_present(config, tasks: list[str], split: str, k: int, seeds: tuple[int, ...]) -> UserError:
    """The error if `present_tasks` found none of a side's tasks of config.data.partition: it names the first missing file."""
    folder, partition, field = config.data.tasks, config.data.partition, seeds_field(config, seeds)
    side = "train" if split == "train" else "test"
    if not tasks:
        return UserError(f"The partition {partition!r} has no meta-{side} tasks: name some, or choose another.")
    there = [
        seed
        for seed in seeds
        if side == "test" and any(not _first_missing(folder, t, split, k, (seed,)) for t in tasks)
    ]
    if 0 < len(there) < len(seeds):
        known, absent = (", ".join(map(str, group)) for group in (there, [seed for seed in seeds if seed not in there]))
        return UserError(
            f"{folder} has train and {split} files of the meta-test tasks of {partition!r} for seed {known}, but none for {absent}: set"
            f" --{field}={known.replace(' ', '')}, or add the missing files."
        )
    folders = [path.name for path in data_folder(folder).iterdir() if path.is_dir()]
    alike = [] if tasks[0] in folders else get_close_matches(tasks[0], folders, 1)
    hint = f" ({alike[0]!r} exists: is it meant by {tasks[0]!r}?)" if alike else ""
    seeds_too = ""
    if side == "test":
        seeds_too = f", config.data.k (now {k}) and {field} (now {', '.join(map(str, seeds))}: every test task needs files for each)"
    return UserError(
        f"{folder} has no {split} files for any of the {len(tasks)} meta-{side} tasks of {partition!r}; the first missing "
        f"file is {_first_missing(folder, tasks[0], split, k, seeds)}{hint}: add it, or check config.data.tasks, "
        f"config.data.partition{seeds_too}."
    )


def _first_missing(folder, task: str, split: str, k: int, seeds: tuple[int, ...]) -> Path | None:
    """The first missing file of a task among those that `present_tasks` needs."""
    if split == "train":
        path = meta_train_file(folder, task)
        return None if path.is_file() else path
    for seed in seeds:
        for part in ("train", split):
            if _find_examples(folder, task, k, seed, part) is None:
                return data_folder(folder) / task / f"{task}_{k}_{seed}_{part}.jsonl"
    return None


def is_classification(folder, task: str, examples: list[Example]) -> bool:
    """Whether a task is scored by Macro-F1 (True) or accuracy: by `tasks.json`, else True if all examples have the same options."""
    listed = _read_json(Path(folder).expanduser() / "tasks.json").get(task)
    if isinstance(listed, dict) and "task_type" in listed:
        return listed["task_type"] == "classification"
    return len({tuple(sorted(example.options)) for example in examples}) == 1 and bool(examples[0].options)


def _read_json(path: Path) -> dict:
    """The object in a file that a folder may have; {} where it has none. It is shared: not to be changed."""
    try:
        found = path.stat()
        return _object(path, found.st_size, found.st_mtime_ns)
    except FileNotFoundError:
        return {}


@functools.lru_cache(maxsize=8)
def _object(path: Path, size: int, changed: int) -> dict:
    """Every task of an evaluation, with each seed, asks for the same file, which may name thousands of tasks."""
    del size, changed  # they make it another file
    return read_json(path, "correct the file")


def metaicl_builder(folder, data_dir, partition: str, k: int = 16, seeds: tuple[int, ...] = (13, 21, 42, 87, 100)):
    """A tfds builder that prepares one partition of MetaICL's files as `<data_dir>/metaicl/<partition>/1.0.0`, without TensorFlow.

    Splits: "train", all meta-training examples; for every seed, "demonstrations_13", "dev_13" and "test_13" of the meta-test
    tasks. `metaicl_builder(...).download_and_prepare(file_format="array_record")` writes the dataset; read it with
    `tfds.data_source("metaicl/<partition>", data_dir=...)`. Tasks without files are left out.
    """
    import tensorflow_datasets as tfds

    tasks = load_partition(folder, partition)
    train, _ = present_tasks(folder, tasks["train"], "train")
    files = {"train": [meta_train_file(folder, task) for task in train]}
    for split, name in {"train": "demonstrations", "dev": "dev", "test": "test"}.items():
        present, _ = present_tasks(folder, tasks["test"], split if split != "train" else "dev", k, seeds)
        files |= {f"{name}_{seed}": [example_file(folder, task, k, seed, split) for task in present] for seed in seeds}

    with tfds.core.registered.skip_registration():

        class MetaICL(tfds.core.GeneratorBasedBuilder):
            """Tasks as MetaICL's preprocessing writes them."""

            name = "metaicl"
            VERSION = tfds.core.Version("1.0.0")
            code_path = None  # tfds would look for it with importlib_resources, which it does not install
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=partition, description="A partition of MetaICL's tasks.")]

            def _info(self):
                text = tfds.features.Text()
                features = {"task": text, "input": text, "output": text, "options": tfds.features.Sequence(text)}
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(
                    builder=self, features=features, homepage="https://github.com/facebookresearch/MetaICL"
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(paths) for split, paths in files.items() if paths}

            def _generate_examples(self, paths):
                for path in paths:
                    for number, example in enumerate(read_file(path)):
                        fields = {name: getattr(example, name) for name in self.info.features}
                        yield f"{path.name}/{number}", fields | {"options": list(example.options)}

        return MetaICL(data_dir=str(Path(data_dir).expanduser()), config=partition, file_format="array_record")
