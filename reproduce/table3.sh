#!/usr/bin/env bash
# Table 3: is a low loss right after the cut a good sign? Figure 5: that loss, of many cuts that keep any half.
#   bash reproduce/table3.sh          (its settings and ImageNet: see common.sh; CANDIDATES: how many cuts are tried)
. "$(dirname "$0")/common.sh"
steps=${STEPS:-$(size 800 100000)}
tune="--mode finetune --steps $steps" any="--scheme $free --criterion"

cut "$any lowest-loss --candidates ${CANDIDATES:-$(size 1000 100000)}"
search=$cut
# cut_of RANK: the layers of the cut with the highest, median or lowest loss, from the search's log.
cut_of() { [ ! -e "$search/shallow.pt" ] || python reproduce/histogram.py "$search" --layers "$1"; }

#    row         paper: IS, FID     prune.py                                             distill.py
cell "max. loss"      "- NaN"            "$any indices --layers $(cut_of highest)"            "$tune"
cell "median loss"    "149.51 6.45"      "$any indices --layers $(cut_of median)"             "$tune"
cell "min. loss"      "73.10 20.69"      "$any indices --layers $(cut_of lowest)"             "$tune"
cell "sensitivity"    "70.36 21.15"      "$any sensitivity"                                   "$tune"
cell "bi"             "66.10 22.28"      "$any bi"                                            "$tune"
cell "flux-lite"      "54.54 25.92"      "$any flux-lite"                                     "$tune"
cell "oracle"         "141.18 7.43"      "$any oracle"                                        "$tune"
cell "learned"        "151.88 5.73"      "--scheme 1:2"                                       "$tune"

table "Table 3: loss after the cut, $MODEL, fine-tuned for $steps steps" "IS FID"
after python reproduce/histogram.py "$search" "${rows[@]}" --picture "$out-losses.png"
