#!/usr/bin/env bash
# To run once on a machine with CUDA, in about 15 minutes: the tests; every stage on one GPU and on all of them, in
# float32, bfloat16 and compiled; images/s and peak memory of DiT-XL's steps, on random weights.
#   bash reproduce/gpu_check.sh                              # writes out/gpu-check/report.md, to paste into an issue
#   DEVICE=cpu MODEL=dit-tiny bash reproduce/gpu_check.sh    # a rehearsal without a GPU, in some minutes
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda} MODEL=${MODEL:-dit-xl}
out=out/gpu-check
mkdir -p $out
report=$out/report.md
SECONDS=0
tests() { timeout 900 python -m pytest -q -x test_all.py "$@" 2>&1 | tee -a $out/tests.log | tail -n 1; }

{
    echo "| check | result |"
    echo "|---|---|"
    [ "$DEVICE" = cpu ] || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | sort |
        uniq -c | sed 's/^ */| machine | /; s/$/ |/'
    python -c "import os, torch
print(f'| software | torch {torch.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} CPUs |')"
    if [ "$DEVICE" = cpu ]; then
        echo "| tests (a few) | $(tests -k 'respace or candidate or matched') |"
    else
        echo "| tests | $(tests) |"
        echo "| full-size networks, on the CPU | $(SLOW=1 tests -k full_size) |"
    fi
} | tee $report
python reproduce/gpu_check.py --device "$DEVICE" --model "$MODEL" --out $out | tee -a $report
echo "| time | $((SECONDS / 60)) min $((SECONDS % 60)) s |" | tee -a $report
echo "The report is $report; what the stages printed is in $out/*.log."
