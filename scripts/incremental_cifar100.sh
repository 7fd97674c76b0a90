#!/usr/bin/env bash
# Class-incremental learning on CIFAR-100, ten tasks of ten classes, ResNet-32, the published schedule. Not run yet: it needs
# a GPU. Options are passed on: bash scripts/incremental_cifar100.sh --method abd --class_seed 1
set -euo pipefail
. "$(dirname "$0")/env.sh"

python datafree_incremental.py --config configs/cifar100/incremental_resnet32_b0_10.yaml "$@"
