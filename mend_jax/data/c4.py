"""Plain text in C4's form: a folder of AllenAI's `*.json.gz` (lines {"text", "timestamp", "url"}), or a tfds `c4/en`.

Files whose name has "validation" in it are held-out text.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.data.json_lines import parse_object, text_field
from mend_jax.run.reading import lines_of, read_json, require_regular

AGAIN = "download the file again"
FEATURES = "tensorflow_datasets.core.features."  # where the classes are that a tfds folder may name


def text_files(folder) -> dict[str, list[Path]]:
    """{"train": files, "validation": files} of a folder of `*.json.gz`.

    Raises UserError if there is no training file, or one that is no regular file, or empty.
    """
    if not str(folder):
        raise UserError("No text is given: set config.data.text to a folder of C4's *.json.gz files.")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder: config.data.text must hold C4's *.json.gz files or a prepared tfds c4/en."
        )
    files = {"train": [], "validation": []}
    for file in sorted(path.glob("*.json.gz")):
        require_regular(file, AGAIN)
        if not file.stat().st_size:
            raise UserError(f"{file} is empty, not even an archive of nothing: {AGAIN}.")
        files["validation" if "validation" in file.name else "train"].append(file)
    if not files["train"]:
        raise UserError(
            f"{path} holds no *.json.gz files of training text: set config.data.text to a folder of them; gzip packs a *.json of your own."
        )
    return files


def read_documents(file, report=None) -> Iterator[dict]:
    """The documents of one `*.json.gz`, in order. Calls `report` with the number of compressed bytes read so far.

    Raises UserError (file and line) for a line that is not a JSON object with a text, and for a damaged file.
    """
    require_regular(file, AGAIN)
    number = 0
    try:
        with open(file, "rb") as raw, gzip.open(raw, "rb") as packed:
            for number, (where, line) in enumerate(lines_of(packed, file, AGAIN), 1):
                row = parse_object(line, where)
                text_field(row, "text", where)
                yield row
                if report and number % 256 == 0:
                    report(raw.tell())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} is damaged after line {number} ({error}): {AGAIN}.") from error


def tfds_folder(folder) -> Path | None:
    """The directory of a prepared tfds dataset at or just below `folder` (dataset, config, version), or None."""
    path = Path(folder).expanduser()
    for pattern in ("", "*", "*/*", "*/*/*"):
        found = sorted(path.glob(f"{pattern}/dataset_info.json" if pattern else "dataset_info.json"))
        if found:
            return found[-1].parent  # the newest version
    return None


def open_tfds(folder):
    """The builder of a prepared tfds dataset. Raises UserError if reading its files needs TensorFlow."""
    _require_plain_features(Path(folder))
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # of many kinds: what a damaged dataset_info.json or features.json leads to
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder} cannot be read as a tfds dataset ({reason}): prepare it again.") from error
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{folder} was prepared as {builder.info.file_format.value}, which only TensorFlow can read: give the "
            "*.json.gz files, or prepare the dataset with file_format='array_record'."
        )
    if "text" not in (builder.info.features or ()):
        raise UserError(f"{folder} has no feature 'text': config.data.text must be C4 or a dataset like it.")
    return builder


def _require_plain_features(folder: Path) -> None:
    """Raises UserError where features.json names a class that is not tfds' own: tfds would import its module, whatever that is."""
    try:
        left = [read_json(folder / "features.json", "prepare the dataset again")]
    except FileNotFoundError:
        return
    while left:
        part = left.pop()
        if isinstance(part, dict):
            for name in ("pythonClassName", "python_class_name", "type"):
                given = part.get(name)
                if isinstance(given, str) and "." in given and not given.startswith(FEATURES):
                    raise UserError(
                        f"{folder / 'features.json'} names the class {given}, whose module would be run: only those of"
                        " tensorflow_datasets are read."
                    )
            left += part.values()
        elif isinstance(part, list):
            left += part
        elif isinstance(part, str) and "ython" in part and "{" in part:  # JSON within JSON, as the oldest files have it
            raise UserError(f"{folder / 'features.json'} is of an old form: prepare the dataset again.")


def tfds_texts(folder, split: str, start: int, stop: int) -> Iterator[str]:
    """The texts `start` to `stop` - 1 of a split of a prepared tfds dataset."""
    source = open_tfds(folder).as_data_source(split)
    for i in range(start, stop, 256):
        for row in source.__getitems__(range(i, min(i + 256, stop))):
            try:
                yield bytes(row["text"]).decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{folder} holds a text in split {split!r}, from number {i} on, that is not UTF-8 (byte"
                    f" {error.start}): prepare the dataset again."
                ) from None


def c4_builder(folder, data_dir):
    """A tfds builder that prepares `<data_dir>/c4/en/3.1.0` from AllenAI's `*.json.gz` in `folder`, without TensorFlow.

    `c4_builder(folder, data_dir).download_and_prepare(file_format="array_record")` writes files that the official class
    `tfds.text.C4` and `tfds.data_source("c4/en", data_dir=...)` can read.
    """
    import tensorflow_datasets as tfds

    files = text_files(folder)

    with tfds.core.registered.skip_registration():  # the registered name is that of tfds' own class

        class C4(tfds.core.GeneratorBasedBuilder):
            """C4's English part, from files on disk."""

            name = "c4"
            VERSION = tfds.core.Version("3.1.0")
            code_path = None  # tfds would look for it with importlib_resources, which it does not install
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en", description="English C4 from AllenAI's files.")]

            def _info(self):
                fields = ("text", "timestamp", "url", "content-length", "content-type")
                features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in fields})
                return tfds.core.DatasetInfo(builder=self, features=features, homepage="https://github.com/allenai/c4")

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(paths) for split, paths in files.items() if paths}

            def _generate_examples(self, paths):
                for path in paths:
                    for number, row in enumerate(read_documents(path)):
                        fields = {field: str(row.get(field, "")) for field in self.info.features}
                        yield f"{path.name}/{number}", fields

        return C4(data_dir=str(Path(data_dir).expanduser()), config="en", file_format="array_record")
