"""Export to PyTorch: writes a trained model as files that need nothing from this project.

    python -m mend_jax.export --workdir=runs/mend --out=exported/mend

--backbone=FOLDER names the distiller's backbone (stage "lm": the LLM) if it has moved since training.

A distiller becomes a Hugging Face folder. Its backbone loads with `AutoModel.from_pretrained(folder)` (T5: `T5EncoderModel`).
Beside it are distiller.safetensors (`placeholders` (l, width), `projection.weight` (llm_width, width), `projection.bias`),
distiller_config.json, the tokenizer, a model card, mend_distiller.py (one PyTorch module) and release/: the layout of
MEND's public release. A stage "lm" run becomes a Hugging Face folder of its LLM, a soft prompt a file of its vectors.

mend_jax/interchange/trained.py reads all of these back and lists the release's parameter names.
"""

from mend_jax.cli.command_line import run
from mend_jax.interchange.export import export


def main(workdir: str, out: str, backbone: str = "") -> None:
    """The command."""
    print(export(workdir, out, backbone or None))


if __name__ == "__main__":
    run(main)
