"""The likeliest of several answers, after a pack of vectors.

    python -m mend_jax.predict --pack=reviews.pack.safetensors --input="I loved it" --options=positive,negative
    python -m mend_jax.predict --pack=reviews.pack.safetensors --inputs=queries.jsonl --out=answers.jsonl

A line of --inputs, or an item of the JSON list in a FILE.json, has "input" and, unless --options are for all, "options"; a line
of --out has the query's own fields, "prediction" and "scores": the mean log-probability per token of each option (natural logarithm).
"""

from typing import Literal

from mend_jax.cli.command_line import run
from mend_jax.cli.errors import UserError, at_place
from mend_jax.cli.progress import Progress
from mend_jax.cli.settings import CHOICES
from mend_jax.cli.text import columns
from mend_jax.data.json_lines import is_text
from mend_jax.packs.pack import load_pack, load_packs_llm
from mend_jax.packs.queries import options_of, query_item, read_queries, require_writable, write_answers
from mend_jax.scoring.options import cache_prefix, check_items, score_items


def predict(
    pack: str,
    input: str = "",
    options: str = "",
    inputs: str = "",
    out: str = "",
    llm: str = "",
    dtype: Literal[*CHOICES["llm.dtype"]] = "float32",
    weights: Literal[*CHOICES["llm.weights"]] = "full",
    batch_size: int = 32,
) -> None:
    """Prints or writes predictions.

    Args:
        pack: a file that `python -m mend_jax.distill` wrote.
        input: one query, whose scores are printed.
        options: the answers to choose from, with commas between.
        inputs: a file of queries, in the place of --input.
        out: the file to write their predictions to.
        llm: where the pack's LLM is, if not where the pack says.
        dtype: of the LLM's arithmetic.
        weights: "full", or "int8": 8 bits.
        batch_size: rows in one pass of the LLM.
    """
    require_one_source(input, inputs, out, options)
    rows = read_queries(inputs) if inputs else [("--input", {"input": input})]
    asked = [(row["input"], options_of(where, row, options)) for where, row in rows]
    found = load_pack(pack)
    if inputs:
        require_writable(out)
    model = load_packs_llm(found, pack, llm, dtype, weights)
    items = [_item(model, found, where, *one) for (where, _), one in zip(rows, asked, strict=True)]
    with Progress(len(items), "query", leave=bool(inputs)) as bar:
        scores = score_items(model, cache_prefix(model, found.prefix), items, batch_size, progress=bar.update)
    answers = [
        row | {"prediction": words[int(values.argmax())], "scores": dict(zip(words, map(float, values), strict=True))}
        for (_, row), (_, words), values in zip(rows, asked, scores, strict=True)
    ]
    if inputs:
        write_answers(out, answers)
        print(f"{len(answers):,} predictions are in {out}.")
        return
    ranked = sorted(answers[0]["scores"].items(), key=lambda one: -one[1])
    print(columns([[word, f"{score:.3f}"] for word, score in ranked]))


def require_one_source(input: str, inputs: str, out: str, *texts: str) -> None:
    """Raises UserError unless there is one query, or a file of queries and one for their answers; and for `texts` that are none."""
    wrong = next((text for text in (input, *texts) if not is_text(text)), None)
    if wrong is not None:
        raise UserError(f"The text {wrong[:40]!r} is not UTF-8: write it as UTF-8, or read it from a file, --inputs.")
    if bool(input.strip()) == bool(inputs):
        raise UserError('Give a query, --input="...", or a file of queries, --inputs=FILE.jsonl, one of them.')
    if bool(inputs) != bool(out):
        raise UserError("--inputs and --out belong together: a file of queries, and one for their answers.")


def _item(llm, pack, where: str, x: str, options: list[str]):
    """A query as `score_items` takes it. Raises its UserErrors, with file and line, before anything is computed."""
    item = query_item(llm, pack.template, x, options)
    with at_place(where):
        check_items(llm, pack.num_vectors, [item])
    return item


if __name__ == "__main__":
    run(predict)
