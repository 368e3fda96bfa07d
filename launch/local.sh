#!/usr/bin/env bash
# A command of mend_jax as several processes on this machine, connected by JAX's distributed runtime.
#
#   PROCESSES=2 ./launch/local.sh train --config=configs/small_world.py:pretrain --workdir=runs/pretrain
#
# Everything after the command's name is passed to it. Settings: PROCESSES (without it one per GPU), PORT (a free one),
# PYTHON, DRY_RUN=1 (print, do not run). SIGTERM and Ctrl-C make all of them save and exit with 75; if one dies, the
# others are ended too. The same command, with any number of processes that divides the batch, resumes.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
source launch/environment.sh

explain "$@"
[ $# -gt 0 ] || stop "name a command of mend_jax, such as: PROCESSES=2 $0 train --config=... --workdir=..."
known "$1"
python=$(project_python)
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
[ "$gpus" -gt 0 ] || need PROCESSES "this machine has no GPUs to count, so say how many processes to start."
processes=${PROCESSES:-$((gpus))}
[[ $processes =~ ^[1-9][0-9]*$ ]] || stop "PROCESSES=$processes is not a number of processes: set it to 1 or more."
free_port='import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
port=${PORT:-$("$python" -c "$free_port")} || stop "$python does not run: name an interpreter with PYTHON=..."

pids=()
for ((i = 0; i < processes; i++)); do
    settings=("JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$i")
    if [ "$gpus" -gt 0 ]; then settings+=("JAX_LOCAL_DEVICE_IDS=$((i % gpus))"); fi
    command=(env "${settings[@]}" "$python" -m "mend_jax.$1" "${@:2}")
    if [ -n "${DRY_RUN:-}" ]; then
        run "${command[@]}"
    else
        "${command[@]}" &
        pids+=($!)
    fi
done
[ -z "${DRY_RUN:-}" ] || exit 0

# The script exits with the code of the first process that fails. The others may then wait for it: they get GRACE seconds.
GRACE=15 code=0 until=''
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
while [ ${#pids[@]} -gt 0 ]; do
    alive=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            alive+=("$pid")
            continue
        fi
        wait "$pid"
        ended=$?
        if [ "$code" -eq 0 ]; then code=$ended; fi
        if [ "$ended" -gt 128 ]; then until=$SECONDS; elif [ "$ended" -ne 0 ]; then until=${until:-$((SECONDS + GRACE))}; fi
    done
    pids=(${alive[@]+"${alive[@]}"})
    if [ -n "$until" ] && [ "$SECONDS" -ge "$until" ] && [ ${#pids[@]} -gt 0 ]; then
        kill -KILL "${pids[@]}" 2>/dev/null
    fi
    sleep 0.2 &
    wait $! # `sleep` alone would delay the answer to a signal
done
exit "$code"
