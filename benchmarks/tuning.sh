#!/bin/sh
# Tune DeiT-tiny without labels at several sizes, on 1,000 calibration images: top-1 and KL before and after, with the
# seconds and the memory of each step. A run that has ended is shown again, one that was stopped goes on.
#
#     sh benchmarks/tuning.sh imagenet_mini deit_tiny.safetensors output/tuning [more flags of vbp run]
set -eu
data=$1 weights=$2 output=$3
shift 3

tune() {
    name=$1
    shift
    vbp run --data_path "$data" --model_name deit_tiny_patch16_224 --checkpoint "$weights" --calib_samples 1000 \
        --epochs_ft 0 --tune 8 --resume auto --save_dir "$output/$name" "$@"
}

for keep in 0.5 0.65 0.9; do
    tune "keep_$keep" --keep_ratio "$keep" "$@"
done
tune macs_60 --bottleneck --target_macs 0.6 --best_effort "$@"
vbp compare "$output/keep_0.5" "$output/keep_0.65" "$output/keep_0.9" "$output/macs_60"
