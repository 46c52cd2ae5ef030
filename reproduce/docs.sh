#!/usr/bin/env bash
# Makes every picture of docs/ anew: the demo's from its run (4 minutes), the others from docs/results/*.json.
#   bash reproduce/docs.sh
set -euo pipefail
cd "$(dirname "$0")/.."

bash reproduce/demo.sh
cp out/demo.png docs/demo.png                 # samples of teacher, cut and student
cp out/prune/decision.png docs/decision.png   # the layers that the search keeps, over its steps
cp out/prune/loss.png docs/search.png         # the search's loss
cp out/distill/loss.png docs/recovery.png     # the recovery's losses
python reproduce/magnitudes.py --student out/distill/student.pt --out docs/magnitudes.png
python reproduce/report.py --pictures         # the evidence
