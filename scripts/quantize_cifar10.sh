#!/usr/bin/env bash
# RGAL in GDFQ, CIFAR-10, ResNet-20 at W4A4, the published schedule of GDFQ.
# Options are passed on: bash scripts/quantize_cifar10.sh --w_bits 3 --a_bits 3 --teacher_weights resnet20.th
set -euo pipefail
. "$(dirname "$0")/env.sh"

python datafree_quantize.py --config configs/cifar10/quantize_cifar_resnet20_w4a4.yaml "$@"
