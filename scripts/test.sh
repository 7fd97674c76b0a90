#!/usr/bin/env bash
# The tests. Options go to pytest: bash scripts/test.sh -k relation
set -euo pipefail
REQUIREMENTS=requirements-dev.txt
. "$(dirname "$0")/env.sh"

python -m pytest "$@"
