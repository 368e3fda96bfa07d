"""`python -m mend_jax` lists the commands."""

from pathlib import Path

COMMANDS = (
    "experiments.methods", "experiments.report", "experiments.merge", "prepare", "train", "evaluate", "compare",
    "distill", "inspect", "predict", "generate", "fidelity", "serve", "harness", "export", "benchmark", "scaling",
)  # fmt: skip


def described(name: str) -> str:
    """The first sentence of a command's docstring, which is read without importing what the command needs."""
    text = (Path(__file__).parent / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    return text.removeprefix('"""').partition("\n\n")[0].replace("\n", " ").removesuffix('"""')


def main() -> None:
    print("Commands, each with --help: python -m mend_jax.NAME\n")
    for name in COMMANDS:
        print(f"    {name:20} {described(name)}")
    print("\nThe paper's other tables and figures are python -m mend_jax.experiments.NAME: docs/experiments.md.")


if __name__ == "__main__":
    main()
