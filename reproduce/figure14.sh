#!/usr/bin/env bash
# Figure 14: the distance to real images over the steps of recovery, for three kinds of it; averaged weights.
#   bash reproduce/figure14.sh        (its settings and ImageNet: see common.sh)
. "$(dirname "$0")/common.sh"
steps=${STEPS:-$(size 800 500000)}
each=$(((steps + 4) / 5))
points=()

cut "--scheme 1:2"
for mode in finetune logits-kd masked-kd; do
    recover "$cut" "--mode $mode $(fifths $steps)"
    for at in $each $((2 * each)) $((3 * each)) $((4 * each)) $steps; do
        measure "$student/$images-at-$at" "--ckpt $student/step-$(printf %08d "$at").pt"
        row "$mode, $at steps" ""
        points+=("$mode|$at|$samples")
    done
done

table "Figure 14: over the steps of recovery, $MODEL"
after python reproduce/chart.py "$out-chart.png" --title "Recovery of $MODEL" --x "step of recovery" --y fid \
    "${points[@]}"
