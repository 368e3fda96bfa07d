#!/usr/bin/env bash
# Makes the environment, with what the tests need (PyTorch for CPU), and runs them.
#
#   ./launch/test.sh                       # all
#   ./launch/test.sh quick                 # after each change: without the tests that are marked slow
#   ./launch/test.sh tests/test_cli.py -x  # arguments go on to pytest, behind "quick" too

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
explain "$@"
if [ "${1:-}" = quick ]; then
    shift
    set -- -m "not slow" "$@"
fi

install requirements-test.txt
echo "== running the tests, two at a time"
exec python -m pytest -n 2 --dist=loadfile "$@"
