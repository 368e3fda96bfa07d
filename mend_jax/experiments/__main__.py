"""The names of the experiments: `python -m mend_jax.experiments`."""

from pathlib import Path

from mend_jax.experiments import all as every

if __name__ == "__main__":
    names = [table.EXPERIMENT.name for table in every.TABLES] + [Path(one.__file__).stem for one in every.OF_DECODERS]
    print(
        f"python -m mend_jax.experiments.NAME --config=... --workdir=..., NAME one of {', '.join(names)}, all, methods, report, merge."
    )
