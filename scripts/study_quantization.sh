#!/usr/bin/env bash
# What the images, and RGAL's triplets, are worth to a quantised network: ranges from noise, from generated and from real
# images; the host alone, with triplets in synthesis, in training, in both; training on the real images. The host is GDFQ
# on the digits, and inversion in rounds on CIFAR-10.
#     SEEDS="0 1" BITS="2 3" bash scripts/study_quantization.sh                                  on the digits
#     WEIGHTS=resnet20.th BITS="3 4" bash scripts/study_quantization.sh                          on CIFAR-10
# A finished run is not repeated. SEEDS, BITS, STUDY (the folder), CONFUSE and SEPARATE (the weights of the triplets) and
# CELLS (a regular expression that must match a part of a cell's name) may be set, and options are passed on to every
# quantization.
set -euo pipefail
. "$(dirname "$0")/env.sh"

weights=${WEIGHTS:+$(realpath -e "$WEIGHTS")}
host=$([ "$weights" ] && echo inversion || echo gdfq)
study=${STUDY:-runs/study_quantization_$([ "$weights" ] && echo cifar10 || echo digits)}

quantize() {
    python datafree_quantize.py "$@"
}
config() {  # the file for so many bits
    if [ ! "$weights" ]; then
        echo digits/quantize_resnet8
    elif [ "$1" -ge 4 ]; then
        echo cifar10/quantize_inversion_cifar_resnet20_w4a4_cpu
    else
        echo cifar10/quantize_inversion_cifar_resnet20_cpu
    fi
}
cells() {  # a name, a method and its options per line, for so many bits; 0.1 of the weight of the divergence separates
    local ratio=$([[ $(config "$1") = *w4a4* ]] && echo 0.1 || echo 0.01)
    local confuse="--triplet ${CONFUSE:-0.1} --start_layer -1" separate="--striplet ${SEPARATE:-$ratio}"
    echo "ranges-noise noise --epochs 0"
    echo "ranges-generated $host --epochs 0"
    echo "ranges-real real --epochs 0"
    echo "host $host"
    echo "confuse $host $confuse"
    echo "separate $host $separate"
    echo "rgal $host $confuse $separate"
    echo "real real"
}

for seed in ${SEEDS:-0 1 2 3 4 5 6 7 8 9}; do
    teacher=${weights:-$study/digits_scratch_resnet8/seed$seed}
    [ "$weights" ] || [ -f "$teacher/summary.json" ] ||
        python train_scratch.py --config configs/digits/teacher_resnet20.yaml --model resnet8 --seed "$seed" \
            --save_dir "$study" --resume auto
    for bits in ${BITS:-2 3}; do
        cells "$bits" | while read -r name method options; do
            [[ $name =~ ${CELLS:-} ]] || continue
            found=$(compgen -G "$study/*_${method}_*_w${bits}a$bits*/$name-seed$seed/summary.json" || true)
            [ "$found" ] ||
                quantize --config "configs/$(config "$bits").yaml" --method "$method" --w_bits "$bits" --a_bits "$bits" "$@" \
                    $options --seed "$seed" --teacher_weights "$teacher" --save_dir "$study" \
                    --log_tag "$name-seed$seed" --resume auto </dev/null
        done
    done
done

for runs in "$study"/*_"$host"_*; do
    python -m datafree.report "$runs" --against triplet=0 striplet=0
done
python -m datafree.report "$study"
