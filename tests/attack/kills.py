"""Kills: every command that writes, killed at random moments, gone on with, and compared bit for bit with a run that was not.

    python tests/attack/kills.py --kills=100 [--seed=N] [--out=counts.json]

A round takes one command and a new place for what it writes, kills it two to five times, runs it to its end and compares. A
moment is either a time since the start or a number of changes in the folder that it writes to (a file that is there, gone or
longer), so that kills meet what lasts milliseconds: temporary files, unsealed checkpoints, lines of metrics. Some are SIGTERM or
SIGINT in the place of SIGKILL. All draws come from the seed, which is printed; a round that fails prints its own.

Most runs are forks of this process, which has imported the program and done nothing else: an import takes longer than all the
rest. One in ten is a process of its own, as users start it, so that kills meet the imports too.
"""

import argparse
import collections
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # tests/, and the project

from conftest import ONE_DEVICE  # noqa: E402  (before JAX: its settings are of the environment)

os.environ.update(ONE_DEVICE)

import jax  # noqa: E402
import test_end_to_end as whole  # noqa: E402
from data_files import make_world  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402, F401  (imported here, once)

from mend_jax.cli import command_line  # noqa: E402
from mend_jax.run import saved_steps  # noqa: E402

COMMANDS = {  # name: whether it may run as several processes
    "prepare": False, "train": True, "evaluate": True, "experiments.methods": True, "export": False,
}  # fmt: skip
MODULES = {name: importlib.import_module(f"mend_jax.{name}") for name in COMMANDS}
SECONDS = 0.004  # between two looks at a folder
LITTER = (".tmp", "damaged", "orbax-checkpoint")


class Fork:
    """A fork of this process that calls a function; of `subprocess.Popen` what is needed here."""

    def __init__(self, function, log):
        sys.stdout.flush()
        self.pid, self.returncode = os.fork(), None
        if self.pid:
            return
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            function()
            code = 0
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _ended(self, options):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def poll(self):
        return self._ended(os.WNOHANG)

    def wait(self):
        return self._ended(0)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def run_command(name, *flags):
    """In a fork: what `python -m mend_jax.NAME` does after its imports."""
    module = MODULES[name]
    sys.argv = [f"mend_jax.{name}", *flags]
    command_line.run(module.train if name == "train" else module.main, several=COMMANDS[name])


class Command:
    """A command of the package: its flags for a place to write to, and how two of its results are compared."""

    def __init__(self, name, weight, flags, same):
        self.name, self.weight, self.flags, self.same = name, weight, flags, same
        self.seconds = self.changes = 0  # of a run that is not killed


class Attack:
    """The world that the commands read, and what they wrote there without being killed."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log.txt"
        self.program = whole.Program(folder)
        jax.config.update("jax_compilation_cache_dir", self.program.environment["JAX_COMPILATION_CACHE_DIR"])
        self.in_fork(self._write_world)
        config, trained = f"--config={folder}/tiny.py", folder / "unbroken" / "finetune"
        few = "--config.experiment.methods=zero_shot,prompt_tuning,mend"
        methods = f"--config.evaluate.methods=zero_shot,icl,mend={trained}"
        train = ("train", config, "--config.train.steps=8", "--config.train.save_every=1", "--config.train.log_every=1")
        self.commands = [
            Command("prepare", 3, lambda to: ("prepare", config, f"--config.data.cache={to}"), same_files),
            Command("pretrain", 1, lambda to: (*train, "--config.stage=pretrain", f"--workdir={to}"), same_training),
            Command("finetune", 1, lambda to: (*train, "--config.stage=finetune", f"--workdir={to}"), same_training),
            Command("evaluate", 2, lambda to: ("evaluate", config, methods, f"--workdir={to}"), same_evaluation),
            Command(
                "experiment", 0.1, lambda to: ("experiments.methods", config, few, f"--workdir={to}"), same_experiment
            ),
            Command("export", 3, lambda to: ("export", f"--workdir={trained}", f"--out={to}"), same_files),
        ]

    def _write_world(self):
        folder = make_world(self.folder, seeds=whole.SEEDS)
        whole._second_test_task(folder / "metaicl")
        whole._model(folder / "llm", width=32, seed=1)
        whole._model(folder / "backbone", width=24, seed=2)
        (folder / "tiny.py").write_text(whole.CONFIG.format(folder=folder, seeds=whole.SEEDS))

    def start(self, *command):
        return Fork(lambda: run_command(*command), self.log)

    def in_fork(self, function):
        """Calls what uses JAX, so that this process never does. Raises AssertionError where it fails."""
        assert Fork(function, self.folder / "check.txt").wait() == 0, (self.folder / "check.txt").read_text()

    def unbroken(self, name):
        return self.folder / "unbroken" / name

    def measure(self):
        """Runs each command to its end, which compiles its programs, and sees how long it takes and how much it changes."""
        (self.folder / "unbroken").mkdir()
        for command in self.commands:
            target = self.unbroken(command.name)
            began, run = time.monotonic(), self.start(*command.flags(target))
            command.changes = watched(run, target)
            self.program.check(run.wait())
            command.seconds = time.monotonic() - began
            print(f"{command.name}: {command.seconds:.1f} s, {command.changes} changes of files", flush=True)

    def round(self, number, rng, counts):
        """One command, killed two to five times, then run to its end and compared."""
        [command] = rng.choices(self.commands, [command.weight for command in self.commands])
        target, done = self.folder / f"round-{number}", 0
        for _ in range(rng.randint(2, 5)):
            if command.name == "export" and target.exists():  # whole, as the comparison shows: a second one is refused
                break
            how = rng.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), (20, 1, 1))[0]
            start = self.program.start if rng.random() < 0.1 else self.start
            run = start(*command.flags(target))
            done += wait_for_moment(run, target, command, done, rng)
            state = phase(target)
            run.send_signal(how)
            code = run.wait()
            said = self.log.read_text()
            assert "Traceback" not in said and "damaged" not in said, said
            assert code in (-how, 0, 75, 130), (code, said)
            counts["ended before" if code == 0 else how.name] += 1
            if code == -signal.SIGKILL:
                counts[f"{command.name}: {state}"] += 1
        if command.name != "export" or not target.exists():
            said = self.program.check(self.start(*command.flags(target)).wait())
            assert "damaged" not in said, said
        self.in_fork(lambda: command.same(self.unbroken(command.name), target))
        counts["rounds"] += 1


def wait_for_moment(run, target, command, done, rng):
    """Returns at a random moment of a run: after a time, or after a number of changes in the folder that it writes to.

    `done` of its changes were made by runs before it. Returns how many it made, where they were counted.
    """
    late, delay = rng.uniform(0, 0.7 * command.seconds), rng.choice((0, rng.uniform(0, 0.03)))
    if rng.random() < 0.2:
        began = time.monotonic()
        while run.poll() is None and time.monotonic() - began < late:
            time.sleep(SECONDS)
        return 0
    count = watched(run, target, rng.randint(1, max(1, command.changes - done)))
    time.sleep(delay)
    return count


def watched(run, folder, until=None):
    """Counts the changes in a folder until there were so many, or the run has ended."""
    before, count = look(folder), 0
    while run.poll() is None and count != until:
        now = look(folder)
        count, before = count + (now != before), now
        time.sleep(SECONDS)
    return count


def look(folder):
    """{path: size} of what is in a folder at this moment, and in the temporary ones beside it."""
    found = {}
    for whole_one in (folder, *beside(folder)):
        for place, folders, files in os.walk(whole_one):
            for name in (*folders, *files):
                try:
                    found[os.path.join(place, name)] = os.lstat(os.path.join(place, name)).st_size
                except OSError:
                    continue
    return found


def beside(folder):
    """The temporary folders that become this one."""
    return folder.parent.glob(f".{folder.name}.*")


def phase(folder):
    """What a run is doing at this moment, by what it has written."""
    names = [os.path.relpath(path, folder) for path in look(folder)]
    if not names:
        return "startup"
    if any("tmp" in name for name in names):
        return "temporary files"
    steps = {name for name in names if Path(name).name.isdecimal() and Path(name).parent.name == saved_steps.FOLDER}
    if any(f"{step}/{saved_steps.CHECKSUMS}" not in names for step in steps):
        return "unsealed checkpoint"
    return "between two writes"


def same_names(ours, theirs):
    """The same files, but for those of TensorBoard, one for each start, and what is inside a checkpoint, which orbax names by chance."""

    def names(folder):
        found = {path.relative_to(folder) for path in folder.rglob("*")}
        litter = [str(name) for name in (*found, *beside(folder)) if any(word in str(name) for word in LITTER)]
        assert not litter, litter
        return {n for n in found if "tensorboard" not in n.parts and not {"params", "opt_state"} & set(n.parts)}

    assert names(ours) == names(theirs), names(ours) ^ names(theirs)


def same_files(ours, theirs):
    same_names(ours, theirs)
    for path in ours.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (theirs / path.relative_to(ours)).read_bytes(), path


def same_training(ours, theirs):
    same_names(ours, theirs)
    whole.assert_same_training(ours, theirs)
    assert (ours / "params.txt").read_text() == (theirs / "params.txt").read_text()
    for step in saved_steps.whole_steps(ours):
        first, second = (saved_steps.read_meta(saved_steps.step_folder(folder, step)) for folder in (ours, theirs))
        assert first == second, step


def same_evaluation(ours, theirs):
    same_names(ours, theirs)
    assert whole.predictions(ours) == whole.predictions(theirs)
    assert whole.without_times(whole.scores(ours)) == whole.without_times(whole.scores(theirs))


def same_experiment(ours, theirs):
    same_names(ours, theirs)
    for stage in ("prompt_tuning/finetune", "mend/pretrain", "mend/finetune"):
        same_training(ours / stage, theirs / stage)
    same_evaluation(ours / "evaluation", theirs / "evaluation")


def attack(kills, seed, folder, out=None):
    """Rounds until so many processes were killed; returns the counts. Raises AssertionError, with the seed, at the first fault."""
    began, attack = time.monotonic(), Attack(folder)
    attack.measure()
    counts, number = collections.Counter(), 0
    while counts["SIGKILL"] < kills:
        number += 1
        try:
            attack.round(number, random.Random(f"{seed}-{number}"), counts)
        except BaseException:
            print(f"round {number} of --seed={seed} failed; its files are in {folder}", flush=True)
            raise
        counts["seconds"] = round(time.monotonic() - began)
        print(f"round {number}: {dict(counts)}", flush=True)
        if out:
            Path(out).write_text(json.dumps({"seed": seed, **counts}, indent=1) + "\n")
    return counts


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=100)
    flags.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    flags.add_argument("--out")
    given = flags.parse_args()
    print(f"the seed of these kills: --seed={given.seed}", flush=True)
    attack(given.kills, given.seed, Path(tempfile.mkdtemp(prefix="kills")), given.out)
