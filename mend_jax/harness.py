"""Tasks of lm-evaluation-harness, with the few-shot examples as vectors, or as a plain prompt to compare with.

    python -m mend_jax.harness --llm=gpt2-large --distiller=runs/mend/finetune --tasks=sst2,boolq --num_fewshot=16
    python -m mend_jax.harness --llm=gpt2-large --tasks=sst2,boolq --num_fewshot=16       # the plain prompt

Needs lm-evaluation-harness: `pip install -e ".[harness]"`. --include_path=FOLDER has tasks of your own (the harness's YAML files).
"""

from typing import Literal

from mend_jax.cli.command_line import run
from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES
from mend_jax.interchange.trained import llm_for, load_both
from mend_jax.llm.decoder_only import load_llm
from mend_jax.packs.queries import require_writable
from mend_jax.run.files import write_report


def harness(
    tasks: str,
    llm: str = "",
    distiller: str = "",
    num_fewshot: int = 16,
    include_path: str = "",
    limit: int = 0,
    out: str = "",
    dtype: Literal[*CHOICES["llm.dtype"]] = "float32",
    weights: Literal[*CHOICES["llm.weights"]] = "full",
    batch_size: int = 8,
    seed: int = 1234,
) -> None:
    """Prints the harness's table.

    Args:
        tasks: names of tasks, with commas between.
        llm: the LLM: a folder, hub name or GGUF file. A training workdir knows its own, and so do some exported distillers.
        distiller: a training workdir, an exported folder, or smollm2-135m-instruct, of this package; "": the examples stay in the prompt.
        num_fewshot: few-shot examples of each question.
        include_path: a folder of tasks of your own.
        limit: questions of each task; 0 is all.
        out: a JSON file for the results.
        dtype: of the arithmetic.
        weights: the LLM's: "full", or "int8": 8 bits.
        batch_size: questions in one pass.
        seed: that the examples are drawn with.
    """
    try:
        from lm_eval.utils import make_table

        from mend_jax.interchange.harness import evaluate_harness
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness cannot be imported ({error}): pip install lm_eval.") from None
    if out:
        require_writable(out)
    named, model = llm_for(distiller, llm), None
    if distiller:
        reader, model = load_both(distiller, named, dtype, weights)
    else:
        reader = load_llm(named, dtype, weights=weights)
    names = [name for name in map(str.strip, tasks.split(",")) if name]
    options = {"num_fewshot": num_fewshot, "limit": limit or None, "fewshot_random_seed": seed, "bootstrap_iters": 0}
    found = evaluate_harness(reader, names, model, include_path or None, batch_size, **options)
    print(make_table(found))
    if out:
        write_report(out, {name: found[name] for name in ("results", "configs", "n-samples") if name in found})


if __name__ == "__main__":
    run(harness)
