#!/usr/bin/env bash
# Table 8: the learning rate of the recovery.
#   bash reproduce/table8.sh          (its settings and ImageNet: see common.sh)
. "$(dirname "$0")/common.sh"
steps=${STEPS:-$(size 800 100000)} top=$(size 1e-3 2e-4) half=$(size 5e-4 1e-4) quarter=$(size 2.5e-4 5e-5)

#    row          paper's IS, FID   prune.py         distill.py
cell "$top"       "207.27 3.73"     "--scheme 1:2"   "--mode masked-kd --steps $steps"
cell "$half"      "194.31 4.10"     "--scheme 1:2"   "--mode masked-kd --steps $steps --lr $half"
cell "$quarter"   "161.40 6.63"     "--scheme 1:2"   "--mode masked-kd --steps $steps --lr $quarter"

table "Table 8: learning rates, $MODEL, $steps steps" "IS FID"
