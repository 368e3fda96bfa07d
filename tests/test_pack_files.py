"""Files of demonstrations and of queries: lines or a list of JSON, and what is said of those that cannot be read."""

import json

from facts import says
from test_packs import write_lines

from mend_jax.packs.demonstrations import demonstration_files, read_demonstrations
from mend_jax.packs.queries import read_queries
from mend_jax.run import reading


def test_bad_demonstrations_name_file_and_line(tmp_path):
    file = tmp_path / "demos.jsonl"
    for line, facts in {
        '{"input": "a"}': ("output",),
        '{"input": "", "output": "b"}': ("input",),
        '{"input": 3, "output": "b"}': ("input",),
        '["a", "b"]': ("JSON object",),
        '{"input": "a", "output"': ("JSON",),
        r'{"input": "\ud83d", "output": "b"}': ("half of a character",),
        '{"input": ' + "[" * 100_000: ("too deep",),
        '{"input": ' + "9" * 5000 + "}": ("too long",),
    }.items():
        file.write_text('{"input": "a", "output": "b"}\n\n' + line + "\n")
        with says(file, "line 3", *facts):
            read_demonstrations(file)
    file.write_bytes('{"input": "ä", "output": "b"}'.encode("latin-1"))
    with says(file, "UTF-8", "column 12"):
        read_demonstrations(file)
    file.write_text("\n")
    with says(file, "no demonstrations"):
        read_demonstrations(file)
    (tmp_path / "empty").mkdir()
    for given, facts in {
        "": ("--demos", "empty"),
        str(tmp_path / "none.jsonl"): (tmp_path / "none.jsonl", "not there"),
        str(tmp_path.parent / "nothing"): ("not there",),
        str(tmp_path / "empty"): (tmp_path / "empty", "*.jsonl or *.json"),
        f"{file},{file}": ("demos.pack.safetensors", "rename"),
    }.items():
        with says(*facts):
            demonstration_files(given)


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"input": "a", "output": "b"}\r\n{"input": "c", "output": "d"}\r\n'
    )
    assert read_demonstrations(tmp_path / "a.jsonl") == [("a", "b"), ("c", "d")]


def test_a_list_of_json_is_read_as_its_lines_would_be(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('\n[{"input": "a", "output": "b"},\n {"input": "c", "output": "d"}]')
    assert read_demonstrations(file) == [("a", "b"), ("c", "d")]
    for text, facts in {
        "[1]": ("item 1", "a whole number (1)", '"input"'),
        '[{"input": "a", "output": "b"}, {"input": "c"}]': ("item 2", 'no text "output"'),
        '[{"input": "a"': ("not valid JSON",),
        "[]": ("no demonstrations",),
    }.items():
        file.write_text(text)
        with says(file, *facts):
            read_demonstrations(file)
    file.write_text('{"input": "a", "output": "b"}\n{"input": "c", "output": "d"}\n')  # lines, whatever the name
    assert len(read_demonstrations(file)) == 2
    file.write_text('{"input": "a", "output": "b"}\n\n{"input": "c"}\n')
    with says(f"{file}, line 3", "output"):
        read_demonstrations(file)


def test_queries_are_read_from_a_list_of_json_too(tmp_path):
    file = tmp_path / "q.json"
    rows = [{"input": "a", "id": 7}, {"input": "b", "options": ["c"]}]
    file.write_text(json.dumps(rows, indent=2))
    assert read_queries(str(file)) == [(f"{file}, item {number}", row) for number, row in enumerate(rows, 1)]
    write_lines(file, rows)
    assert read_queries(file) == [(f"{file}, line {number}", row) for number, row in enumerate(rows, 1)]
    for text, facts in {
        '[{"input": "a"}, ["b"]]': (f"{file}, item 2", "a list", '"input"'),
        '[{"input": "a"}, {"output": "b"}]': (f"{file}, item 2", '"input"'),
        '[{"input": "a"},]': (file, "not valid JSON"),
        "[]": (file, "no queries"),
    }.items():
        file.write_text(text)
        with says(*facts):
            read_queries(file)


def test_a_list_in_a_file_of_lines_is_sent_to_a_file_of_json(tmp_path):
    file, rows = tmp_path / "a.jsonl", [{"input": "a", "output": "b"}] * 3
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "\n [\n"):
        file.write_text(text)
        for read in (read_demonstrations, read_queries):
            with says(file, "FILE.json", "a JSON list"):
                read(file)
    file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows))  # a line of it: what it is, in whole words
    with says(f"{file}, line 2", "a list of 3"):
        read_demonstrations(file)


def test_a_list_of_json_is_read_from_disk_once(tmp_path, monkeypatch):
    """A file may be on a slow disk, and change between two readings."""
    file, opened = tmp_path / "a.json", []
    file.write_text('[{"input": "a", "output": "b"}]')
    real = reading.require_regular
    monkeypatch.setattr(reading, "require_regular", lambda path, remedy: (opened.append(path), real(path, remedy)))
    assert read_demonstrations(file) == [("a", "b")] and opened == [file]
    assert read_queries(file) and opened == [file, file]
