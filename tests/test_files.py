"""Files that appear whole or not at all."""

import os
import subprocess
import sys

from mend_jax.files import temporary_for


def test_what_killed_processes_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [
        "a[1].jsonl",
        f".a[1].jsonl.{os.getppid()}.tmp",
        f".a[1].jsonl.{dead.pid}.tmp",
        f".a1.jsonl.{dead.pid}.tmp",
    ]
    for name in [*names, ".a[1].jsonl.x.tmp"]:
        (tmp_path / name).write_text("half")
    ours = temporary_for(tmp_path / "a[1].jsonl")
    assert ours.parent == tmp_path and str(os.getpid()) in ours.name
    assert {p.name for p in tmp_path.iterdir()} == {*names, ".a[1].jsonl.x.tmp"} - {names[2]}


def test_a_folder_that_is_not_there(tmp_path):
    assert temporary_for(tmp_path / "new" / "a.json").parent == tmp_path / "new"
