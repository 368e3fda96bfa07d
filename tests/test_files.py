"""Files that appear whole or not at all."""

import os
import socket
import subprocess
import sys

import pytest

from mend_jax.run.files import temporary_for, whole_file, whole_folder, write_json, write_text


def test_what_killed_processes_left_is_removed(tmp_path):
    """Of this machine at once; of others, and of older versions, only what nobody has written to for a day."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = temporary_for(tmp_path / "a[1].jsonl").name.split(f".{os.getpid()}.")[0]
    gone = [f"{mine}.{dead.pid}.0123.tmp", f".a[1].jsonl.another-pod.{dead.pid}.0123.tmp"]
    kept = [
        "a[1].jsonl",
        f"{mine}.{os.getppid()}.0123.tmp",
        f".a1.jsonl.{mine.rpartition('.')[2]}.{dead.pid}.0123.tmp",
        f".a[1].jsonl.{socket.gethostname()}.{dead.pid}.tmp",
        f"{mine}.x.tmp",
    ]
    for name in (*gone, *kept):
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / gone[1], (0, 0))
    ours = temporary_for(tmp_path / "a[1].jsonl")
    assert ours.parent == tmp_path and str(os.getpid()) in ours.name
    assert {p.name for p in tmp_path.iterdir()} == set(kept)


def test_no_two_temporary_names_are_the_same(tmp_path):
    assert temporary_for(tmp_path / "a") != temporary_for(tmp_path / "a")


def test_a_folder_that_is_not_there(tmp_path):
    assert temporary_for(tmp_path / "new" / "a.json").parent == tmp_path / "new"


def test_an_error_leaves_the_file_that_was_there(tmp_path):
    write_text(tmp_path / "a", "old – ")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == "old – ".encode()
    write_json(tmp_path / "a", {"b": 1, "a": 2}, sort_keys=True)
    assert (tmp_path / "a").read_text() == '{\n "a": 2,\n "b": 1\n}\n'


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(ValueError), whole_folder(out) as temporary:
        (temporary / "half").write_text("")
        raise ValueError
    assert not list(out.parent.iterdir())
    out.mkdir()  # an empty one is replaced
    with whole_folder(out) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("whole")
        assert temporary.parent == out.parent and not list(out.iterdir())
    assert (out / "inner" / "file").read_text() == "whole"
    with pytest.raises(OSError), whole_folder(out):
        pass
    assert [p.name for p in out.parent.iterdir()] == ["out"] and [p.name for p in out.iterdir()] == ["inner"]


def test_a_folder_that_a_killed_process_left_is_removed(tmp_path):
    script = (
        f"from mend_jax.run.files import whole_folder; import os\nwith whole_folder({str(tmp_path / 'out')!r}) as t:\n"
    )
    script += "    (t / 'half').write_text(''); os._exit(1)"
    subprocess.run([sys.executable, "-c", script])
    assert [p.name.startswith(".out.") for p in tmp_path.iterdir()] == [True]
    with whole_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
