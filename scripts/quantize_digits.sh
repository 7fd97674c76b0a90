#!/usr/bin/env bash
# A ResNet-8 for the digits that ship with the project, in 2 bits: with ranges from noise, with ranges from generated
# images, trained on them by GDFQ and by GDFQ with RGAL's triplets, and trained on the real images, which is the bound.
# Then in 8 bits, whose ranges alone are observed. Options apply to all: bash scripts/quantize_digits.sh --seed 1
set -euo pipefail
. "$(dirname "$0")/env.sh"

runs=runs/quantize-digits-$(date +%Y%m%d-%H%M%S)
python train_scratch.py --config configs/digits/teacher_resnet20.yaml --model resnet8 "$@" --save_dir "$runs"
teacher=$(echo "$runs"/digits_scratch_resnet8/*)
quantize() {
    python datafree_quantize.py --config configs/digits/quantize_resnet8.yaml --teacher_weights "$teacher" "$@" \
        --save_dir "$runs"
}
quantize "$@" --method noise --epochs 0
quantize "$@" --method gdfq --epochs 0 --log_tag ranges
quantize "$@" --method gdfq
quantize "$@" --method rgal
quantize "$@" --method real
quantize "$@" --method gdfq --epochs 0 --w_bits 8 --a_bits 8

echo
python -m datafree.report "$runs"
