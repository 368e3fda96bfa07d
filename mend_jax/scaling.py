"""The command `scaling`: what a config's train step needs on a mesh, compiled but not run (measure/scaling.py)."""

from mend_jax.cli.command_line import run
from mend_jax.measure.scaling import scaling

if __name__ == "__main__":
    run(scaling)
