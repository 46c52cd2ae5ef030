#!/usr/bin/env bash
# Every stage on the bundled digits: cut a teacher to half its depth, recover it, measure teacher, cut and student.
#   bash reproduce/demo.sh [dit-tiny|sit-tiny|mar-tiny]
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-dit-tiny}
out=out
[ "$model" = dit-tiny ] || out=out/$model
SECONDS=0

python extract_latents.py
python prune.py --model "$model" --out "$out/prune" --resume never
python distill.py --student "$out/prune/shallow.pt" --out "$out/distill" --resume never
python sample.py --model "$model" --out "$out/sample-teacher"
python sample.py --ckpt "$out/prune/shallow.pt" --out "$out/sample-cut"
python sample.py --ckpt "$out/distill/student.pt" --out "$out/sample"
for samples in sample-teacher sample-cut sample; do
    python fid.py "$out/$samples/samples.npz" --json "$out/$samples/fid.json" > /dev/null
done
python reproduce/table.py "$out/demo.png" \
    "teacher=$out/sample-teacher" "cut=$out/sample-cut" "student=$out/sample"
echo "Pictures: $out/demo.png (samples side by side), $out/prune/decision.png (the search)."
echo "Everything took $((SECONDS / 60)) min $((SECONDS % 60)) s."
