"""The report of a workdir of experiments: one page with tables, figures and what made them.

    python -m mend_jax.experiments.report runs/experiments

Writes <workdir>/report: index.html, which needs no other file and no network, report.md, every figure as PNG in figures/, all data as
CSV and every config in data/. Reads a workdir of experiments, of `experiments.methods`, or of one evaluation; nothing is computed with an LLM. It needs
matplotlib and Jinja2: pip install "matplotlib~=3.11" "jinja2~=3.1".
"""

from pathlib import Path

from mend_jax.cli.command_line import run
from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.cli.text import counted
from mend_jax.report.drawing import require_matplotlib
from mend_jax.report.page import PAGE, write_report
from mend_jax.report.results import read_results, unfinished
from mend_jax.report.sections import section_of, trainings_section


def report(workdir: str, /) -> None:
    """Writes the report and prints where it is.

    Args:
        workdir: the workdir of experiments, of `experiments.methods` or of an evaluation.
    """
    require_matplotlib()
    folder = Path(workdir).expanduser()
    results, left = read_results(folder), unfinished(folder)
    sections = []
    with Progress(len(results) + 1, "section", leave=False) as bar:
        for result in results:
            sections.append(section_of(result))
            bar.update()
        sections += [section] if (section := trainings_section(folder, results)) else []
        bar.update()
    notes = [f"{counted(len(results), 'finished experiment')} in the workdir “{folder.absolute().name}”."]
    if left:
        notes.append(f"Begun and not finished, so not shown: {', '.join(left)}.")
    try:
        write_report(folder / "report", "MEND-JAX: experiments", notes, sections)
    except OSError as error:
        raise UserError(f"{folder / 'report'} cannot be written ({error.strerror}): check the workdir.") from None
    print(f"The report is {folder / 'report' / PAGE}.")


if __name__ == "__main__":
    run(report)
