#!/usr/bin/env bash
# A teacher for the digits that ship with the project, then three students with the same budget: on images that RGAL
# synthesises, on noise and on the real images. Options apply to all four runs: bash scripts/quickstart.sh --seed 1
set -euo pipefail

for word; do
    case ${word//-/_} in
        __save_dir* | __log_tag* | __dry_run* | __resume* | __run.*)
            echo "error: the quickstart names its own folders and runs to the end; remove $word" >&2; exit 2;;
    esac
done
. "$(dirname "$0")/env.sh"

runs=runs/quickstart-$(date +%Y%m%d-%H%M%S)
python train_scratch.py --config configs/digits/teacher_resnet20.yaml "$@" --save_dir "$runs"
teacher=$(echo "$runs"/digits_scratch_resnet20/*)
python datafree_kd.py --config configs/digits/rgal_resnet20_resnet8.yaml --teacher_weights "$teacher" "$@" \
    --save_dir "$runs"
python datafree_kd.py --config configs/digits/noise_resnet20_resnet8.yaml --teacher_weights "$teacher" "$@" \
    --save_dir "$runs"
python datafree_kd.py --config configs/digits/real_resnet20_resnet8.yaml --teacher_weights "$teacher" "$@" \
    --save_dir "$runs"

echo
python -m datafree.report "$runs"
echo
echo "RGAL's images:              $(echo "$runs"/digits_rgal_*/*/grids)"
echo "Curves in a browser:        tensorboard --logdir $runs"
