#!/usr/bin/env bash
# Table 2: the three families, cut to half by the learned search, with masked KD. MODEL=dit-xl: all at ImageNet size.
#   bash reproduce/table2.sh          (its settings: see common.sh; STEPS: else each family's own recipe)
. "$(dirname "$0")/common.sh"
recovery="--mode masked-kd ${STEPS:+--steps $STEPS}"

for family in "$(size dit-tiny dit-xl)" "$(size sit-tiny sit-xl)" "$(size mar-tiny mar-large)"; do
    case $family in  # the paper's IS and FID of the teacher, and of the student
        dit-*) teacher="278.24 2.27" cut="234.50 2.86" ;;
        sit-*) teacher="277.5 2.06" cut="220.1 3.02" ;;
        mar-*) teacher="296.0 1.78" cut="283.4 2.28" ;;
    esac
    numbers=$cut
    use "$family"
    measure "$root/teacher/$images" "--model $family"
    row "$family" "$teacher"
    cell "$family, half" "$numbers" "--scheme 1:2" "$recovery"
done
table "Table 2: three families" "IS FID"
