"""Tasks from outside MetaICL, generated and written as its files: arithmetic, code, format (config.experiment.domains).

| task | an input as text | its output | in the small world's words |
| --- | --- | --- | --- |
| domain-arithmetic | `3 + 5`, `7 - 2` | `8`, `5` | `green and purple`, `brown with yellow` |
| domain-code | `max(3, 7)`, `[3, 7][0]` | `7`, `3` | `about green brown`, `the green brown` |
| domain-format | `Anna Boris` | `Boris, Anna` | `anna boris`, whose output is `boris . anna` |

The small world's LLM knows 1,251 words and no digits: there the ten digits are the first ten colours, in their order. Every item
has four options, one of which is right; scored by accuracy. Everything depends on the seed alone.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.data.small_world_language import LABELS, PEOPLE, SEEDS
from mend_jax.run.files import whole_folder

TEXT, SMALL_WORLD = "domains", "small_world_domains"  # the special values of config.experiment.domains
PARTITION = "domains"
K, DEV, TEST = 16, 16, 60  # examples in a file
OPTIONS = 4


@dataclass(frozen=True)
class Spelling:
    """How the tasks are written."""

    digits: tuple[str, ...]  # 0 to 9
    names: tuple[str, ...]
    sums: tuple[str, str]  # of {a} and {b}: their sum, their difference
    programs: tuple[str, str, str, str]  # the larger, the smaller, the first, the second
    formats: tuple[str, str, str, str]  # of {a} and {b}: the right one first


SPELLINGS = {
    TEXT: Spelling(
        tuple("0123456789"),
        tuple(name.capitalize() for name in PEOPLE),
        ("{a} + {b}", "{a} - {b}"),
        ("max({a}, {b})", "min({a}, {b})", "[{a}, {b}][0]", "[{a}, {b}][1]"),
        ("{b}, {a}", "{a}, {b}", "{a} {b}", "{b} {a}"),
    ),
    SMALL_WORLD: Spelling(
        tuple(LABELS[:10]),
        tuple(PEOPLE),
        ("{a} and {b}", "{a} with {b}"),
        ("about {a} {b}", "some {a} {b}", "the {a} {b}", "of {a} {b}"),
        ("{b} . {a}", "{a} . {b}", "{a} {b}", "{b} {a}"),
    ),
}


def arithmetic(spelling: Spelling, draw: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    """Every (input, output, wrong options): sums below 10, differences from 0."""
    for a in range(10):
        for b in range(10):
            for form, value in zip(spelling.sums, (a + b, a - b), strict=True):
                if 0 <= value < 10:
                    wrong = draw.sample([digit for digit in range(10) if digit != value], OPTIONS - 1)
                    yield _of_digits(spelling, form, a, b, value, wrong)


def code(spelling: Spelling, draw: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    """As `arithmetic`: the larger and the smaller of two digits that differ, the first and the second. Both are options."""
    for a in range(10):
        for b in (b for b in range(10) if b != a):
            for form, value in zip(spelling.programs, (max(a, b), min(a, b), a, b), strict=True):
                others = draw.sample([digit for digit in range(10) if digit not in (a, b)], OPTIONS - 2)
                yield _of_digits(spelling, form, a, b, value, [a + b - value, *others])


def format_of_names(spelling: Spelling, draw: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    """As `arithmetic`: two names in the order and with the mark that the demonstrations show."""
    for a in spelling.names:
        for b in (b for b in spelling.names if b != a):
            right, *wrong = (form.format(a=a, b=b) for form in spelling.formats)
            yield f"{a} {b}", right, wrong


TASKS: dict[str, Callable] = {
    "domain-arithmetic": arithmetic,
    "domain-code": code,
    "domain-format": format_of_names,
}


def _of_digits(
    spelling: Spelling, form: str, a: int, b: int, value: int, wrong: list[int]
) -> tuple[str, str, list[str]]:
    written = spelling.digits
    return form.format(a=written[a], b=written[b]), written[value], [written[digit] for digit in wrong]


def rows(task: str, spelling: Spelling) -> dict[str, list[dict]]:
    """The lines of a task's files, {k_seed_split: rows}: no demonstration and no dev example is a test item."""
    draw, made = random.Random(f"domains {task}"), []
    for x, y, wrong in TASKS[task](spelling, draw):
        options = [y, *wrong]
        draw.shuffle(options)
        made.append({"task": task, "input": x, "output": y, "options": options})
    draw.shuffle(made)
    test, pool = made[:TEST], made[TEST:]
    files = {"16384_100_train": pool}
    for seed in SEEDS:
        drawn = random.Random(f"domains {task} {seed}").sample(pool, K + DEV)
        files |= {f"{K}_{seed}_train": drawn[:K], f"{K}_{seed}_dev": drawn[K:], f"{K}_{seed}_test": test}
    return files


def written(name: str, cache) -> Path:
    """The folder of `name`: a special value's, which is written below the folder `cache` if it is not there, or the folder itself.

    Raises UserError for a folder that is not there.
    """
    if name not in SPELLINGS:
        if not Path(name).expanduser().is_dir():
            known = ", ".join(SPELLINGS)
            raise UserError(f"experiment.domains names {name}, which is not a folder: name one, or one of {known}.")
        return Path(name).expanduser()
    content = {task: rows(task, SPELLINGS[name]) for task in TASKS}
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    folder = Path(cache).expanduser() / f"{name}-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder, sync=False) as temporary:
            _write(temporary, content)
    return folder


def _write(folder: Path, content: dict[str, dict[str, list[dict]]]) -> None:
    for task, files in content.items():
        (folder / "data" / task).mkdir(parents=True)
        for name, lines in files.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "data" / task / f"{task}_{name}.jsonl").write_text(text)
    (folder / "partitions.json").write_text(json.dumps({PARTITION: {"train": [], "test": list(content)}}) + "\n")
    (folder / "tasks.json").write_text(json.dumps({task: {"task_type": "multi-choice"} for task in content}) + "\n")
