#!/usr/bin/env bash
# Table 4: how large the groups are, and what is trained together with the masks.
#   bash reproduce/table4.sh          (its settings and ImageNet: see common.sh)
. "$(dirname "$0")/common.sh"
steps=${STEPS:-$(size 100 10000)} wide=$(size 3:6 7:14) sampling=$(size "" "--steps 64")
images=${IMAGES:-$(size 1000 10000)}
tune="--mode finetune --steps $steps"

#    row              paper's IS, FID   prune.py                              distill.py   sample.py
cell "LoRA, 1:2"      "54.75 33.39"     "--scheme 1:2"                        "$tune"      "$sampling"
cell "LoRA, 2:4"      "53.07 34.21"     "--scheme 2:4"                        "$tune"      "$sampling"
cell "LoRA, $wide"    "34.97 49.41"     "--scheme $wide"                      "$tune"      "$sampling"
cell "full, 1:2"      "53.11 35.77"     "--scheme 1:2 --delta-w full"         "$tune"      "$sampling"
cell "full, 2:4"      "53.63 34.41"     "--scheme 2:4 --delta-w full"         "$tune"      "$sampling"
cell "full, $wide"    "45.03 38.76"     "--scheme $wide --delta-w full"       "$tune"      "$sampling"
cell "frozen, 1:2"    "45.08 39.56"     "--scheme 1:2 --delta-w frozen"       "$tune"      "$sampling"
cell "frozen, 2:4"    "48.09 37.82"     "--scheme 2:4 --delta-w frozen"       "$tune"      "$sampling"
cell "frozen, $wide"  "34.09 49.75"     "--scheme $wide --delta-w frozen"     "$tune"      "$sampling"

table "Table 4: groups and dW, $MODEL, $steps steps of fine-tuning" "IS FID"
