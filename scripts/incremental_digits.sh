#!/usr/bin/env bash
# Class-incremental learning on the digits that ship with the project, five tasks of two classes: the hosts alone and with
# each part of RGAL, and the baselines, over several orders of the classes, paired. A finished run is not repeated, so a
# stopped study can be continued. SEEDS (of the order and of everything else), CELLS (a regular expression that must match
# a part of a cell's name) and STUDY (the folder) may be set; options are passed on to every run:
#     SEEDS="0 1" CELLS="abd" bash scripts/incremental_digits.sh
set -euo pipefail
. "$(dirname "$0")/env.sh"

study=${STUDY:-runs/incremental_digits}
confuse=${CONFUSE:-1}  # weights of the triplets: chosen on other orders than these, see docs/incremental.md
separate=${SEPARATE:-1}

cells() {  # name, method, file in configs/digits/ and options; the first one also trains the first task, for all others
    echo "finetune finetune incremental"
    echo "lwf lwf incremental"
    echo "fetril fetril incremental"
    echo "joint joint incremental"
    echo "noise abd incremental --source noise --replay_batch_size 32"
    for host in "abd abd incremental_replay" "inversion abd_inversion incremental_inversion" "rdfcil rdfcil incremental_replay"; do
        echo "$host"
        echo "${host/ /-confuse } --triplet $confuse"
        echo "${host/ /-separate } --striplet $separate"
        echo "${host/ /-both } --triplet $confuse --striplet $separate"
        echo "${host/ /-release } --triplet $confuse --relation release"
    done
}

cells | while read -r name method config options; do
    [[ $name =~ ${CELLS:-} || $name = finetune ]] || continue
    for seed in ${SEEDS:-0 1 2 3 4 5 6 7 8 9}; do
        cell_options="--method $method --config configs/digits/$config.yaml $options"
        [ "$name" = finetune ] || cell_options+=" --weights $study/digits_finetune_resnet8/finetune-seed$seed/task_00"
        [ -f "$study/digits_${method}_resnet8/$name-seed$seed/summary.json" ] ||
            python datafree_incremental.py $cell_options "$@" --seed "$seed" --class_seed "$seed" \
                --save_dir "$study" --log_tag "$name-seed$seed" --resume auto </dev/null
    done
done

python -m datafree.report "$study" --against triplet=0 striplet=0
python -m datafree.report "$study" --of forgetting --against triplet=0 striplet=0
