#!/usr/bin/env bash
# Class-incremental learning on CIFAR-10, five tasks of two classes, with a small network on a CPU: ABD alone and with
# RGAL, and LwF, over three orders of the classes, paired. A finished run is not repeated. ORDERS and STUDY are as in
# incremental_digits.sh, and so are the weights of the triplets; options are passed on to every run:
#     ORDERS="0" bash scripts/incremental_cifar10.sh --data_root path/to/data
set -euo pipefail
. "$(dirname "$0")/env.sh"

study=${STUDY:-runs/incremental_cifar10}
cells() {
    echo "finetune finetune incremental_resnet8"
    echo "lwf lwf incremental_resnet8"
    echo "abd abd incremental_replay_resnet8"
    echo "abd-both abd incremental_replay_resnet8 --triplet ${CONFUSE:-1} --striplet ${SEPARATE:-1}"
}

for order in ${ORDERS:-0 1 2}; do
    cells | while read -r name method config options; do
        base=
        [ "$name" = finetune ] || base="--weights $study/cifar10_finetune_resnet8/finetune-order$order/task_00"
        [ -f "$study/cifar10_${method}_resnet8/$name-order$order/summary.json" ] ||
            python datafree_incremental.py --method "$method" --config "configs/cifar10/$config.yaml" "$@" $options $base \
                --seed "$order" --class_seed "$order" --save_dir "$study" --log_tag "$name-order$order" \
                --resume auto </dev/null
    done
done

python -m datafree.report "$study" --against triplet=0 striplet=0
