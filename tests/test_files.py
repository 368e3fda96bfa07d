"""Files that appear whole or not at all."""

import os
import socket
import subprocess
import sys

from mend_jax.run.files import temporary_for


def test_what_killed_processes_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    names = [
        "a[1].jsonl",
        f".a[1].jsonl.{host}.{os.getppid()}.tmp",
        f".a[1].jsonl.{host}.{dead.pid}.tmp",
        f".a1.jsonl.{host}.{dead.pid}.tmp",
        f".a[1].jsonl.other-{host}.{dead.pid}.tmp",
        f".a[1].jsonl.{host}.x.tmp",
    ]
    for name in names:
        (tmp_path / name).write_text("half")
    ours = temporary_for(tmp_path / "a[1].jsonl")
    assert ours.parent == tmp_path and str(os.getpid()) in ours.name
    assert {p.name for p in tmp_path.iterdir()} == set(names) - {names[2]}


def test_a_folder_that_is_not_there(tmp_path):
    assert temporary_for(tmp_path / "new" / "a.json").parent == tmp_path / "new"
