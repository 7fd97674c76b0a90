#!/usr/bin/env bash
# The cells of the study that matter, on CIFAR-10 from He et al.'s ResNet-20, in 2,560 student steps, an eighth of those in
# configs/cifar10/rgal_reptile_cifar_resnet20_wrn16_1_cpu.yaml:
#     bash scripts/study_relation_cifar10.sh WEIGHTS [OPTIONS]
# WEIGHTS is the teacher's file; options are passed on to every run. A finished run is not repeated. SEEDS, STUDY and
# CELLS are as in study_relation.sh.
set -euo pipefail
: "${1:?"name the file of the ResNet-20 teacher's weights"}"
. "$(dirname "$0")/env.sh"
weights=$(cd "$OLDPWD" && realpath -e "$1")
shift

study=${STUDY:-runs/study_relation_cifar10}
cells() {
    echo "none --triplet 0 --striplet 0"
    echo "rgal"
    echo "release --relation release --sampling_space logits"
    echo "student --triplet 0"
    echo "synthesis-paper --striplet 0"
    echo "synthesis-release --striplet 0 --relation release"
    echo "weight10-synthesis-paper --triplet 10 --striplet 0"
    echo "weight10-synthesis-release --triplet 10 --striplet 0 --relation release"
}

for seed in ${SEEDS:-0 1}; do
    cells | while read -r name options; do
        [[ $name =~ ${CELLS:-} ]] || continue
        [ -f "$study/cifar10_rgal_reptile_cifar_resnet20_wrn16_1/$name-seed$seed/summary.json" ] ||
            python datafree_kd.py --config configs/cifar10/rgal_reptile_cifar_resnet20_wrn16_1_cpu.yaml --epochs 5 --warmup 1 \
                --ep_steps 640 "$@" $options --seed "$seed" --teacher_weights "$weights" --save_dir "$study" \
                --log_tag "$name-seed$seed" --resume auto </dev/null
    done
done

python -m datafree.report "$study"/cifar10_rgal_reptile_* --against triplet=0 striplet=0
