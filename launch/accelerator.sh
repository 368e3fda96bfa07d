#!/usr/bin/env bash
# Measures in at most nine minutes, on a machine with an H100 or H200, what no other can: the public release's values and
# bfloat16 there, train steps of large LLMs beside PyTorch, scoring at the paper's lengths, MEND for SmolLM2-135M.
#
#   TEXT=C4 TASKS=METAICL ./launch/accelerator.sh pack   # first, where there is a network: what must travel, in bundles
#   ./launch/accelerator.sh                              # then there; flags are passed on: --only=golden,mend --minutes=5 --out=FOLDER
#   ./launch/accelerator.sh --dry_run                    # anywhere: every part at a tiny size, on a CPU
#
# The machine needs no network, but Python 3.12 with JAX 0.11, optax, orbax, transformers, PyTorch and pytest; the other packages
# are wheels in the bundles, which only Python 3.12 uses. Bundles may come one after another: each call joins and unpacks what
# is there. The same call again runs only what has not been done. Results: results.md and results.json in
# runs/accelerator/results.
# Settings: BUNDLES, the bundles' folder (runs/accelerator/bundles); WHEELS, another folder of wheels; PYTHON;
# for pack: TEXT, a folder of C4's files; TASKS, of MetaICL's; FILES, how many of C4's (3).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
explain "$@"
shopt -s nullglob

work=runs/accelerator
bundles=${BUNDLES:-$work/bundles}
python=$(project_python)

# packages: prints what the machine's Python lacks or has too old, as requirements.txt bounds it for Python 3.12.
packages() {
    sed -nE '/python_version < /d; s/;.*//; /^(array-record|flax|grain|ml-collections|tensorboardX)[~=]/p' requirements.txt
    sed -nE '/^gguf[~=]/p' requirements-test.txt
    echo portpicker # of grain
}

pack() {
    need TEXT "name a folder of C4's *.json.gz files."
    need TASKS "name a folder of MetaICL's files."
    local wheels=$bundles/1/wheels platforms=()
    for version in 2_28 2_27 2_24 2_17 2014; do
        if [ "$version" = 2014 ]; then platforms+=(--platform manylinux2014_x86_64); else platforms+=(--platform "manylinux_${version}_x86_64"); fi
    done
    rm -rf "$wheels.new"
    mapfile -t wanted < <(packages)
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" --dest "$wheels.new" "${wanted[@]}" ||
        stop "pip could not download the wheels: see its message above, then run the same command again."
    rm -rf "$wheels"
    mv "$wheels.new" "$wheels"
    exec "$python" -m mend_jax.measure.accelerator_pack "--out=$bundles" "--text=$TEXT" "--tasks=$TASKS" "--files=${FILES:-3}"
}

# use_wheels FILE...: installs them in a folder that Python looks into first, if that was not done before.
use_wheels() {
    local site=$work/site stamp
    stamp=$(printf '%s\n' "$@" | cksum)
    if [ "$(cat "$site/stamp" 2>/dev/null)" != "$stamp" ]; then
        rm -rf "$site"
        "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" "$@" ||
            stop "pip could not install the wheels of $bundles: see its message above."
        printf '%s' "$stamp" >"$site/stamp"
    fi
    export PYTHONPATH="$PWD/$site${PYTHONPATH:+:$PYTHONPATH}"
}

# join_parts FILE PART...: FILE of its parts, NAME.part1of2 and so on, once all are there.
join_parts() {
    local target=$1 count=${2##*of}
    shift
    if [ $# -ne "$count" ]; then
        echo "== $# of $count parts of $target are here" >&2
    elif [ ! "$target" -nt "$1" ]; then
        cat "$@" >"$target.new"
        mv "$target.new" "$target"
    fi
}

if [ "${1:-}" = pack ]; then pack; fi

mkdir -p "$work"
wheels=("${WHEELS:-$bundles/1/wheels}"/*.whl)
if [ ${#wheels[@]} -gt 0 ] && "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then use_wheels "${wheels[@]}"; fi
parts=("$bundles"/*/model.gguf.part*of*)
if [ ${#parts[@]} -gt 0 ]; then join_parts "$work/model.gguf" "${parts[@]}"; fi
for data in "$bundles"/*/data.tar.gz; do
    if [ ! "$work/data" -nt "$data" ]; then
        rm -rf "$work/data" "$work/data.new"
        mkdir "$work/data.new"
        tar -xzf "$data" -C "$work/data.new"
        touch "$work/data.new/data"
        mv "$work/data.new/data" "$work/data"
        rmdir "$work/data.new"
    fi
done

export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/$work/compiled}" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export HF_HUB_OFFLINE=1
exec "$python" -m mend_jax.measure.accelerator "--workdir=$work" "$@"
