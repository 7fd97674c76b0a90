#!/usr/bin/env bash
# What a student is worth after a given time: CIFAR-10 from He et al.'s ResNet-20 > WRN-16-1, one CPU thread, the settings
# of configs/cifar10_short/ with Muon for the student; the control `real` trains on the real images.
#     bash scripts/frontier.sh WEIGHTS [OPTIONS]
# WEIGHTS is the teacher's file; options are passed on to every run, such as --precision bf16. A finished run is not
# repeated, so that a stopped frontier can be continued. BUDGETS (of wall-clock time, so run it on a free core), SEEDS,
# FRONTIER (the folder) and CELLS (a regular expression that must match a part of a cell's name) may be set. The curves:
#     python -m datafree.curves frontier.png runs/frontier --over minutes --of acc1
set -euo pipefail
: "${1:?"name the file of the ResNet-20 teacher's weights"}"
. "$(dirname "$0")/env.sh"
weights=$(cd "$OLDPWD" && realpath -e "$1")
shift

frontier=${FRONTIER:-runs/frontier$(joined "$@")}
cells() {  # a name, a method and its options per line
    echo "rgal_fast rgal_fast"
    echo "rgal_fast-wide rgal_fast --ngf 64"
    echo "rgal_reptile rgal_reptile"
    echo "fast fast"
    echo "nayer nayer"
    echo "rgal rgal"
    echo "real real"
}

for budget in ${BUDGETS:-15m 30m 60m 120m}; do
    for seed in ${SEEDS:-0 1 2}; do
        cells | while read -r name method options; do
            [[ $name =~ ${CELLS:-} ]] || continue
            cell_options="--config configs/cifar10_short/${method}_cifar_resnet20_wrn16_1.yaml $options"
            [ -f "$frontier/$budget/cifar10_${method}_cifar_resnet20_wrn16_1/$name-seed$seed/summary.json" ] ||
                python datafree_kd.py $cell_options --optimizer muon "$@" --budget "$budget" --threads 1 \
                    --seed "$seed" --teacher_weights "$weights" --save_dir "$frontier/$budget" \
                    --log_tag "$name-seed$seed" --resume auto </dev/null
        done
    done
    echo "In $budget:"
    python -m datafree.report "$frontier/$budget"
done
