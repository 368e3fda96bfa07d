"""The LLM's own words, after a pack of vectors.

    python -m mend_jax.generate --pack=reviews.pack.safetensors --input="I loved it"
    python -m mend_jax.generate --pack=reviews.pack.safetensors --inputs=queries.jsonl --out=answers.jsonl --temperature=0.7

A line of --inputs, or an item of the JSON list in a FILE.json, has "input"; a line of --out has the query's own fields, "answer"
and "finish": "end" (the LLM ended its text), "stop" (a stop string) or "length" (--max_tokens).
"""

from typing import Literal

from mend_jax.cli.command_line import run
from mend_jax.cli.errors import at_place
from mend_jax.cli.progress import Progress
from mend_jax.cli.settings import CHOICES
from mend_jax.cli.text import shown
from mend_jax.generation.generate import Wanted, generate_text, read_query, require_wanted
from mend_jax.packs.pack import load_pack, load_packs_llm
from mend_jax.packs.queries import read_queries, require_writable, write_answers
from mend_jax.predict import require_one_source


def generate(
    pack: str,
    input: str = "",
    inputs: str = "",
    out: str = "",
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: list[str] = (),
    seed: int = 0,
    llm: str = "",
    dtype: Literal[*CHOICES["llm.dtype"]] = "float32",
    weights: Literal[*CHOICES["llm.weights"]] = "full",
    batch_size: int = 8,
) -> None:
    """Prints or writes answers.

    Args:
        pack: a file that `python -m mend_jax.distill` wrote.
        input: one query, whose answer is printed.
        inputs: a file of queries, in the place of --input.
        out: the file to write their answers to.
        max_tokens: of an answer, at most.
        temperature: 0: the likeliest token each time; else tokens are drawn.
        top_p: only the likeliest tokens are drawn whose probabilities add up to it.
        stop: a text before which an answer ends; several where the flag is given several times. Without it: what the template puts
            before the next example.
        seed: of the draws.
        llm: where the pack's LLM is, if not where the pack says.
        dtype: of the LLM's arithmetic.
        weights: "full", or "int8": 8 bits.
        batch_size: queries that are answered together.
    """
    require_one_source(input, inputs, out, *stop)
    places, rows = zip(*read_queries(inputs), strict=True) if inputs else (["--input"], [{"input": input}])
    found = load_pack(pack)
    if inputs:
        require_writable(out)
    model = load_packs_llm(found, pack, llm, dtype, weights)
    wanted = Wanted(max_tokens, temperature, top_p, tuple(stop), seed, found.template.answer)
    require_wanted(model, wanted)
    queries = [_read(model, found, where, row["input"], wanted) for where, row in zip(places, rows, strict=True)]
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "stop": stop or None,
        "seed": seed,
        "batch_size": batch_size,
    }
    with Progress(len(rows), "query", leave=bool(inputs)) as bar:
        answers = generate_text(model, found, queries, max_tokens, **sampling, progress=bar.update)
    if not inputs:
        print(shown(answers[0].text, keep="\n\t"))
        return
    write_answers(out, (row | {"answer": a.text, "finish": a.finish} for row, a in zip(rows, answers, strict=True)))
    print(f"{len(answers):,} answers are in {out}.")


def _read(llm, pack, where: str, x: str, wanted: Wanted) -> list[int]:
    """A query's tokens. Raises UserError, with file and line, before anything is computed, where it is empty or does not fit."""
    with at_place(where):
        return read_query(llm, x, pack.template, pack.num_vectors, wanted)


if __name__ == "__main__":
    run(generate)
