#!/usr/bin/env bash
# The quick tests, or with --all also those that run whole scripts or compilers. Options are passed on to pytest:
#     bash scripts/test.sh -k relation
set -euo pipefail
REQUIREMENTS=requirements-dev.txt
. "$(dirname "$0")/env.sh"

[ "${1:-}" != --all ] || set -- -m "" "${@:2}"
python -m pytest --numprocesses auto --maxprocesses 4 "$@"
