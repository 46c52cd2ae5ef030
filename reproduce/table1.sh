#!/usr/bin/env bash
# Table 1: the teacher; cuts by several criteria, fine-tuned or taught, for a short and a long time; and cut twice.
#   bash reproduce/table1.sh          (its settings and ImageNet: see common.sh)
# Rivals may keep any of the layers, as in the paper. Its rows DiT-L, DiT-B and Diff-Pruning are other networks.
. "$(dirname "$0")/common.sh"
short=${STEPS:-$(size 100 100000)}
long=$((short * $(size 8 5)))
d19=$(size 2:3 3:4,3:4,2:4,3:4,2:4,3:4,3:4)  # at ImageNet size, the release's list
more=$(size 8:12 19:28)
tune="--mode finetune --steps $short" tune_long="--mode finetune $(fifths $long)"
kd="--mode masked-kd --steps $short" kd_long="--mode masked-kd $(fifths $long)"

measure "$root/teacher/$images" "--model $MODEL"
row "teacher" "278.24 2.27 4.60 0.83 0.57"
#    row                   paper: IS, FID, sFID, prec., recall   prune.py                                distill.py
cell "bi, two thirds"          "132.79 7.93 5.25 0.76 0.53"   "--scheme $more --criterion bi"          "$tune"
cell "two thirds, KD"          "242.29 2.90 4.63 0.84 0.54"   "--scheme $d19"                          "$kd"
cell "two thirds, KD, long"    "251.02 2.55 4.57 0.83 0.55"   "--scheme $d19"                          "$kd_long"
cell "bi"                      "66.10 22.28 6.20 0.63 0.56"   "--scheme $free --criterion bi"          "$tune"
cell "flux-lite"               "54.54 25.92 5.98 0.62 0.55"   "--scheme $free --criterion flux-lite"   "$tune"
cell "sensitivity"             "70.36 21.15 6.22 0.63 0.57"   "--scheme $free --criterion sensitivity" "$tune"
cell "oracle"                  "141.18 7.43 6.09 0.75 0.55"   "--scheme $free --criterion oracle"      "$tune"
cell "learned"                 "151.88 5.73 4.91 0.80 0.55"   "--scheme 1:2"                           "$tune"
cell "learned, long"           "198.85 3.92 5.69 0.78 0.58"   "--scheme 1:2"                           "$tune_long"
cell "learned, KD"             "207.27 3.73 5.04 0.81 0.54"   "--scheme 1:2"                           "$kd"
cell "learned, KD, long"       "234.50 2.86 4.75 0.82 0.55"   "--scheme 1:2"                           "$kd_long"
cell "halved again, KD, long"  "166.91 5.87 5.43 0.78 0.53"   "--scheme 1:2 --ckpt $student/student.pt" "$kd_long"

table "Table 1: $MODEL, fine-tuned or taught (KD) for $short steps, long: $long" "IS FID sFID prec. rec."
