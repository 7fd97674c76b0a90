#!/usr/bin/env bash
# Every method alone and with RGAL added, in two tables: with equal student steps, and with the epochs that take BUDGET
# seconds as timed for the first table. On the digits that ship with the project, from a separate teacher for each seed:
#     bash scripts/compare_methods.sh [OPTIONS]
# or on CIFAR-10 without its training images, from the file of He et al.'s ResNet-20:
#     WEIGHTS=resnet20-12fca82f.th bash scripts/compare_methods.sh [OPTIONS]
# A finished run is not repeated, so a stopped comparison can be continued. SEEDS, METHODS, CELLS, TABLES, BUDGET and
# COMPARISON (the folder) may be set, and options are passed on to every distillation.
set -euo pipefail
shopt -s inherit_errexit
weights=${WEIGHTS:+$(realpath -e "$WEIGHTS")}
. "$(dirname "$0")/env.sh"

methods=${METHODS:-noise zskt dafl dfad dfq deepinv cmi fast nayer rgal rgal_reptile rgal_fast real}
if [ -n "$weights" ]; then
    data=cifar10 configs=configs/cifar10_short pair=cifar_resnet20_wrn16_1 budget=${BUDGET:-1200}
else
    data=digits configs=configs/digits pair=resnet20_resnet8 budget=${BUDGET:-30}
fi
options=$(joined "$@")
comparison=${COMPARISON:-runs/compare_methods_$data$options} seconds=seconds-$budget

triplets() {  # the options of a METHOD CELL
    case $1-$2 in
        rgal-alone) echo "--triplet 0 --striplet 0";;
        rgal-rgal | *-alone) ;;
        noise-rgal | real-rgal) echo "--striplet 0.1";;  # nothing is synthesised
        *-rgal) echo "--triplet 0.1 --striplet 0.1";;
    esac
}

teacher() {  # the weights for this seed
    [ -z "$weights" ] || { echo "$weights"; return; }
    local folder=$comparison/digits_scratch_resnet20/seed$seed
    [ -f "$folder/summary.json" ] ||
        python train_scratch.py --config configs/digits/teacher_resnet20.yaml --seed "$seed" --save_dir "$comparison" \
            --resume auto >&2
    echo "$folder"
}

epochs() {  # those of a METHOD CELL that take the budget, computed once
    local kept=$comparison/$seconds/$1-$2-epochs
    mkdir -p "$comparison/$seconds"
    [ -s "$kept" ] || python -m benchmarks.budget "$budget" "$comparison/steps/${data}_$1_$pair/$2"-seed* >"$kept"
    cat "$kept"
}

tables=${TABLES:-steps seconds}
tables=${tables/seconds/$seconds}
for table in $tables; do
    for seed in ${SEEDS:-0 1 2}; do
        teacher_weights=$(teacher)
        for method in $methods; do
            for cell in ${CELLS:-alone rgal}; do
                [ ! -f "$comparison/$table/${data}_${method}_$pair/$cell-seed$seed/summary.json" ] || continue
                cell_options="--config $configs/${method}_$pair.yaml $(triplets "$method" "$cell")"
                [ "$table" = steps ] || cell_options+=" --epochs $(epochs "$method" "$cell")"
                python datafree_kd.py $cell_options "$@" --seed "$seed" --teacher_weights "$teacher_weights" \
                    --save_dir "$comparison/$table" --log_tag "$cell-seed$seed" --resume auto
            done
        done
    done
done

against="--against striplet=0"
[[ " ${CELLS:-alone} " = *" alone "* ]] || against=
for table in $tables; do
    echo "Equal $table:"
    python -m datafree.report "$comparison/$table" $against
done
