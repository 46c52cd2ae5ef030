#!/usr/bin/env bash
# The same cut recovered in every way that distill.py knows: what does each part of the loss add?
#   bash reproduce/digits_recovery.sh      (after make demo, or python prune.py)
set -euo pipefail
cd "$(dirname "$0")/.."
rows=()
for mode in masked-kd kd output-kd finetune; do
    out=out/recovery/$mode
    python distill.py --mode "$mode" --out "$out" --resume never
    python sample.py --ckpt "$out/student.pt" --out "$out/sample"
    python fid.py "$out/sample/samples.npz" --json "$out/sample/fid.json" > /dev/null
    rows+=("$mode=$out/sample")
done
python reproduce/table.py out/recovery/samples.png "${rows[@]}"
