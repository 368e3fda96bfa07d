"""Checkpoints: whole, damaged, interrupted; what is kept; a full disk; the configuration that is kept."""

import errno
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from facts import says, states

from configs.base import get_config
from mend_jax.run import checkpoint, saved_config, saved_steps
from mend_jax.run.checkpoint import Checkpoints
from mend_jax.run.files import is_disk_full


def trees(value):
    params = {"a": {"kernel": np.full((4, 300), value, np.float32)}, "b": np.float32(value).reshape(())}
    return params, (jax.tree.map(np.zeros_like, params), np.int32(value).reshape(()))


def saved(workdir, scores, maximize=False):
    """A workdir with checkpoints 1, 2, ... of these scores (None: not evaluated)."""
    checkpoints = Checkpoints(workdir, maximize)
    for step, score in enumerate(scores, 1):
        checkpoints.save(step, *trees(step), {"note": step}, score)
    checkpoints.close()


def largest_file(folder):
    return max(
        (p for p in folder.rglob("*") if p.is_file() and p.name != "checksums.json"), key=lambda p: p.stat().st_size
    )


def restore(workdir):
    checkpoints = Checkpoints(workdir, False)
    try:
        return checkpoints.restore(*trees(0))
    finally:
        checkpoints.close()


def test_what_was_saved_comes_back(tmp_path):
    saved(tmp_path, [None, None])
    step, params, opt_state, meta = restore(tmp_path)
    assert (step, meta["note"]) == (2, 2)
    for ours, theirs in zip(jax.tree.leaves((params, opt_state)), jax.tree.leaves(trees(2)), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path) is None


@pytest.mark.parametrize(
    "maximize, scores, kept",
    [
        (False, [3.0, 1.0, None, 2.0, None], [2, 4, 5]),
        (True, [3.0, 1.0, None, 2.0, None], [1, 4, 5]),
        (True, [2.0, 2.0, 2.0, 2.0, 2.0], [1, 4, 5]),  # of equals the first stays
        (False, [None, float("nan"), None, None], [3, 4]),
        (False, [5.0, 4.0, 3.0], [2, 3]),
    ],
)
def test_newest_two_and_the_best_are_kept(maximize, scores, kept, tmp_path):
    saved(tmp_path, scores, maximize)
    assert saved_steps.whole_steps(tmp_path) == kept


def test_best_is_known_after_a_restart(tmp_path):
    saved(tmp_path, [0.9, 0.5], maximize=True)
    checkpoints = Checkpoints(tmp_path, True)
    for step in (3, 4, 5):
        checkpoints.save(step, *trees(step), {}, 0.7)
    checkpoints.close()
    assert saved_steps.whole_steps(tmp_path) == [1, 4, 5]
    params, meta = checkpoint.load_best(tmp_path)
    assert (meta["step"], meta["score"]) == (1, 0.9)
    np.testing.assert_array_equal(params["a"]["kernel"], trees(1)[0]["a"]["kernel"])


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)


def empty_folder(file):
    folder = next(p for p in file.parents if p.name == "2")
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    cut_short: "has .* bytes instead of",
    flip_bit: "content of .* has changed",
    lambda file: file.unlink(): "is missing",
    empty_folder: "was not finished",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_named_and_the_previous_used(damage, tmp_path, caplog):
    saved(tmp_path, [None, None])
    newest = tmp_path / "checkpoints" / "2"
    damage(largest_file(newest))
    params, _ = checkpoint.load_best(tmp_path)
    np.testing.assert_array_equal(params["b"], 1)
    checkpoints = Checkpoints(tmp_path, False)
    assert len(caplog.messages) == 2
    assert all(re.search(f"{newest} .*{DAMAGES[damage]}", said) for said in caplog.messages)
    aside = tmp_path / "checkpoints" / "2.damaged"
    assert aside.exists() == (damage is not empty_folder) == (f"Its files are in {aside} now." in caplog.messages[1])
    assert checkpoints.restore(*trees(0))[0] == 1
    checkpoints.save(2, *trees(2), {})  # training passes the place again
    checkpoints.close()
    assert saved_steps.whole_steps(tmp_path) == [1, 2]


def test_flipped_bit_anywhere_is_noticed(tmp_path):
    saved(tmp_path, [0.5])
    folder = tmp_path / "checkpoints" / "1"
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        before = file.read_bytes()
        flip_bit(file)
        assert saved_steps.find_damage(folder) is not None, file
        file.write_bytes(before)
    assert saved_steps.find_damage(folder) is None


def test_interrupted_saves_are_cleared_away(tmp_path):
    saved(tmp_path, [None])
    left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", left)
    assert restore(tmp_path)[0] == 1
    assert not left.exists()


def test_a_deletion_that_was_interrupted_is_ended_without_a_word(tmp_path, caplog, monkeypatch):
    """A kill while orbax deletes what is no longer kept, file by file: its checksums went first."""
    saved(tmp_path, [None, None])
    checkpoints, left = Checkpoints(tmp_path, False), tmp_path / "checkpoints" / "1"
    monkeypatch.setattr(
        checkpoints.manager, "_checkpoint_deleter", SimpleNamespace(delete_steps=lambda steps: None, close=lambda: None)
    )
    checkpoints.save(3, *trees(3), {})
    checkpoints.close()
    assert left.exists() and not (left / saved_steps.CHECKSUMS).exists()
    (left / "_CHECKPOINT_METADATA").unlink()
    assert checkpoint.load_best(tmp_path)[1]["step"] == 3
    assert restore(tmp_path)[0] == 3
    assert not left.exists() and not caplog.messages
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    saved(tmp_path, [None, None])
    for name in ("12", "²", "007", "x", "1" * 30):
        (tmp_path / "checkpoints" / name).write_text("") if name == "12" else (tmp_path / "checkpoints" / name).mkdir()
    assert saved_steps.whole_steps(tmp_path) == [1, 2]
    checkpoints = Checkpoints(tmp_path, False)
    checkpoints.save(3, *trees(3), {})
    checkpoints.close()
    assert saved_steps.whole_steps(tmp_path) == [2, 3]


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", '{"meta/metadata": 3}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]
)
def test_checksums_of_another_shape_are_damage(content, tmp_path, caplog):
    saved(tmp_path, [None, None])
    (tmp_path / "checkpoints" / "2" / saved_steps.CHECKSUMS).write_text(content)
    assert checkpoint.load_best(tmp_path)[1]["step"] == 1
    states(caplog.messages[0], tmp_path / "checkpoints/2", "damaged")


def test_all_damaged_is_said(tmp_path):
    saved(tmp_path, [None])
    cut_short(largest_file(tmp_path / "checkpoints" / "1"))
    with says(tmp_path, "checkpoint"):
        checkpoint.load_best(tmp_path)


def test_reading_does_not_change_a_workdir(tmp_path):
    saved(tmp_path, [0.1, 0.2])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    checkpoint.load_best(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_training_that_goes_on_may_remove_what_is_being_read(all_of_it, tmp_path, monkeypatch, caplog):
    """A checkpoint that is no longer the best loses its checksums, then its files, between its choice and the end of its reading."""
    saved(tmp_path, [3.0, 1.0, 2.0])
    read, folders = checkpoint._read_tree, []

    def read_while_it_is_removed(folder, template):
        folders.append(folder.parent.name)
        found = None if all_of_it else read(folder, template)
        if len(folders) == 1:
            (folder.parent / "checksums.json").unlink()
            shutil.rmtree(folder)
        return read(folder, template) if all_of_it else found

    monkeypatch.setattr(checkpoint, "_read_tree", read_while_it_is_removed)
    params, meta = checkpoint.load_best(tmp_path)
    assert folders == ["2", "3"] and meta["step"] == 3 and params["b"] == 3
    assert not caplog.messages


def test_a_checkpoint_that_cannot_be_read_is_not_asked_for_ever(tmp_path, monkeypatch):
    saved(tmp_path, [1.0])
    monkeypatch.setattr(checkpoint, "_read_tree", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.load_best(tmp_path)


def test_after_a_power_cut_the_newest_checkpoint_is_whole_or_not_there(tmp_path, caplog):
    """Files that the disk had not written are empty, or zeros; checksums are written after what they are of."""
    changes = {
        "empty": lambda file: file.write_bytes(b""),
        "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
        "without checksums": lambda file: file.unlink() if file.name == "checksums.json" else file.write_bytes(b""),
    }
    saved(tmp_path / "whole", [None, None])
    for name, change in changes.items():
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        for file in [path for path in (tmp_path / name / "checkpoints" / "2").rglob("*") if path.is_file()]:
            change(file)
        caplog.clear()
        assert restore(tmp_path / name)[0] == 1
        states(caplog.messages[0], tmp_path / name / "checkpoints" / "2", "not used")


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    saved(tmp_path, [None])
    checkpoints = Checkpoints(tmp_path, False)
    params, opt_state = trees(0)
    params["a"]["kernel"] = np.zeros((5, 300), np.float32)
    with says(tmp_path / "checkpoints/1", "a/kernel", "(4, 300) float32 there", "(5, 300) float32"):
        checkpoints.restore(params, opt_state)
    with says(tmp_path / "checkpoints/1", "parameter c", "absent there"):
        checkpoints.restore(trees(0)[0] | {"c": np.zeros(2)}, opt_state)
    checkpoints.close()


@pytest.mark.parametrize("where", ["at once", "in the background"])
def test_full_disk_is_one_sentence_and_loses_nothing(where, tmp_path, monkeypatch):
    saved(tmp_path, [None])
    checkpoints = Checkpoints(tmp_path, False)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "at once":
        monkeypatch.setattr(checkpoints.manager, "save", full)
    else:
        monkeypatch.setattr(saved_steps, "_checksums", full)
    with says("disk", "full", "checkpoint 2", tmp_path / "checkpoints", "intact"):
        checkpoints.save(2, *trees(2), {})
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.close()
    assert saved_steps.whole_steps(tmp_path) == [1]


def test_full_disk_before_the_first_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, False)
    monkeypatch.setattr(saved_steps, "_checksums", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    checkpoints.save(1, *trees(1), {})
    with says("disk", "full", "checkpoint 1", tmp_path / "checkpoints", "first"):
        checkpoints.close()


def test_reports_of_a_failed_save_to_a_closed_loop_are_not_printed(tmp_path, monkeypatch):
    """Where a disk is really full, TensorStore's threads print hundreds of these traces."""
    passed_on = []
    monkeypatch.setattr(sys, "unraisablehook", passed_on.append)
    checkpoints = Checkpoints(tmp_path, False)
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))
    assert not passed_on
    another = SimpleNamespace(exc_value=RuntimeError("something else"))
    sys.unraisablehook(another)
    assert passed_on == [another]
    checkpoints.close()


@pytest.mark.parametrize("room", [12, 60, 200])
@pytest.mark.slow
def test_really_full_disk_is_one_sentence(room, tmp_path):
    """Kilobytes left: too few for orbax to begin, to write its files, and for the second of two saves at once."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        run = subprocess.run([sys.executable, "-c", FULL_DISK, disk], capture_output=True, text=True)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert "Traceback" not in run.stderr and "Error" not in run.stderr, run.stderr
    states(run.stdout.strip(), "disk is full", "checkpoint 1")


FULL_DISK = """
import sys
import numpy as np
from mend_jax.run.checkpoint import Checkpoints
from mend_jax.cli.errors import UserError

checkpoints = Checkpoints(sys.argv[1], False)
values = np.random.default_rng(0).normal(size=(32, 2000)).astype(np.float32)
params = {str(i): row for i, row in enumerate(values)}
try:
    checkpoints.save(1, params, params, {})
    checkpoints.close()
except UserError as error:
    print(error)
"""


def test_disk_errors_are_recognised_behind_others():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ValueError("while writing") from error
    except ValueError as error:
        assert is_disk_full(error)
    assert is_disk_full(RuntimeError("UNKNOWN: Failed to write; No space left on device [type.googleapis...]"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))


def test_config_is_kept(tmp_path):
    config = get_config()
    config.data.demo_buckets = (128, 256, 512, 900)
    saved_config.write_config(tmp_path, config)
    assert saved_config.read_config(tmp_path)["data"]["demo_buckets"] == [128, 256, 512, 900]


def test_folder_without_config(tmp_path):
    with says(tmp_path, "config.json"):
        saved_config.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with says(tmp_path / "config.json", "JSON"):
        saved_config.read_config(tmp_path)
