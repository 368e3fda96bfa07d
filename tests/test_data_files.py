"""Reading C4's and MetaICL's files: partitions, kinds of task, and one clear sentence for every bad file."""

import gzip
import hashlib
import json

import pytest
from data_files import make_world, words, write_examples, write_text
from facts import says

from mend_jax.data import c4, metaicl

DIGESTS = {
    "class_to_class": "23731f44cab2",
    "non_class_to_class": "63787139da46",
    "qa_to_qa": "34a1af79ca87",
    "non_qa_to_qa": "8c1d5dca74a4",
    "non_nli_to_nli": "9dd7ac781e00",
    "hr_to_lr": "703bbf957fac",
    "non_paraphrase_to_paraphrase": "cc66dca077b2",
}


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def test_metaicl_settings_are_complete():
    sizes = {name: (len(p["train"]), len(p["test"])) for name, p in metaicl.metaicl_partitions().items()}
    assert sizes == {  # Table 1
        "class_to_class": (43, 20), "non_class_to_class": (37, 20), "qa_to_qa": (37, 22), "non_qa_to_qa": (33, 22),
        "non_nli_to_nli": (55, 8), "hr_to_lr": (61, 26), "non_paraphrase_to_paraphrase": (59, 4),
    }  # fmt: skip
    digests = {  # of the names, sorted: a name that is another is noticed
        name: hashlib.sha256(json.dumps([sorted(p["train"]), sorted(p["test"])]).encode()).hexdigest()[:12]
        for name, p in metaicl.metaicl_partitions().items()
    }
    assert digests == DIGESTS
    for name, partition in metaicl.metaicl_partitions().items():
        tasks = partition["train"] + partition["test"]
        both = set(partition["train"]) & set(partition["test"])
        assert len(set(tasks)) == len(tasks) - len(both)
        assert both <= ({"sick"} if name == "non_nli_to_nli" else set()), both  # as in MetaICL's own list


def test_partitions_of_the_folder_come_first(world):
    assert metaicl.load_partition(world / "metaicl", "tiny") == {"train": ["a", "b", "c"], "test": ["t"]}
    assert len(metaicl.load_partition(world / "metaicl", "hr_to_lr")["test"]) == 26
    (world / "metaicl" / "partitions.json").write_text(json.dumps({"hr_to_lr": {"train": ["a"], "test": ["t"]}}))
    assert metaicl.load_partition(world / "metaicl", "hr_to_lr") == {"train": ["a"], "test": ["t"]}


def test_unknown_partition_names_the_known(world):
    with says("'tinny'", world / "metaicl/partitions.json", "'tiny'", "class_to_class"):
        metaicl.load_partition(world / "metaicl", "tinny")


def test_partition_of_another_form(world):
    for content in ('["a"]', '{"train": ["a"]}', '{"train": ["a"], "test": [7]}'):
        (world / "metaicl" / "partitions.json").write_text(f'{{"tiny": {content}}}')
        with says("'tiny'", world / "metaicl/partitions.json", "'train'", "'test'"):
            metaicl.load_partition(world / "metaicl", "tiny")
    (world / "metaicl" / "partitions.json").write_text('{"tiny":\n oops}')
    with says(f"{world}/metaicl/partitions.json", "JSON", "line 2"):
        metaicl.load_partition(world / "metaicl", "tiny")


def test_k_smaller_than_the_files(world):
    folder = world / "metaicl"
    all_four = metaicl.read_examples(folder, "t", 4, 13, "train")
    assert metaicl.read_examples(folder, "t", 2, 13, "train") == all_four[:2]
    assert len(metaicl.read_examples(folder, "t", 4, 13, "test")) == 7
    with says(folder / "data/t/t_8_13_train.jsonl"):
        metaicl.read_examples(folder, "t", 8, 13, "train")


def test_fewer_demonstrations_than_k(world):
    write_examples(world / "metaicl" / "data" / "t" / "t_8_13_train.jsonl", "t", [("w1", "w2")], [])
    with says(world / "metaicl/data/t/t_8_13_train.jsonl", "1 examples", "config.data.k = 8"):
        metaicl.read_examples(world / "metaicl", "t", 8, 13, "train")


def test_kind_of_task(world):
    folder = world / "metaicl"
    examples = metaicl.read_examples(folder, "t", 4, 13, "test")
    assert metaicl.is_classification(folder, "t", examples)
    other = [metaicl.Example("t", "x", "y", ("y", "z")), metaicl.Example("t", "x", "a", ("a", "b"))]
    assert not metaicl.is_classification(folder, "t", other)
    turned = [metaicl.Example("t", "x", "y", ("y", "z")), metaicl.Example("t", "x", "z", ("z", "y"))]
    assert metaicl.is_classification(folder, "t", turned)
    assert not metaicl.is_classification(folder, "t", [metaicl.Example("t", "x", "y", ())])
    (folder / "tasks.json").write_text(json.dumps({"t": {"task_type": "multi-choice"}}))
    assert not metaicl.is_classification(folder, "t", examples)


def test_present_and_missing_tasks(world):
    folder = world / "metaicl"
    assert metaicl.present_tasks(folder, ["a", "t", "zz"], "train") == (["a"], ["t", "zz"])
    assert metaicl.present_tasks(folder, ["a", "t"], "test", 4, (13, 21)) == (["t"], ["a"])
    assert metaicl.present_tasks(folder, ["t"], "test", 4, (13, 42)) == ([], ["t"])  # one seed's file is not enough


LINE = {"task": "a", "input": "x", "output": "y", "options": ["y", "z"]}


@pytest.mark.parametrize("line,facts", [
    ('{"task": "a", ', ["JSON", "column 14"]),
    ("[1, 2]", ["JSON object"]),
    (json.dumps({k: v for k, v in LINE.items() if k != "output"}), ["'output'"]),
    (json.dumps(LINE | {"input": 3}), ["'input'"]),
    (json.dumps(LINE | {"output": "q"}), ["output 'q'", "['y', 'z']"]),
    (json.dumps(LINE | {"options": "yz"}), ["'options'", "list"]),
])  # fmt: skip
def test_bad_lines(tmp_path, line, facts):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + line + "\n")
    with says(f"{path}, line 2", *facts):
        metaicl.read_file(path)


def test_free_form_examples_and_blank_lines_are_fine(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(LINE | {"options": None}) + "\n\n" + json.dumps(LINE | {"options": []}) + "\n")
    assert [example.options for example in metaicl.read_file(path)] == [(), ()]


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with says(tmp_path / "empty.jsonl", "no examples"):
        metaicl.read_file(tmp_path / "empty.jsonl")
    with says(tmp_path / "no.jsonl", "config.data.tasks"):
        metaicl.read_file(tmp_path / "no.jsonl")
    with says(tmp_path / "data", "config.data.tasks"):
        metaicl.data_folder(tmp_path)
    with says("No tasks", "config.data.tasks"):
        metaicl.data_folder("")


def test_a_file_in_the_place_of_the_folder_of_tasks(tmp_path):
    """The folder that it lies in is named: of a task's own file the one above data/."""
    inside, alone = tmp_path / "mine" / "data" / "t" / "t_16_13_train.jsonl", tmp_path / "tasks.jsonl"
    inside.parent.mkdir(parents=True)
    for file, folder in {inside: tmp_path / "mine", alone: tmp_path}.items():
        file.write_text("{}")
        with says(f"{file} is a file", "config.data.tasks", f"the folder {folder},"):
            metaicl.data_folder(file)
    assert metaicl.data_folder(tmp_path / "mine") == tmp_path / "mine" / "data"


def test_text_files(world, tmp_path):
    files = c4.text_files(world / "c4")
    assert [len(files[split]) for split in ("train", "validation")] == [2, 1]
    texts = [row["text"] for row in c4.read_documents(files["train"][1])]
    assert texts == [words(5 * i, 90) for i in range(20)]
    for folder, facts in (
        ("", ["No text is given"]),
        (tmp_path / "no", [tmp_path / "no", "not a folder"]),
        (world / "metaicl", [world / "metaicl", "no *.json.gz"]),
    ):
        with says(*facts, "config.data.text"):
            c4.text_files(folder)


def test_bad_text(tmp_path):
    path = write_text(tmp_path, "c4-train.json.gz", ["one", "two"])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 12])
    with says(path, "damaged", "line 2"):
        list(c4.read_documents(path))
    for line, fact in (('{"text": 1}', "'text'"), ("{", "valid JSON"), ("[]", "JSON object")):
        path.write_bytes(gzip.compress(b'{"text": "one"}\n' + line.encode() + b"\n"))
        with says(f"{path}, line 2", fact):
            list(c4.read_documents(path))
    path.write_bytes(b"this is no gzip file")
    with says(path, "damaged"):
        list(c4.read_documents(path))


def test_c4_builder_writes_what_tfds_and_we_read(world, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = c4.c4_builder(world / "c4", tmp_path / "tfds")
    builder.download_and_prepare(file_format="array_record")
    source = tfds.data_source("c4/en", data_dir=tmp_path / "tfds", split="train")
    assert len(source) == 60
    folder = c4.tfds_folder(tmp_path / "tfds" / "c4" / "en")
    assert folder == c4.tfds_folder(tmp_path / "tfds") and folder.name == "3.1.0"
    texts = set(c4.tfds_texts(folder, "train", 0, 60))
    assert texts == {row["text"] for file in c4.text_files(world / "c4")["train"] for row in c4.read_documents(file)}


def test_metaicl_builder(world, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = metaicl.metaicl_builder(world / "metaicl", tmp_path, "tiny", 4, (13, 21))
    builder.download_and_prepare(file_format="array_record")
    splits = {
        name: len(tfds.data_source("metaicl/tiny", data_dir=tmp_path, split=name)) for name in builder.info.splits
    }
    assert splits == {"train": 60, "demonstrations_13": 4, "demonstrations_21": 4, "dev_13": 4, "dev_21": 4,
                      "test_13": 7, "test_21": 7}  # fmt: skip
    row = tfds.data_source("metaicl/tiny", data_dir=tmp_path, split="test_13")[0]
    assert row["task"] == b"t" and [bytes(option) for option in row["options"]] == [b"w50", b"w51"]


def test_a_tfds_directory_that_needs_tensorflow(world, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    c4.c4_builder(world / "c4", tmp_path).download_and_prepare(file_format="array_record")
    info = c4.tfds_folder(tmp_path) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with says(info.parent, "tfrecord", "file_format='array_record'"):
        c4.open_tfds(info.parent)
