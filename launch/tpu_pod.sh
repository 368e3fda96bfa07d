#!/usr/bin/env bash
# A command of mend_jax on a TPU pod slice: requests the slice (a queued resource), installs this clone and its packages on
# every worker, and runs the command on all of them. JAX gets addresses and process numbers from the TPU's metadata.
#
#   TPU=mend ZONE=us-central2-b ACCELERATOR=v4-32 VERSION=tpu-ubuntu2204-base SETUP="$(cat setup.sh)" \
#       ./launch/tpu_pod.sh train --config=configs/gpt2_xl.py:class_to_class --workdir=/shared/run
#
# Everything after the command's name is passed to it. Settings: TPU (a name), ZONE, ACCELERATOR, VERSION of the TPU software
# (v2-alpha-tpuv6e, v2-alpha-tpuv5, v2-alpha-tpuv5-lite; before v5 tpu-ubuntu2204-base), SETUP (commands for every worker,
# below), SPOT=1 (cheap, may be taken away), PROJECT, DRY_RUN=1 (print, do not run). The slice remains after the command has
# ended; delete it with gcloud compute tpus queued-resources delete TPU --zone=ZONE --force. A run that was told to stop
# (75), or whose slice was taken away, is started again, on a new slice if necessary, and resumes.
#
# SETUP runs before every start. It mounts the folder that all workers share, where workdirs must be, and installs Python
# 3.11 or 3.12 if the TPU software has neither (that of Ubuntu 22.04 has 3.10), for example
#
#   mountpoint -q /shared || sudo mount 10.0.0.2:/shared /shared
#   command -v python3.12 || { sudo add-apt-repository -y ppa:deadsnakes/ppa && sudo apt-get install -y python3.12-venv; }

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

explain "$@"
[ $# -gt 0 ] || stop "name a command of mend_jax, such as: TPU=mend ZONE=... $0 train --config=... --workdir=..."
known "$1"
need TPU "name the slice, new or one that this script made."
need ZONE "name the zone (gcloud compute tpus locations list)."
need ACCELERATOR "name the type of slice, such as v4-32."
need VERSION "name the TPU software (gcloud compute tpus tpu-vm versions list --zone=$ZONE), such as tpu-ubuntu2204-base."
program gcloud "install the Google Cloud SDK (https://cloud.google.com/sdk), then gcloud auth login."
POLL=${POLL:-30} # seconds between status queries
where=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet)
code_file=${TMPDIR:-/tmp}/mend_jax-$TPU.tar.gz

state() { gcloud compute tpus queued-resources describe "$TPU" "${where[@]}" '--format=value(state.state)' 2>/dev/null || true; }
ssh_all() { run gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker=all "--command=$1"; }

ask_for_slice() {
    run gcloud compute tpus queued-resources create "$TPU" "--node-id=$TPU" "${where[@]}" \
        "--accelerator-type=$ACCELERATOR" "--runtime-version=$VERSION" ${SPOT:+--spot}
}

# Returns when the slice is ready; requests it again if it was taken away.
wait_for_slice() {
    local now
    while now=$(state) && [ "$now" != ACTIVE ]; do
        case $now in
        '') ask_for_slice || stop "the slice $TPU cannot be requested: see gcloud's message above." ;;
        SUSPENDING | SUSPENDED) gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force || true ;;
        FAILED) stop "the slice $TPU failed: gcloud compute tpus queued-resources describe $TPU --zone=$ZONE says why." ;;
        *) echo "== $TPU: $now" ;;
        esac
        sleep "$POLL"
    done
}

# Runs SETUP and installs the clone's committed files and the packages on every worker, in ~/mend_jax.
install_all() {
    run git archive --format=tar.gz "--output=$code_file" HEAD &&
        run gcloud compute tpus tpu-vm scp "$code_file" "$TPU:mend_jax.tar.gz" "${where[@]}" --worker=all &&
        ssh_all "set -e; ${SETUP:-true}; mkdir -p mend_jax; tar -xzf mend_jax.tar.gz -C mend_jax; cd mend_jax; source launch/environment.sh; JAX_EXTRA=tpu install requirements.txt"
}

words=$(printf '%q ' -m "mend_jax.$1" "${@:2}")
command="cd mend_jax && exec .venv/bin/python ${words% }"
if [ -n "${DRY_RUN:-}" ]; then
    ask_for_slice
    install_all
    ssh_all "$command"
    exit
fi
while :; do
    wait_for_slice
    code=0
    { install_all && ssh_all "$command"; } || code=$?
    if [ "$code" -eq 0 ]; then exit 0; fi
    if [ "$code" -eq 255 ]; then sleep "$POLL"; fi # ssh failed: the status of a slice that is taken away changes a little later
    if [ "$code" -ne 75 ] && [ "$(state)" = ACTIVE ]; then
        stop "the command ended with $code on $TPU, which stays: see its messages above."
    fi
    echo "== $TPU: told to stop or taken away; resuming"
    sleep "$POLL"
done
