#!/usr/bin/env bash
# Table 5: what the student learns from; which activations are massive. Figure 8: how large they are.
#   bash reproduce/table5.sh          (its settings and ImageNet: see common.sh)
. "$(dirname "$0")/common.sh"
steps=${STEPS:-$(size 800 100000)}

#    row                       paper's FID   prune.py         distill.py
cell "fine-tuning"             5.79          "--scheme 1:2"   "--mode finetune --steps $steps"
cell "logits KD"               4.66          "--scheme 1:2"   "--mode logits-kd --steps $steps"
cell "RepKD"                   NaN           "--scheme 1:2"   "--mode rep-kd --steps $steps"
cell "masked KD, 0.1 sigma"    NaN           "--scheme 1:2"   "--mode masked-kd --steps $steps --mask-sigma 0.1"
cell "masked KD, 2 sigma"      3.73          "--scheme 1:2"   "--mode masked-kd --steps $steps"
masked=$student
cell "masked KD, 4 sigma"      3.75          "--scheme 1:2"   "--mode masked-kd --steps $steps --mask-sigma 4"

table "Table 5: knowledge distillation, $MODEL, $steps steps" "FID"
after python reproduce/magnitudes.py --student "$masked/student.pt" --latents "$latents" --out "$out-magnitudes.png"
