#!/usr/bin/env bash
# A command of mend_jax as a JobSet (https://jobset.sigs.k8s.io) on Kubernetes: one pod per node, with all its GPUs.
#
#   NAME=mend IMAGE=registry/mend-jax:1 CLAIM=shared NODES=2 GPUS=8 \
#       ./launch/kubernetes.sh train --config=configs/gpt2_xl.py:class_to_class --workdir=/shared/run
#
# Everything after the command's name is passed to it. The cluster needs JobSet 0.6 or newer. IMAGE holds this project,
# installed, with the working directory in its clone. CLAIM is a persistent volume claim that all pods can write
# (ReadWriteMany); it appears as /shared. Settings: NAME, IMAGE, CLAIM, NODES (1), GPUS per node (8), RESOURCE
# (nvidia.com/gpu; google.com/tpu on GKE), SELECTOR=KEY=VALUE,... (labels of the nodes), GRACE seconds to save in (300),
# RESTARTS after crashes (5), DRY_RUN=1 (print the manifest).
# A pod that is told to stop saves and exits with 75: the JobSet is then restarted, as often as that happens, and resumes.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

explain "$@"
[ $# -gt 0 ] || stop "name a command of mend_jax, such as: NAME=mend IMAGE=... CLAIM=... $0 train --config=... --workdir=..."
known "$1"
need NAME "name the JobSet; kubectl delete jobset NAME ends it."
need IMAGE "name the container image with this project in it."
need CLAIM "name the persistent volume claim for data and workdir."
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || stop "NAME=$NAME is not a name for a JobSet: use at most 40 of a-z, 0-9 and -."
[[ ${SELECTOR:-a=b} =~ ^[^=,]+=[^=,]+(,[^=,]+=[^=,]+)*$ ]] ||
    stop "SELECTOR=$SELECTOR is not KEY=VALUE,KEY=VALUE: give labels of the nodes."
for setting in "NODES=${NODES:-1}" "GPUS=${GPUS:-8}" "GRACE=${GRACE:-300}" "RESTARTS=${RESTARTS:-5}"; do
    [[ $setting =~ =[1-9][0-9]*$ ]] || stop "$setting is not a whole number of at least 1: set it to one."
done

# The template's words in capitals are replaced by the settings; JSON strings are YAML too, so any argument passes unchanged.
# shellcheck disable=SC2016 # it is Python's, not the shell's
fill='
import json, os, sys
values = {
    "NAME": os.environ["NAME"], "IMAGE": os.environ["IMAGE"], "CLAIM": os.environ["CLAIM"],
    "NODES": int(os.environ.get("NODES") or 1), "GPUS": int(os.environ.get("GPUS") or 8),
    "RESOURCE": os.environ.get("RESOURCE") or "nvidia.com/gpu", "GRACE": int(os.environ.get("GRACE") or 300),
    "RESTARTS": int(os.environ.get("RESTARTS") or 5),
    "COORDINATOR": "{0}-workers-0-0.{0}:1234".format(os.environ["NAME"]),
    "SELECTOR": dict(pair.split("=") for pair in os.environ.get("SELECTOR", "").split(",") if pair),
    "COMMAND": ["python", "-m", "mend_jax." + sys.argv[1]],
    "ARGUMENTS": [argument.replace("$(", "$$(") for argument in sys.argv[2:]],  # else Kubernetes would expand variables
}
text = open("launch/jobset.yaml").read()
for name, value in values.items():
    text = text.replace("{{" + name + "}}", json.dumps(value)).replace("{{" + name + "_TEXT}}", json.dumps(str(value)))
print("".join(line for line in text.splitlines(True) if not line.lstrip().startswith("#")), end="")
'
manifest=$("$(project_python)" -c "$fill" "$@")
if [ -n "${DRY_RUN:-}" ]; then
    printf '# kubectl apply -f -\n%s\n' "$manifest"
else
    program kubectl "install it, and let it know your cluster."
    kubectl apply -f - <<<"$manifest"
fi
