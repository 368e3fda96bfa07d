"""What must travel to an accelerator's machine that has no network, in bundles: folders 1, 2 and 3, each small enough for a call.

`launch/accelerator.sh pack` calls it, after it has put wheels into 1/wheels. Beside them go the LLM of configs/smollm2_135m.py, a
GGUF file in two parts, and its data, already tokenised: some of C4's files, MetaICL's training tasks and the test tasks that the
config evaluates on.
"""

import shutil
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
LIMIT = 54 * MIB  # of a bundle: a call takes 64 MiB, the project's files among them
# What runs with each bundle on the way, so that no call only carries.
CALLS = (
    ("devices,golden,bfloat16,step_pytorch,step_gpt2_large", 4),
    ("inference,step_opt_6_7b,step_opt_6_7b_int8", 3),
    ("mend", 5),
)


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
    for number in (1, 2, 3):
        (bundles / str(number)).mkdir(parents=True, exist_ok=True)
    for number, piece in enumerate(split(model, bundles / MODEL, 2), 1):
        piece.replace(bundles / str(number) / piece.name)
    with whole_file(bundles / "3" / f"{DATA}.tar.gz") as temporary, tarfile.open(temporary, "w:gz") as tar:
        tar.add(data, DATA)
    print(bundles_text(bundles))


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


def bundles_text(bundles: Path) -> str:
    """What each bundle holds, and the commands for the calls. Raises UserError for a bundle that is too large."""
    rows, calls = [["bundle", "MiB", "holds"]], []
    for number, (only, minutes) in enumerate(CALLS, 1):
        folder = bundles / str(number)
        held = sorted(path for path in folder.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in held)
        if size > LIMIT:
            raise UserError(
                f"{folder} has {size / MIB:.1f} MiB, more than {LIMIT / MIB:.0f}: take fewer of C4's files (FILES)."
            )
        rows.append([str(folder), f"{size / MIB:.1f}", ", ".join(str(path.relative_to(folder)) for path in held)])
        calls.append(f"with {number}: ./launch/accelerator.sh --only={only} --minutes={minutes}")
    head = "Each bundle fits one call, beside the project's own files. Take them there one after another, at the same path, and run"
    return "\n".join([columns(rows, left=3), "", head, "", *(f"    {call}" for call in calls)])


def _copied(files: list[Path], source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    with whole_folder(target, sync=False) as folder:
        for file in files:
            place = folder / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


if __name__ == "__main__":
    cli.run(pack)
