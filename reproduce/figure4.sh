#!/usr/bin/env bash
# Figure 4: images/s against depth, beside 1 / (1 - the share of layers that were cut).
#   bash reproduce/figure4.sh         (its settings and ImageNet: see common.sh). Run it while nothing else runs.
. "$(dirname "$0")/common.sh"
images=${IMAGES:-$(size 256 512)}

draw "$root/teacher/speed-$images" "--model $MODEL"
row "whole" ""
for scheme in 3:4 2:3 1:2 1:3 1:4; do
    [ $((depth % ${scheme#*:})) = 0 ] || continue
    cut "--scheme $scheme --criterion oracle"  # which layers does not matter here
    draw "$cut/speed-$images" "--ckpt $cut/shallow.pt"
    row "keep $scheme" ""
done

table "Figure 4: depth and speed, $MODEL" "" --speed-up
after python reproduce/chart.py "$out-chart.png" --title "Speed against depth, $MODEL" --x depth --y images_per_s \
    "${rows[@]/#*|/measured||}" --inverse
