"""Out to PyTorch: a trained model as files that need nothing of this project, or a GGUF file as a Hugging Face folder.

    python -m mend_jax.export --workdir=runs/mend --out=exported/mend
    python -m mend_jax.export --workdir=runs/mend --out=exported/mend --weights=int8 --llm=gpt2-large
    python -m mend_jax.export --workdir=exported/mend --out=exported/float32
    python -m mend_jax.export --llm=model.gguf --out=exported/model
    python -m mend_jax.export --pack=reviews.pack.safetensors --out=exported/reviews
    python -m mend_jax.export --workdir=runs/mend --format=jax --out=exported/jax

--backbone=FOLDER names the distiller's backbone (stage "lm": the LLM) if it has moved since training. --workdir also takes an
exported folder, the name of a distiller of this package, or (with --backbone) the public release's file, and writes it again.

A distiller becomes a Hugging Face folder. Its backbone loads with `AutoModel.from_pretrained(folder)` (T5: `T5EncoderModel`).
Beside it are distiller.safetensors (`placeholders` (l, width), `projection.weight` (llm_width, width), `projection.bias`),
distiller_config.json, the tokenizer, a model card, mend_distiller.py (one PyTorch module) and release/: the layout of
MEND's public release. A stage "lm" run becomes a Hugging Face folder of its LLM, a soft prompt a file of its vectors, a pack
of vectors an adapter of PEFT (mend_jax/packs/adapter.py). With --format=jax a distiller and its LLM become two programs of
`jax.export` with their weights (mend_jax/interchange/jax_export.py).
checksums.json lists the files that decide what is read from a folder: one that has changed is refused.

mend_jax/interchange/trained.py reads all of these back and lists the release's parameter names.
"""

import inspect
import sys
from typing import Literal

from mend_jax.cli.command_line import run
from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES
from mend_jax.interchange.export import export, export_llm, new_folder
from mend_jax.interchange.jax_export import export_jax
from mend_jax.packs.adapter import export_pack
from mend_jax.prefixes.stored_weights import DTYPES


def main(
    out: str,
    workdir: str = "",
    backbone: str = "",
    llm: str = "",
    pack: str = "",
    weights: Literal[*DTYPES] = "float32",
    format: Literal["pytorch", "jax"] = "pytorch",
    chunks: int = 0,
    dtype: Literal[*CHOICES["llm.dtype"]] = "float32",
    rows: int = 8,
    query_columns: int = 128,
) -> None:
    """The command.

    Args:
        out: the folder to write: one that is not there yet, or is empty.
        workdir: the folder of a training, of any stage; its best checkpoint is taken. Or an exported folder, or the name of a
            distiller in this package.
        backbone: the Hugging Face folder of the distiller's backbone (stage "lm": of the LLM), where it has moved.
        llm: a GGUF file or packaged model, in the place of a workdir: it becomes a Hugging Face folder.
            With --format=jax the LLM of an exported distiller. Beside --workdir: the name under which others have the LLM. Beside
            --pack: where its LLM is, if not where the pack says.
        pack: a pack of vectors, in the place of a workdir: it becomes an adapter of PEFT.
        weights: of a distiller's backbone: "float32", "bfloat16", or "int8", 8 bits with a scale for each row.
        format: "pytorch", or "jax": programs that need none of our code.
        chunks: of a distiller of chunks with --format=jax: how many its program reads at most; 0: 16.
        dtype: with --format=jax: of the weights and of the arithmetic.
        rows: with --format=jax: how many options one call scores at most.
        query_columns: with --format=jax: how many tokens a query with an option has at most.
    """
    sizes = {"chunks": chunks, "dtype": dtype, "rows": rows, "query_columns": query_columns}
    if format == "jax":
        if not workdir or pack or backbone or weights != "float32":
            raise UserError(
                "--format=jax takes --workdir, a training or an exported distiller, and where needed --llm."
            )
        print(export_jax(workdir, out, llm, **sizes))
        return
    for name, value in sizes.items():
        if value != inspect.signature(main).parameters[name].default:
            raise UserError(f"--{name}={value} is for --format=jax: leave it out.")
    if sum(map(bool, (workdir, llm and not (workdir or pack), pack))) != 1:
        raise UserError(
            "Give one of --workdir, the folder of a training, --llm, a GGUF file, and --pack, a pack of vectors."
        )
    if workdir:
        print(export(workdir, out, backbone or None, weights, llm))
    elif weights != "float32" or backbone:
        given = f"--backbone={backbone}" if backbone else f"--weights={weights}"
        raise UserError(f"{given} is for the distiller of a --workdir: leave it out.")
    elif pack:
        print(export_pack(pack, out, llm))
    else:
        new_folder(out)  # before a sentence that sounds as if it were written
        print(f"Reading {llm} and writing its weights in 32 bits ...", file=sys.stderr, flush=True)
        print(export_llm(llm, out))


if __name__ == "__main__":
    run(main)
