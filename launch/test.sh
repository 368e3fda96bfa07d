#!/usr/bin/env bash
# Makes the environment, with all that the tests need (PyTorch for CPU), and runs the tests.
#
#   ./launch/test.sh                       # all
#   ./launch/test.sh quick                 # after each change: without the tests marked slow
#   ./launch/test.sh attack                # an hour of odd input, damaged files and kills (docs/reliability.md)
#   ./launch/test.sh tests/test_cli.py -x  # arguments are passed to pytest, also after "quick"

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
explain "$@"
if [ "${1:-}" = quick ]; then
    shift
    set -- -m "not slow" "$@"
fi

if [ "${1:-}" = attack ]; then
    shift
    export MEND_ATTACK=1
    set -- tests/attack "$@"
fi

install requirements-test.txt
echo "== running the tests, two at a time"
exec python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder "$@" # in the order of tests/conftest.py
