"""What must travel to an accelerator's machine that has no network, in bundles: folders 1, 2 and so on, each small enough for a call.

`launch/accelerator.sh pack` calls it, after it has put wheels into 1/wheels. Beside them go the LLM of configs/smollm2_135m.py, a
GGUF file in parts, and its data, already tokenised: some of C4's files, MetaICL's training tasks and the test tasks that the
config evaluates on.
"""

import math
import shutil
import subprocess
import tarfile
from pathlib import Path

from mend_jax.cli import command_line as cli
from mend_jax.cli import config_files
from mend_jax.cli.errors import UserError
from mend_jax.cli.text import columns
from mend_jax.data import c4, metaicl
from mend_jax.measure.accelerator import CONFIG, DATA, MODEL
from mend_jax.measure.pieces import split
from mend_jax.models.folders import local_folder
from mend_jax.prepare import prepare
from mend_jax.run.files import whole_file, whole_folder

MIB = 1 << 20
CALL = 64 * MIB  # what travels in one call at most: a bundle and the project's own files
MARGIN = MIB
CARRIED = "mend_jax/distillers"
# What runs with each bundle on the way, in the order of its value, so that no call only carries; and with the last one.
CALLS = (
    ("devices,golden,bfloat16", 2),
    ("step_pytorch,step_gpt2_large", 2),
    ("inference,step_opt_6_7b_int8", 2),
    ("step_opt_6_7b,step_gpt2_xl", 2),
    ("step_t5_large", 1),
)
LAST = ("mend", 4)


def pack(out: str, text: str, tasks: str, files: int = 3) -> None:
    """Writes the bundles and prints what each holds. The same command again makes them anew, but tokenises nothing twice.

    Args:
        out: the folder of the bundles.
        text: a folder of C4's *.json.gz.
        tasks: a folder of MetaICL's files.
        files: how many of C4's training files go along.
    """
    bundles = Path(out).expanduser().absolute()
    config = config_files.load_config(str(config_files.ROOT / CONFIG))
    model, data = local_folder(config.llm.path), bundles / DATA
    choose_data(config, Path(text).expanduser(), Path(tasks).expanduser(), files, data)
    config.data.update(text=str(data / "c4"), tasks=str(data / "metaicl"), cache=str(data / "tokens"))
    prepare(config)
    archive, room = bundles / f"{DATA}.tar.gz", CALL - MARGIN - project_size(config_files.ROOT)
    with whole_file(archive) as temporary, tarfile.open(temporary, "w:gz") as tar:
        tar.add(data, DATA)
    if room < MIB:
        raise UserError(f"The project's own files leave no room in a call of {CALL // MIB} MiB: remove untracked ones.")
    place([archive, *split(model, bundles / MODEL, math.ceil(model.stat().st_size / room))], bundles, room)
    print(bundles_text(bundles, room))


def project_size(root: Path) -> int:
    """The bytes of the project's files that travel in every call: those that git does not ignore, or all where there is no git,
    without the distillers that the package carries, which nothing there reads."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout.split("\0")
        files = [root / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        files = list(root.rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file() and not path.is_relative_to(root / CARRIED))


def place(files: list[Path], bundles: Path, room: int) -> None:
    """Moves files into <bundles>/1, /2 and so on, each into the first that has room for it; bundles of before lose theirs.

    Raises UserError for a file that is larger than a bundle.
    """
    numbered = _numbered(bundles)
    for old in (path for folder in numbered for path in folder.glob("*") if path.name != "wheels"):
        old.unlink()
    sizes = {1: _size(bundles / "1")}
    for file in files:
        size = file.stat().st_size
        if size > room:
            raise UserError(
                f"{file} has {size / MIB:.1f} MiB, more than {room / MIB:.0f}: take fewer of C4's files (FILES)."
            )
        number = next((n for n, held in sizes.items() if held + size <= room), len(sizes) + 1)
        sizes[number] = sizes.get(number, 0) + size
        (bundles / str(number)).mkdir(parents=True, exist_ok=True)
        file.replace(bundles / str(number) / file.name)
    for folder in numbered:
        if int(folder.name) not in sizes:
            folder.rmdir()


def _numbered(bundles: Path) -> list[Path]:
    return sorted((path for path in bundles.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def choose_data(config, text: Path, tasks: Path, files: int, folder: Path) -> None:
    """Copies the files that a training and an evaluation of `config` read to <folder>/c4 and <folder>/metaicl, made anew."""
    found = c4.text_files(text)
    partition = metaicl.load_partition(tasks, config.data.partition)
    tested = list(config.evaluate.tasks) or partition["test"]
    trained, _ = metaicl.present_tasks(tasks, partition["train"], "train")
    chosen = [metaicl.meta_train_file(tasks, task) for task in trained]
    chosen += [
        metaicl.example_file(tasks, task, config.data.k, seed, part)
        for task in tested for seed in {*config.evaluate.seeds, *metaicl.validation_seeds(config)} for part in ("train", "dev", "test")
    ]  # fmt: skip
    chosen += [tasks / name for name in ("partitions.json", "tasks.json") if (tasks / name).is_file()]
    _copied(found["train"][:files] + found["validation"], text, folder / "c4")
    _copied(chosen, tasks, folder / "metaicl")


def bundles_text(bundles: Path, room: int) -> str:
    """What each bundle holds, and the commands for the calls. Raises UserError for a bundle that is too large."""
    folders = _numbered(bundles)
    rows = [["bundle", "MiB", "holds"]]
    for folder in folders:
        held, size = sorted(path for path in folder.rglob("*") if path.is_file()), _size(folder)
        if size > room:
            raise UserError(f"{folder} has {size / MIB:.1f} MiB, more than {room / MIB:.0f}: its wheels are too large.")
        rows.append([str(folder), f"{size / MIB:.1f}", ", ".join(str(path.relative_to(folder)) for path in held)])
    head = (
        f"Each bundle fits a call of {CALL // MIB} MiB, beside the project's own files without {CARRIED} (move that elsewhere meanwhile)."
        " Take them there one after another, at the same path, and run (with --out=FOLDER where only a folder comes back)"
    )
    return "\n".join([columns(rows, left=3), "", head, "", *(f"    {call}" for call in calls(len(folders)))])


def calls(bundles: int) -> list[str]:
    """The commands of so many calls with a bundle, and of what is left."""
    others, found = list(CALLS), []
    for number in range(1, bundles + 1):
        last = number == bundles
        only, minutes = LAST if last else others.pop(0) if others else ("devices", 1)
        found.append(f"with {number}: ./launch/accelerator.sh --only={only} --minutes={minutes}")
    left = sum(minutes for _, minutes in others) or 1
    return [*found, f"then, for what has not been run yet: ./launch/accelerator.sh --minutes={left}"]


def _copied(files: list[Path], source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    with whole_folder(target, sync=False) as folder:
        for file in files:
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


if __name__ == "__main__":
    cli.run(pack)
