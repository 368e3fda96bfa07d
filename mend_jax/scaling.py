"""The command `scaling`: what the train step of a config file needs on a mesh, compiled and not run (measure/scaling.py)."""

from mend_jax.cli.command_line import run
from mend_jax.measure.scaling import scaling

if __name__ == "__main__":
    run(scaling)
