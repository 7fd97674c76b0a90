#!/usr/bin/env bash
# Class-incremental learning on CIFAR-10, five tasks of two classes, with a small network on a CPU: ABD's loss on images
# that are inverted in rounds, alone and with RGAL, and LwF, over three orders of the classes, paired. A finished run is not
# repeated. SEEDS and STUDY are as in incremental_digits.sh; options are passed on to every run:
#     SEEDS="0" bash scripts/incremental_cifar10.sh --data_root path/to/data
set -euo pipefail
. "$(dirname "$0")/env.sh"

study=${STUDY:-runs/incremental_cifar10}
cells() {
    echo "finetune finetune incremental"
    echo "lwf lwf incremental"
    echo "host abd_inversion incremental_inversion --triplet 0 --striplet 0"
    echo "host-both abd_inversion incremental_inversion"
}

for seed in ${SEEDS:-0 1 2}; do
    cells | while read -r name method config options; do
        cell_options="--method $method --config configs/cifar10/$config.yaml $options"
        [ "$name" = finetune ] || cell_options+=" --weights $study/cifar10_finetune_resnet8/finetune-seed$seed/task_00"
        [ -f "$study/cifar10_${method}_resnet8/$name-seed$seed/summary.json" ] ||
            python datafree_incremental.py $cell_options "$@" --seed "$seed" --class_seed "$seed" \
                --save_dir "$study" --log_tag "$name-seed$seed" --resume auto </dev/null
    done
done

python -m datafree.report "$study" --against triplet=0 striplet=0
