#!/usr/bin/env bash
# The learned cut against random ones, each recovered for the same number of steps: does learning the mask pay?
#   bash reproduce/digits_criteria.sh 100       (default: 800 steps)
set -euo pipefail
cd "$(dirname "$0")/.."
steps=${1:-800}
[ -f out/latents/meta.json ] || python extract_latents.py
rows=()
for cut in "learned 0" "random 0" "random 1" "random 2"; do
    read -r criterion seed <<< "$cut"
    out=out/criteria-$steps/$criterion-$seed
    python prune.py --criterion "$criterion" --seed "$seed" --out "$out/prune" --resume never
    python distill.py --student "$out/prune/shallow.pt" --steps "$steps" --out "$out/distill" --resume never
    python sample.py --ckpt "$out/distill/student.pt" --out "$out/sample"
    python fid.py "$out/sample/samples.npz" --json "$out/sample/fid.json" > /dev/null
    rows+=("$criterion-$seed=$out/sample")
done
python reproduce/table.py "out/criteria-$steps/samples.png" "${rows[@]}"
