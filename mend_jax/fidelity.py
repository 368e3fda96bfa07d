"""Whether a pack can be trusted: the LLM's answers after its vectors beside those after the demonstrations themselves.

    python -m mend_jax.fidelity --pack=reviews.pack.safetensors --queries=heldout.jsonl

With --choose_length the pack's shorter trained lengths (prefix.nested) are measured as well, and --out writes the shortest that
is about as good. A line of --queries, or an item of the JSON list in a FILE.json, has "input", "options" (unless --options are for all) and, where it is known, "output", the right answer.
"""

from typing import Literal

from mend_jax.cli.command_line import run
from mend_jax.cli.errors import UserError, at_place
from mend_jax.cli.progress import Progress
from mend_jax.cli.settings import CHOICES
from mend_jax.cli.text import markdown
from mend_jax.packs.demonstrations import demonstration_files, read_demonstrations
from mend_jax.packs.measure import Asked, Fidelity, fidelity, passes, shortest
from mend_jax.packs.pack import Pack, fingerprint_of, load_pack, load_packs_llm
from mend_jax.packs.queries import options_of, read_queries, require_writable


def report(
    pack: str,
    queries: str,
    demos: str = "",
    options: str = "",
    choose_length: bool = False,
    tolerance: float = 0.05,
    out: str = "",
    llm: str = "",
    dtype: Literal[*CHOICES["llm.dtype"]] = "float32",
    weights: Literal[*CHOICES["llm.weights"]] = "full",
    batch_size: int = 8,
) -> Fidelity:
    """Prints a table: the pack, the demonstrations, and nothing before the query.

    Args:
        pack: a file that `python -m mend_jax.distill` wrote.
        queries: a file of queries that are no demonstrations.
        demos: the file of demonstrations that the pack was made of, where the pack does not keep them.
        options: the answers to choose from, with commas between, of lines without "options".
        choose_length: measure the shorter lengths that the distiller was trained with, too.
        tolerance: a length is short enough if it loses at most this share of what all vectors recover.
        out: with --choose_length, the file to write the shortest such pack to.
        llm: where the pack's LLM is, if not where the pack says.
        dtype: of the LLM's arithmetic.
        weights: "full", or "int8": 8 bits.
        batch_size: rows in one pass of the LLM.
    """
    found = load_pack(pack)
    lengths = _lengths(found, pack, choose_length, tolerance, out)
    pairs = _demonstrations(found, pack, demos)
    asked = [_asked(where, row, options) for where, row in read_queries(queries)]
    if out:
        require_writable(out)
    model = load_packs_llm(found, pack, llm, dtype, weights)
    with Progress(passes(lengths), "part", what="fidelity") as bar:
        measured = fidelity(model, found, pairs, asked, lengths, batch_size, bar.update)
    print(table(measured))
    if choose_length:
        _choose(found, measured, lengths, tolerance, out)
    return measured


def table(measured: Fidelity) -> str:
    """The report, as text."""
    rows = []
    shown = ["demonstrations", "pack", *(name for name in measured.kl if name.startswith("first ")), "nothing"]
    for name in shown:
        right = measured.accuracy[name]
        cells = [f"{100 * measured.agreement[name]:.1f}", "–" if right is None else f"{100 * right:.1f}"]
        rows.append([name, str(measured.positions[name]), f"{measured.kl[name]:.4f}", *cells])
    head = ["before the query", "positions", "KL", "same answer, %", "right, %"]
    count = f"{measured.queries} quer{'y' if measured.queries == 1 else 'ies'}"
    share, how = f"{100 * measured.recovered():.1f}%", "1 - KL(pack) / KL(nothing), KL in nats per token"
    said = f"The vectors recover {share} of what the demonstrations change ({how})."
    if measured.recovered() < 0:
        said = f"Do not trust the vectors: the LLM answers more as with the demonstrations if it reads nothing ({share}: {how})."
    return f"{markdown(head, rows)}\n\n{count}. {said}"


def _lengths(pack: Pack, path: str, choose: bool, tolerance: float, out: str) -> tuple[int, ...]:
    """The shorter lengths to measure, the longest first. Raises UserError where there is nothing to choose."""
    if out and not choose:
        raise UserError("--out is for the pack that --choose_length chooses: add --choose_length.")
    if not 0 <= tolerance < 1:
        raise UserError(f"--tolerance is a share of what the vectors recover, at least 0 and below 1, not {tolerance}.")
    if choose and not pack.shorter:
        raise UserError(
            f"{path} has one trained length, {pack.num_vectors} vectors: its distiller must be trained with --config.prefix.nested"
            ", a decoder as backbone and no prefix.residual (the packs of others are made anew, by `distill --vectors`)."
        )
    return tuple(sorted(pack.shorter, reverse=True)) if choose else ()


def _choose(pack: Pack, measured: Fidelity, lengths, tolerance: float, out: str) -> None:
    """Says which length is enough and, where `out` is given, writes its pack."""
    count = shortest(measured, lengths, tolerance) or pack.num_vectors
    print(
        f"{count} vectors are enough: fewer lose more than {100 * tolerance:g}% of what all {pack.num_vectors} recover."
    )
    if out:
        with at_place("--out"):
            pack.first(count).save(out)
        print(f"They are in {out}.")


def _demonstrations(pack, path: str, demos: str):
    if demos:
        files = demonstration_files(demos)
        if len(files) > 1:
            raise UserError(f"--demos={demos} are {len(files)} files, but {path} is one pack: name its own.")
        pairs, dropped = read_demonstrations(files[0]), set(pack.dropped)
        _require_own(pack, path, pairs, files[0])
        return [pair for i, pair in enumerate(pairs) if i not in dropped]
    if pack.demonstrations is None:
        raise UserError(f"{path} does not keep its demonstrations: name their file, --demos=FILE.jsonl.")
    return list(pack.demonstrations)


def _require_own(pack: Pack, path: str, pairs, file) -> None:
    """Raises UserError if the demonstrations of a file are not those of the pack; of older packs the number alone is known."""
    count = pack.num_demonstrations + len(pack.dropped)
    if len(pairs) != count:
        raise UserError(f"{file} has {len(pairs)} demonstrations, but {path} was made of {count}: name its own file.")
    if pack.made_of and pack.made_of != fingerprint_of(pairs):
        raise UserError(f"{file} has other demonstrations than those that {path} was made of: name its own file.")


def _asked(where: str, row: dict, default: str) -> Asked:
    """A line of the queries. Raises UserError, with file and line, for an "output" that is none of its options."""
    options, right = options_of(where, row, default), _answer(where, row)
    if right is not None and right not in options:
        raise UserError(
            f'{where} has the "output" {right[:40]!r}, which is none of its options ({", ".join(options)[:80]}): correct one of them.'
        )
    return Asked(row["input"], options, right, where)


def _answer(where: str, row: dict) -> str | None:
    right = row.get("output")
    if right is not None and (not isinstance(right, str) or not right.strip()):
        raise UserError(f'{where} has an "output" that is no text: correct or remove it.')
    return right


if __name__ == "__main__":
    run(report)
