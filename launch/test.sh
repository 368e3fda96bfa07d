#!/usr/bin/env bash
# Makes the environment, with what the tests need (PyTorch for CPU), and runs them.
#
#   ./launch/test.sh                       # all
#   ./launch/test.sh tests/test_cli.py -x  # arguments go on to pytest

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
explain "$@"

install requirements-test.txt
echo "== running the tests, two at a time"
exec python -m pytest -n 2 --dist=loadfile "$@"
