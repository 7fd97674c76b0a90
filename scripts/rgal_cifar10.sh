#!/usr/bin/env bash
# RGAL, CIFAR-10, WRN-40-2 > WRN-16-1, the published schedule.
# Options are passed on: bash scripts/rgal_cifar10.sh --seed 1
set -euo pipefail
. "$(dirname "$0")/env.sh"

python datafree_kd.py --config configs/cifar10/rgal_wrn40_2_wrn16_1.yaml "$@"
