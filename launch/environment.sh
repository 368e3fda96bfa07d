# shellcheck shell=bash
# Sourced by the other scripts: the project's own environment, .venv, with the packages of one requirements file.
# Settings: PYTHON (the interpreter), VENV (the environment's folder), JAX_EXTRA (cuda13 or tpu); and, for the scripts
# that start several processes, DRY_RUN=1, which prints what they would run.

stop() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# need NAME SENTENCE: stops with the sentence if the setting NAME is missing.
need() {
    [ -n "${!1:-}" ] || stop "$1 is not set: $2"
}

# explain "$@": for --help, prints the script's head and exits.
explain() {
    case ${1:-} in
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "launch/${0##*/}"
        exit
        ;;
    esac
}

# known COMMAND: stops if mend_jax has no command of this name.
known() {
    [ -f "mend_jax/${1//.//}.py" ] || stop "mend_jax has no command \"$1\": name train, evaluate or experiments.methods, followed by its flags."
}

# program NAME SENTENCE: stops with the sentence if the program is missing, unless it would only be printed.
program() {
    [ -n "${DRY_RUN:-}" ] || command -v "$1" >/dev/null || stop "$1 is not there: $2"
}

# run COMMAND...: runs it; with DRY_RUN=1 prints it instead, in a form that a shell can run.
run() {
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "$@" | sed 's/ $//'
        echo
    else
        "$@"
    fi
}

# project_python: prints the interpreter to run with: PYTHON, that of the project's environment, or python3.
project_python() {
    local venv=${VENV:-.venv}
    if [ -n "${PYTHON:-}" ]; then
        printf '%s' "$PYTHON"
    elif [ -x "$venv/bin/python" ]; then
        printf '%s' "$venv/bin/python"
    else
        printf 'python3'
    fi
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    stop "Python 3.11 or 3.12 is needed, but there is none here: install one (for a TPU: in SETUP), or name it with PYTHON=/path/to/python3.12."
}

# install FILE: makes the environment if there is none, and installs FILE's packages into it if that was not done before.
install() {
    local venv=${VENV:-.venv} python stamp wanted
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        python=$(find_python)
        echo "== making the environment $venv with $("$python" --version)"
        if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
            stop "$venv exists but is not a Python environment: remove it, or name another folder with VENV=..."
        fi
        "$python" -m venv --clear "$venv" ||
            stop "$python cannot make an environment (on Debian and Ubuntu: apt install python3-venv)."
    fi
    stamp=$venv/installed-${1%.txt}
    wanted=$(cat requirements.txt "$1" | cksum)${JAX_EXTRA:-}
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "== installing into $venv what it lacks of $1: some minutes the first time, seconds if all is there"
        # shellcheck disable=SC2046  # cpu_torch_index prints two words or none
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $(cpu_torch_index "$1" "$venv") \
            -r "$1" ${JAX_EXTRA:+"jax[$JAX_EXTRA]"} ||
            stop "pip could not install $1: see its message above, then run the same command again."
        printf '%s' "$wanted" >"$stamp"
    fi
    PATH=$(cd "$venv/bin" && pwd):$PATH
    # Linux: large arrays in huge pages make a train step on a CPU a tenth faster (docs/benchmarks.md).
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
    # Compiled programs are kept, so that the second start takes seconds.
    export PATH JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"
    export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
}

# cpu_torch_index FILE VENV: prints pip's flags for a torch without the gigabytes of CUDA that PyPI's brings on Linux.
cpu_torch_index() {
    local index=https://download.pytorch.org/whl/cpu
    if ! grep -q '^torch' "$1" || [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then
        return
    fi
    if answers "$2/bin/python" "$index/torch/"; then
        echo "--extra-index-url $index"
    else
        echo "== $index does not answer: PyTorch will come from pip's own index, maybe with gigabytes of CUDA" >&2
    fi
}

# answers PYTHON URL: whether the page exists. A server that cannot be reached is tried once, for at most five seconds;
# one that is slow or has an error of its own gets more time and another try.
answers() {
    "$1" - "$2" 2>/dev/null <<'END'
import sys, time, urllib.error, urllib.request

for seconds in (5, 20, 20):
    try:
        urllib.request.urlopen(sys.argv[1], timeout=seconds).read(1)
        sys.exit(0)
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code != 429:
            break
        time.sleep(1)
    except urllib.error.URLError as error:
        if "handshake" not in str(error.reason):
            break
    except OSError:
        pass
sys.exit(1)
END
}
