# What the scripts of this folder share. Each runs on the bundled digits, or, with MODEL=dit-xl, on ImageNet:
#
#   bash reproduce/table5.sh                        # dit-tiny, on a laptop
#   MODEL=dit-xl GPUS=8 bash reproduce/table5.sh    # ImageNet, read from DATA=imagenet/train
#
#   STEPS          of each recovery (default: the table's)      IMAGES  drawn for each measurement
#   SEARCH_STEPS   of each search (default: the recipe's)       SEED    of search and recovery
#   TRAIN, SAMPLE  more flags for prune.py and distill.py, and for sample.py: TRAIN="--compile --accumulate 2"
#   LATENTS, OUT   folders (default: out/latents, out/reproduce)
#
# A cell of a table is a way through the stages: cut, recover, sample, measure. Its folder is named after its flags,
# so tables share cells; what is finished is skipped, and what was stopped continues. A script is first read as a plan
# (PLAN=FILE), which runs nothing, for an estimate.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-dit-tiny} GPUS=${GPUS:-1} SEED=${SEED:-0} PLAN=${PLAN:-}
script=$(basename "$0" .sh)
out=${OUT:-out/reproduce}/$MODEL-$script  # the table's .md and .png
[ "$SEED" = 0 ] || out=$out-seed-$SEED
launch=(python)
[ "$GPUS" = 1 ] || launch=(torchrun --nproc_per_node="$GPUS")

if [ -z "$PLAN" ]; then
    plan=$(mktemp)
    PLAN=$plan bash "reproduce/$script.sh"
    python reproduce/estimate.py "$plan" "${OUT:-out/reproduce}/$MODEL/timings.txt" "$GPUS"
    rm "$plan"
fi

# use MODEL: what follows is about this model.
use() {
    MODEL=$1
    read -r vae depth <<< "$(python -c "
import torch, model
torch.set_default_device('meta')
print(model.row_of('$MODEL')['vae'], model.build_model('$MODEL').depths()[0])")"
    root=${OUT:-out/reproduce}/$MODEL
    [ "$SEED" = 0 ] || root=$root/seed-$SEED
    latents=${LATENTS:-out/latents} ref=digits data=
    [ "$vae" = digits ] || { ref=imagenet256; data=${DATA:-imagenet/train}; }
    [ "$vae" != kl16 ] || latents=$latents-kl16
    images=${IMAGES:-$(size 1000 50000)}
    free=$((depth / 2)):$depth  # half of the layers, any
    grep -qs '"complete": true' "$latents/meta.json" ||
        call extract_latents.py --vae "$vae" --out "$latents" ${data:+--data "$data"}
}

# size HOME IMAGENET: one of the two.
size() { if [ "$vae" = digits ]; then echo "$1"; else echo "$2"; fi; }

# fifths STEPS: flags of a long recovery, which keeps a checkpoint at each fifth, for figure 14.
fifths() { echo "--steps $1 --save-every $((($1 + 4) / 5)) --keep 6"; }

# cell NAME PAPER CUT RECOVERY [SAMPLING]: a row. Flags of prune.py, distill.py, sample.py; PAPER: its numbers.
cell() {
    cut "$3"
    recover "$cut" "$4"
    measure "$student/$(slug "$images ${5:-}")" "--ckpt $student/student.pt ${5:-}"
    row "$1" "$2"
}

# cut FLAGS: sets $cut, a folder with shallow.pt.
cut() {
    local flags="$1 ${SEARCH_STEPS:+--steps $SEARCH_STEPS}"
    cut=$root/$(slug "cut $flags")
    [ -e "$cut/shallow.pt" ] || call prune.py --model "$MODEL" --latents "$latents" --out "$cut" --resume auto \
        --seed "$SEED" ${TRAIN:-} $flags
}

# recover CUT FLAGS: sets $student, a folder with student.pt, or `diverged`.
recover() {
    student=$1/$(slug "$2")
    [ -e "$student/student.pt" ] || [ -e "$student/diverged" ] || call distill.py --student "$1/shallow.pt" \
        --latents "$latents" --out "$student" --resume auto --seed "$SEED" ${TRAIN:-} $2 || diverged
}

# A recovery may end for its loss, as two of table 5 do in the paper: a result. Any other failure ends the script.
diverged() {
    tail -n 1 "$student/log.jsonl" | grep -qE 'NaN|Infinity' || exit 1
    touch "$student/diverged"
}

# draw FOLDER FLAGS: sets $samples, a folder with samples.npz, samples.json and grid.png.
draw() {
    samples=$1
    [ -e "$samples/samples.json" ] || call sample.py --num-images "$images" --out "$samples" ${SAMPLE:-} $2
}

# measure FOLDER FLAGS: draws, and adds fid.json. The images, 10 GB at ImageNet size, are deleted; grid.png stays.
measure() {
    samples=$1
    if [ ! -e "$samples/fid.json" ] && [ ! -e "$(dirname "$samples")/diverged" ]; then
        draw "$1" "$2"
        call fid.py "$samples/samples.npz" --ref "$ref" --json "$samples/fid.json"
        rm -f "$samples"/samples.*npz
    fi
}

# row NAME PAPER: puts what was measured last into the table.
row() { rows+=("$1|$2|$samples"); }
rows=()

# table TITLE [PAPER [FLAGS]]: prints the rows; PAPER names the columns of the paper's numbers.
table() {
    after python reproduce/table.py "$1" --paper "${2:-}" --picture "$out.png" --write "$out.md" ${3:-} \
        "${rows[@]}"
}

# after COMMAND: runs it, if this is not the plan.
after() { [ -n "$PLAN" ] || "$@"; }

slug() { sed -E 's/--//g; s/[^A-Za-z0-9.:,]+/-/g; s/^-|-$//g' <<< "$1"; }

# call STAGE.py FLAGS: runs it; in the plan, notes it. A signal is passed on, so that training saves before it stops.
call() {
    if [ -n "$PLAN" ]; then echo "$*" >> "$PLAN"; return; fi
    echo "--- $*"
    local started=$SECONDS
    "${launch[@]}" "$@" &
    stage=$!
    wait "$stage" || return
    mkdir -p "$root"
    echo "$((SECONDS - started)) $*" >> "$root/timings.txt"
}
trap 'kill -TERM "${stage:-}" 2> /dev/null; wait "${stage:-}"; exit 143' INT TERM

use "$MODEL"
