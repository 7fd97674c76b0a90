#!/usr/bin/env bash
# What the triplets contribute: every cell of direction x space x sampling x phase, on the digits, for 5 paired seeds.
# A finished run is not repeated, so a stopped study can be continued. SEEDS, STUDY (the folder) and CELLS (a regular
# expression that must match a part of a cell's name) may be set, and options are passed on to every distillation:
#     SEEDS="0 1" CELLS="none|focal" bash scripts/study_relation.sh --T 4
# UNIT=gradient makes another study: the weights of synthesis in units of the gradient (--triplet_unit).
set -euo pipefail
. "$(dirname "$0")/env.sh"

study=${STUDY:-runs/study_relation${UNIT:+_$UNIT}$(joined "$@")}

ratios() {  # a name and its options per line; weights in units of the gradient, which are not compared with others
    echo "none --triplet 0 --striplet 0"
    for ratio in 0.1 0.3 1; do
        echo "ratio$ratio-paper --triplet $ratio --triplet_unit gradient --striplet 0"
        echo "ratio$ratio-release --triplet $ratio --triplet_unit gradient --striplet 0 --relation release"
    done
}
cells() {  # a name and its options per line; synthesis, student: the phases that have triplets
    echo "none --triplet 0 --striplet 0"
    echo "rgal"  # as in configs/methods/, with a different sampling in each phase
    echo "release --relation release --sampling_space logits"
    for weight in 1 10 100; do  # ten to a thousand times the published weights
        echo "weight$weight-student --triplet 0 --striplet $weight"
        echo "weight$weight-synthesis-paper --triplet $weight --striplet 0"
        echo "weight$weight-synthesis-release --triplet $weight --striplet 0 --relation release"
    done
    weighting="weight10-synthesis-paper --triplet 10 --striplet 0"  # in the 64 dimensions of the embedding
    echo "${weighting/paper/paper-nominal} --sampling_dim nominal"
    echo "${weighting/paper/paper-dim3} --sampling_dim 3"
    echo "${weighting/paper/paper-cap3} --sampling_dim nominal --sampling_cap 3"
    echo "${weighting/paper/paper-uniform} --sampling uniform"
    for space in embedding logits; do
        for sampling in focal distance uniform; do
            [ $space-$sampling != logits-uniform ] || continue  # uniform sampling uses no distance
            local draw="--sampling_space $space --sampling $sampling" separate="--striplet_sampling $sampling"
            echo "student-$space-$sampling --triplet 0 --sampling_space $space $separate"
            for relation in paper release; do
                echo "synthesis-$relation-$space-$sampling --striplet 0 --relation $relation $draw"
                echo "both-$relation-$space-$sampling --relation $relation $draw $separate"
            done
        done
    done
}

list=$([ "${UNIT:-}" ] && echo ratios || echo cells)

for seed in ${SEEDS:-0 1 2 3 4}; do
    teacher=$study/digits_scratch_resnet20/seed$seed
    [ -f "$teacher/summary.json" ] ||
        python train_scratch.py --config configs/digits/teacher_resnet20.yaml --seed "$seed" --save_dir "$study" \
            --resume auto
    $list | while read -r name options; do
        [[ $name =~ ${CELLS:-} ]] || continue
        [ -f "$study/digits_rgal_resnet20_resnet8/$name-seed$seed/summary.json" ] ||
            python datafree_kd.py --config configs/digits/rgal_resnet20_resnet8.yaml --epochs 4 "$@" $options \
                --seed "$seed" --teacher_weights "$teacher" --save_dir "$study" \
                --log_tag "$name-seed$seed" --resume auto </dev/null
    done
done

factors="triplet relation"
[ "${UNIT:-}" ] || factors+=" striplet sampling_space sampling striplet_sampling sampling_dim sampling_cap"
python -m datafree.report "$study"/digits_rgal_* --against triplet=0 striplet=0 --effect $factors
for number in distance_within_class distance_to_other_class; do
    python -m datafree.report "$study"/digits_rgal_* --of images/$number --effect relation triplet
done
