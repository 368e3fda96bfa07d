"""Distil and score as programs of JAX that need none of our code: `jax.export`, with the weights beside them.

    distil.jax             (distiller, tokens (C,N), length (C,)) -> vectors (L,D) and how many of them count, ()
    score.jax              (llm, vectors (L,D), count (), tokens (R,Q), length (R,), target_start (R,)) -> (R,) float32
    distiller.safetensors  the weights that `distil` takes: a flat dict of arrays
    llm.safetensors        those that `score` takes
    settings.json          C, N, L, D, R, Q, the template
    tokenizer files        of the LLM; of the distiller, in distiller/, where it is another one

The programs are compiled for whatever device runs them: CPU, CUDA or TPU. Their shapes are fixed; rows are right-padded.

Axes: C chunks (a distiller of one context: 1), N demonstration tokens of each, L vectors of all, R rows of a query and an option
each, Q their tokens, D the LLM's width.
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export as jax_export

from mend_jax.cli.errors import UserError
from mend_jax.data.bos import NONE
from mend_jax.data.query import Query
from mend_jax.interchange.export import new_folder, written
from mend_jax.interchange.trained import llm_for, load_both
from mend_jax.models.weights import write_file
from mend_jax.prefixes.kind import Kind
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.files import write_json, write_text

PLATFORMS = ("cpu", "cuda", "tpu")
CHUNKS = 16  # that a program reads at most, unless it is said

CARD = """# Distil and score in JAX

`distil.jax` turns demonstrations into vectors, `score.jax` gives the mean log-probability per token of an answer after them.
Both are programs of `jax.export` (made with JAX {version}): `pip install jax flatbuffers safetensors transformers` is all that
they need.

```python
import json

import jax
import numpy as np
from safetensors.flax import load_file
from transformers import AutoTokenizer

sizes = json.load(open(f"{{folder}}/settings.json"))
distil, score = (jax.export.deserialize(open(f"{{folder}}/{{name}}.jax", "rb").read()) for name in ("distil", "score"))
distiller, llm = (load_file(f"{{folder}}/{{name}}.safetensors") for name in ("distiller", "llm"))
before, between, answer = sizes["template"]


def read(tokenizer, *texts):
    return sum(tokenizer([text for text in texts if text], add_special_tokens=False)["input_ids"], [])


def padded(rows, count, columns):
    assert len(rows) <= count, f"{{len(rows)}} rows, where {{count}} fit"
    assert max(map(len, rows)) <= columns, f"{{max(map(len, rows))}} tokens, where {{columns}} fit"
    tokens = np.zeros((count, columns), np.int32)
    for row, ids in zip(tokens, rows):
        row[: len(ids)] = ids
    return tokens


tokenizer = AutoTokenizer.from_pretrained(f"{{folder}}{sub}")
demos = [("a great film", "positive"), ("dull", "negative")]
chunks, room = [], 0
for x, y in demos:
    ids = read(tokenizer, before + x, between, answer + y)
    if not room or len(chunks[-1]) + len(ids) > sizes["demonstration_columns"]:
        chunks, room = [*chunks, []], sizes["chunk_demos"]
    chunks[-1], room = chunks[-1] + ids, room - 1
tokens, lengths = padded(chunks, sizes["chunks"], sizes["demonstration_columns"]), np.zeros(sizes["chunks"], np.int32)
lengths[: len(chunks)] = [len(chunk) for chunk in chunks]
vectors, count = distil.call(distiller, tokens, lengths)

tokenizer = AutoTokenizer.from_pretrained(folder)
x, options = read(tokenizer, before + "I loved it", between), ["positive", "negative"]
rows = [x + read(tokenizer, answer + option) for option in options]
lengths, starts = np.ones((2, sizes["rows"]), np.int32)
lengths[: len(rows)], starts[: len(rows)] = [len(row) for row in rows], len(x)
tokens = padded(rows, sizes["rows"], sizes["query_columns"])
scores = score.call(llm, vectors, count, tokens, lengths, starts)[: len(options)]
```
"""


def export_jax(
    path: str | Path,
    out: str | Path,
    llm: str = "",
    dtype: str = "float32",
    rows: int = 8,
    query_columns: int = 128,
    chunks: int = 0,
) -> str:
    """Writes the programs and their weights to the new folder `out`, whole or not at all; returns a sentence about them.

    Args:
        path: a training workdir or exported folder of a distiller.
        out: a folder that does not exist or is empty.
        llm: the LLM's folder or name; a training workdir knows its own.
        dtype: of the weights and the arithmetic: "float32" or "bfloat16".
        rows: R, options that are scored in one call.
        query_columns: Q, tokens of a query with its option, at most.
        chunks: C, of a distiller of chunks, 0: 16; one of one context takes none.
    Raises:
        UserError: no distiller there, no LLM, an `out` with content, numbers that do not fit, a full disk, no flatbuffers.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError(
            "jax.export writes its programs with flatbuffers, which is not installed: pip install flatbuffers."
        )
    out = new_folder(out)
    reader, model = load_both(path, llm_for(path, llm), dtype)
    sizes = _sizes(path, model, chunks)
    room = min(query_columns, reader.window - sizes["num_vectors"])
    if rows < 1 or room < 2:
        raise UserError(
            f"rows is {rows} and query_columns is {query_columns}: there must be a row, and room for two tokens behind "
            f"{sizes['num_vectors']} vectors in a window of {reader.window}."
        )
    sizes |= {"rows": rows, "query_columns": room, "template": list(model.template), "bos": model.bos or NONE}
    with written(out) as folder:
        _write(folder, reader, model, sizes)
    return f"distil.jax, score.jax and their weights are in {out}; README.md there shows how they are called."


def _sizes(path, model: Kind, chunks: int) -> dict:
    """What settings.json says of the demonstrations and of the vectors."""
    if not model.reads_demos:
        raise UserError(f"{path} holds {model.title}, which reads no demonstrations: programs are made of a distiller.")
    if chunks and not model.reads_chunks:
        raise UserError(f"{path} holds {model.title} that reads one context: --chunks={chunks} is for one of chunks.")
    if chunks < 0:
        raise UserError(f"chunks is {chunks}: there must be one.")
    layout = model.layout(chunks or CHUNKS)
    return {
        "chunks": layout.chunks,
        "chunk_demos": layout.demos,
        "demonstration_columns": layout.columns,
        "num_vectors": model.vectors_of_chunks(layout.chunks),
        "width": model.llm_width,
    }


def distil_program(model: Kind, chunks: int, columns: int) -> jax_export.Exported:
    """(flat weights, tokens (C,N), length (C,)) -> (vectors (L,D) float32, count () int32). A chunk of no tokens is none."""

    def distil(weights, tokens, length):
        made = model.apply_chunks(unflatten_dict(weights, sep="/"), tokens, length)
        return made.embeds[0].astype(jnp.float32), made.length[0]

    return _exported(distil, _flat(model.params), _ints(chunks, columns), _ints(chunks))


def score_program(llm, vectors: int, rows: int, columns: int) -> jax_export.Exported:
    """(flat weights, vectors (L,D), count (), tokens (R,Q), length (R,), target_start (R,)) -> scores (R,) float32."""

    def score(weights, vectors, count, tokens, length, start):
        params = unflatten_dict(weights, sep="/")
        return jax.lax.map(lambda row: _score_row(llm, params, vectors, count, *row), (tokens, length, start))

    embeds = jax.ShapeDtypeStruct((vectors, llm.config.width), jnp.float32)
    return _exported(score, _flat(llm.params), embeds, _ints(), _ints(rows, columns), _ints(rows), _ints(rows))


def _score_row(llm, params, vectors, count, tokens, length, start):
    """The mean log-probability per token of tokens[start:length] after the vectors and tokens[:start]."""
    query = Query(tokens[None], length[None], start[None])
    states = llm.states(params, Prefix(vectors[None], count[None]), query)
    targets = llm.targets(query)
    if llm.start_token is None:  # the state before a token predicts it
        states, words, at = states[:, :-1], tokens[None, 1:], jnp.arange(1, len(tokens))
        counted = (at >= start) & (at < length)
    else:
        words, counted = targets.tokens, jnp.arange(targets.tokens.shape[1]) < targets.length[0]
    logits = llm.logits(params, states)[0].astype(jnp.float32)
    found = jnp.take_along_axis(logits, words[0][:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
    return jnp.where(counted, found, 0).sum() / jnp.maximum(counted.sum(), 1)


def _write(folder: Path, llm, model: Kind, sizes: dict) -> None:
    """Fills the new folder."""
    programs = {
        "distil": distil_program(model, sizes["chunks"], sizes["demonstration_columns"]),
        "score": score_program(llm, sizes["num_vectors"], sizes["rows"], sizes["query_columns"]),
    }
    for name, program in programs.items():
        (folder / f"{name}.jax").write_bytes(bytes(program.serialize()))
    for name, params in (("distiller", model.params), ("llm", llm.params)):
        write_file({key: np.ascontiguousarray(a) for key, a in _flat(params).items()}, folder / f"{name}.safetensors")
    write_json(folder / "settings.json", sizes, indent=2)
    sub = ""
    if llm.tokenizer is not None:
        llm.tokenizer.save_pretrained(folder)
    if model.tokenizer is not None and _other(model.tokenizer, llm.tokenizer):
        model.tokenizer.save_pretrained(folder / "distiller")
        sub = "/distiller"
    write_text(folder / "README.md", CARD.format(version=jax.__version__, sub=sub))


def _other(one, other) -> bool:
    return other is None or json.dumps(one.get_vocab(), sort_keys=True) != json.dumps(other.get_vocab(), sort_keys=True)


def _exported(function, weights, *arguments) -> jax_export.Exported:
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in weights.items()}
    return jax_export.export(jax.jit(function), platforms=PLATFORMS)(shapes, *arguments)


def _ints(*shape: int):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _flat(params) -> dict:
    return flatten_dict(params, sep="/")
