#!/usr/bin/env bash
# RGAL, CIFAR-100, WRN-40-2 > WRN-16-1, the published schedule.
# Options are passed on: bash scripts/rgal_cifar100.sh --seed 1
set -euo pipefail
. "$(dirname "$0")/env.sh"

python datafree_kd.py --config configs/cifar100/rgal_wrn40_2_wrn16_1.yaml "$@"
