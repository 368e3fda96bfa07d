#!/usr/bin/env bash
# A command of mend_jax as a SLURM job on GPUs. JAX gets addresses and process numbers from SLURM.
#
#   PARTITION=gpu NODES=2 GPUS=8 ./launch/slurm.sh train --config=configs/gpt2_xl.py:class_to_class --workdir=/shared/run
#
# Everything after the command's name is passed to it. Run it from the clone; all nodes must see the clone and the workdir.
# Settings: PARTITION, NODES (1), GPUS per node (8), TASK=gpu or node (gpu: one process per GPU, the default; node: one per
# node), TIME (24:00:00), CPUS per GPU (8), GRACE seconds before the end (300), SBATCH_ARGS (more flags of sbatch, separated by spaces),
# PYTHON, DRY_RUN=1 (print, do not run). Told to stop, by a preemption or because TIME is nearly over, the run saves and
# exits with 75; the job is then requeued and resumes. `scancel JOB` ends it for good.

set -euo pipefail
cd "${MEND_JAX_ROOT:-$(dirname "${BASH_SOURCE[0]}")/..}" # sbatch runs a copy of this script elsewhere
source launch/environment.sh

explain "$@"
[ $# -gt 0 ] || stop "name a command of mend_jax, such as: PARTITION=gpu $0 train --config=... --workdir=..."
known "$1"
nodes=${NODES:-1} gpus=${GPUS:-8} task=${TASK:-gpu}
for setting in "NODES=$nodes" "GPUS=$gpus" "CPUS=${CPUS:-8}" "GRACE=${GRACE:-300}"; do
    [[ $setting =~ =[1-9][0-9]*$ ]] || stop "$setting is not a whole number of at least 1: set it to one."
done
case $task in
gpu) tasks=$gpus devices='' ;;
node) tasks=1 devices=$(seq -s, 0 $((gpus - 1))) ;; # JAX would give a task only one GPU
*) stop "TASK=$task is unknown: set it to gpu (one process per GPU) or node (one per node)." ;;
esac

# If a task dies, the others are ended after --wait seconds; not at once, because a stopped run's tasks all exit with 75.
cpus=$((${CPUS:-8} * gpus / tasks))
step=(srun "--nodes=$nodes" "--ntasks-per-node=$tasks" "--cpus-per-task=$cpus" --gpu-bind=none --kill-on-bad-exit=0 --wait=60 --label)
command=("$(project_python)" -m "mend_jax.$1" "${@:2}")
if [ -z "${SLURM_JOB_ID:-}" ]; then
    need PARTITION "name the SLURM partition with the GPUs (sinfo lists them)."
    program sbatch "run this where jobs are submitted, on a login node of the SLURM cluster."
    run mkdir -p logs
    read -ra more <<<"${SBATCH_ARGS:-}"
    export MEND_JAX_ROOT=$PWD NODES=$nodes GPUS=$gpus TASK=$task
    run sbatch "--job-name=mend_jax.$1" "--partition=$PARTITION" "--nodes=$nodes" "--ntasks-per-node=$tasks" \
        "--gpus-per-node=$gpus" "--cpus-per-task=$cpus" "--time=${TIME:-24:00:00}" \
        "--signal=TERM@${GRACE:-300}" --requeue --open-mode=append "--output=logs/%x-%j.txt" --export=ALL \
        ${more[@]+"${more[@]}"} launch/slurm.sh "$@"
    [ -n "${DRY_RUN:-}" ] || exit 0
fi

# `scancel` sends SIGTERM too, but must not requeue. (A SLURM without JSON cannot tell: then a second scancel ends the job.)
is_cancelled() { scontrol --json show job "$SLURM_JOB_ID" 2>/dev/null | grep '"CANCELLED"' >/dev/null; }

# In the job (and, in a dry run, what the job would do).
if [ -n "$devices" ]; then step=(env "JAX_LOCAL_DEVICE_IDS=$devices" "${step[@]}"); fi
trap : TERM # the step's own processes get the signal; this shell waits for their exit code
code=0
run "${step[@]}" "${command[@]}" || code=$?
if [ -n "${DRY_RUN:-}" ]; then
    echo "# and, when that ends with 75 in a job that was not cancelled:"
    run scontrol requeue "${SLURM_JOB_ID:-JOB}"
elif [ "$code" -eq 75 ] && ! is_cancelled; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
