#!/usr/bin/env bash
# Table 7: a quarter of the layers, cut at once or from a half, taught by the whole network or by the half.
#   bash reproduce/table7.sh          (its settings and ImageNet: see common.sh)
# Measured on the raw weights: after so few steps the averaged ones are still young.
. "$(dirname "$0")/common.sh"
steps=${STEPS:-$(size 800 10000)} long=${STEPS:-$(size 800 500000)}
sampling="--weights model $(size "" "--steps 64")" kd="--mode masked-kd --steps"

cut "--scheme 1:2"
recover "$cut" "--mode masked-kd $(fifths $long)"
half=$student/student.pt

#    row: teacher, cut from    paper's IS, FID   prune.py                    distill.py                    sample.py
cell "whole, from the whole"   "29.46 56.18"     "--scheme 1:4"              "$kd $steps"                    "$sampling"
cell "whole, from the half"    "51.96 36.69"     "--scheme 1:2 --ckpt $half" "$kd $steps --teacher $MODEL"   "$sampling"
cell "half, from the whole"    "28.30 58.73"     "--scheme 1:4"              "$kd $steps --teacher $half"    "$sampling"
cell "half, from the half"     "57.97 32.47"     "--scheme 1:2 --ckpt $half" "$kd $steps"                    "$sampling"

table "Table 7: a quarter of the layers, $MODEL, $steps steps, raw weights" "IS FID"
