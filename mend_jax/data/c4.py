"""Plain text in C4's form: a folder of AllenAI's `*.json.gz` (lines {"text", "timestamp", "url"}), or a tfds `c4/en`.

Files whose name has "validation" in it are held-out text.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.data.json_lines import parse_object


def text_files(folder) -> dict[str, list[Path]]:
    """{"train": files, "validation": files} of a folder of `*.json.gz`. Raises UserError if there is no training file."""
    if not str(folder):
        raise UserError("No text is given: set config.data.text to a folder of C4's *.json.gz files.")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder: config.data.text must hold C4's *.json.gz files or a prepared tfds c4/en."
        )
    files = {"train": [], "validation": []}
    for file in sorted(path.glob("*.json.gz")):
        files["validation" if "validation" in file.name else "train"].append(file)
    if not files["train"]:
        raise UserError(f"{path} holds no *.json.gz files of training text: set config.data.text to C4's folder.")
    return files


def read_documents(file, report=None) -> Iterator[dict]:
    """The documents of one `*.json.gz`, in order. Calls `report` with the number of compressed bytes read so far.

    Raises UserError (file and line) for a line that is not a JSON object with a text, and for a damaged file.
    """
    number = 0
    try:
        with open(file, "rb") as raw, gzip.open(raw, "rt", encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line, f"{file}, line {number}")
                if report and number % 256 == 0:
                    report(raw.tell())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} is damaged after line {number} ({error}): download the file again.") from error


def _parse(line: str, where: str) -> dict:
    row = parse_object(line, where)
    if not isinstance(row.get("text"), str):
        raise UserError(f"{where} has no text in the field 'text': correct or remove the line.")
    return row


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
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{folder} was prepared as {builder.info.file_format.value}, which only TensorFlow can read: give the "
            "*.json.gz files, or prepare the dataset with file_format='array_record'."
        )
    if "text" not in (builder.info.features or ()):
        raise UserError(f"{folder} has no feature 'text': config.data.text must be C4 or a dataset like it.")
    return builder


def tfds_texts(folder, split: str, start: int, stop: int) -> Iterator[str]:
    """The texts `start` to `stop` - 1 of a split of a prepared tfds dataset."""
    source = open_tfds(folder).as_data_source(split)
    for i in range(start, stop, 256):
        for row in source.__getitems__(range(i, min(i + 256, stop))):
            yield bytes(row["text"]).decode("utf-8", errors="replace")


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
