#!/usr/bin/env bash
# Table 1: the teacher; cuts by several criteria, fine-tuned or taught, for a short and a long time; and cut twice.
#   bash reproduce/table1.sh          (its settings and ImageNet: see common.sh)
# Rivals may keep any half of the layers, as in the paper. Its rows DiT-L, DiT-B and Diff-Pruning are other networks.
. "$(dirname "$0")/common.sh"
short=${STEPS:-$(size 100 100000)}
long=$((short * $(size 8 5)))
d19=$(size 2:3 3:4,3:4,2:4,3:4,2:4,3:4,3:4)  # at ImageNet size, the release's list
tune="--mode finetune" kd="--mode masked-kd" numbers="IS FID sFID prec. rec."

measure "$root/teacher/$images" "--model $MODEL"
row "teacher" "278.24 2.27 4.60 0.83 0.57"
#    row                                  paper: IS, FID, sFID, precision, recall   prune.py                              distill.py
cell "bi, two thirds, $short"             "132.79 7.93 5.25 0.76 0.53"   "--scheme $(size 8:12 19:28) --criterion bi"   "$tune --steps $short"
cell "learned, two thirds, KD, $short"    "242.29 2.90 4.63 0.84 0.54"   "--scheme $d19"                                "$kd --steps $short"
cell "learned, two thirds, KD, $long"     "251.02 2.55 4.57 0.83 0.55"   "--scheme $d19"                                "$kd $(fifths $long)"
cell "bi, half, $short"                   "66.10 22.28 6.20 0.63 0.56"   "--scheme $free --criterion bi"                "$tune --steps $short"
cell "flux-lite, half, $short"            "54.54 25.92 5.98 0.62 0.55"   "--scheme $free --criterion flux-lite"         "$tune --steps $short"
cell "sensitivity, half, $short"          "70.36 21.15 6.22 0.63 0.57"   "--scheme $free --criterion sensitivity"       "$tune --steps $short"
cell "oracle, half, $short"               "141.18 7.43 6.09 0.75 0.55"   "--scheme $free --criterion oracle"            "$tune --steps $short"
cell "learned, half, $short"              "151.88 5.73 4.91 0.80 0.55"   "--scheme 1:2"                                 "$tune --steps $short"
cell "learned, half, $long"               "198.85 3.92 5.69 0.78 0.58"   "--scheme 1:2"                                 "$tune $(fifths $long)"
cell "learned, half, KD, $short"          "207.27 3.73 5.04 0.81 0.54"   "--scheme 1:2"                                 "$kd --steps $short"
cell "learned, half, KD, $long"           "234.50 2.86 4.75 0.82 0.55"   "--scheme 1:2"                                 "$kd $(fifths $long)"
cell "learned, halved twice, KD, $long"   "166.91 5.87 5.43 0.78 0.53"   "--scheme 1:2 --ckpt $student/student.pt"      "$kd $(fifths $long)"

table "Table 1: $MODEL, recovered for $short and $long steps" "$numbers"
