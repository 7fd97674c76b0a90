#!/usr/bin/env bash
# What CI runs: lint, format, types, all tests. Options are passed on to pytest.
set -euo pipefail
REQUIREMENTS=requirements-dev.txt
. "$(dirname "$0")/env.sh"

ruff check .
ruff format --check .
mypy
bash scripts/test.sh --all "$@"
