#!/usr/bin/env bash
# From a fresh clone to a table of methods, on any machine: makes the environment, then trains MEND on the small world
# that the package carries and compares it with zero-shot and in-context learning. Only the packages are downloaded.
#
#   ./launch/quickstart.sh                        # arguments are passed to mend_jax.experiments.methods
#   JAX_EXTRA=cuda13 ./launch/quickstart.sh       # with JAX for NVIDIA GPUs; JAX_EXTRA=tpu for TPUs

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
explain "$@"

workdir=runs/quickstart
install requirements.txt
cat <<END
== training and evaluating in $workdir: two trainings and an evaluation, five minutes on two quiet cores, longer on busy ones; if stopped, the same command resumes
The table at the end will be in $workdir/evaluation/table.md too, every prediction in $workdir/evaluation/predictions/.
The runs: $workdir/mend/pretrain/ and $workdir/mend/finetune/: metrics.jsonl, config.json, params.txt, checkpoints, tensorboard.
All five methods: .venv/bin/python -m mend_jax.experiments.methods --config=configs/small_world.py:full --workdir=runs/full
Your own text, tasks and LLM: docs/data.md.
END
# In the shell's place, so that a signal reaches the training, which then saves and exits with 75.
exec python -m mend_jax.experiments.methods --config=configs/small_world.py:quick --workdir="$workdir" "$@"
