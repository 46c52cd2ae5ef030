"""Repeats the paper's tables and figures, with the paper's numbers beside: on the digits, or on ImageNet.

    python reproduce/paper.py table5                              # dit-tiny, on a laptop
    python reproduce/paper.py table5 --list                       # how long it may take
    python reproduce/paper.py table5 --model dit-xl --gpus 8 --extract "--data imagenet/train"

A row is a cut, its recovery, its samples, and their FID. Its folder below --out is named after its flags, so tables
share what they have in common; what is finished is kept, and the same command goes on after a kill. (Flags given with
--extract, --prune, --distill, --sample are not in the names: with others, choose another --out.) The table is written
to --out, too. There are tables 1, 2, 3 (with figure 5), 4, 5, 7, 8 and figures 4 and 14.
The other criteria may keep any of the layers, as in the paper.
"""
import argparse
import json
import os
from pathlib import Path

import torch

import engine
from engine import ROOT, Step, slug
from model import MODELS, build_model
from table import facts_of, show

# First the sizes, on the digits and on ImageNet: steps of a recovery, and of a long one; images; and which numbers the
# paper has. Then a line for each row: name | the paper's numbers | flags of prune.py | of distill.py | of sample.py |
# another model. {...} is what `values_of` says; STUDENT is the folder of the recovery.
TABLES = {
    "table1": """steps: 100 100000; long: 800 500000; images: 1000 50000; paper: IS FID sFID prec. rec.
teacher                | 278.24 2.27 4.60 0.83 0.57
bi, two thirds         | 132.79 7.93 5.25 0.76 0.53 | --scheme {more} --criterion bi | --mode finetune {short}
two thirds, KD         | 242.29 2.90 4.63 0.84 0.54 | --scheme {d19} | --mode masked-kd {short}
two thirds, KD, long   | 251.02 2.55 4.57 0.83 0.55 | --scheme {d19} | --mode masked-kd {long}
bi                     | 66.10 22.28 6.20 0.63 0.56 | --scheme {free} --criterion bi | --mode finetune {short}
flux-lite              | 54.54 25.92 5.98 0.62 0.55 | --scheme {free} --criterion flux-lite | --mode finetune {short}
sensitivity            | 70.36 21.15 6.22 0.63 0.57 | --scheme {free} --criterion sensitivity | --mode finetune {short}
oracle                 | 141.18 7.43 6.09 0.75 0.55 | --scheme {free} --criterion oracle | --mode finetune {short}
learned                | 151.88 5.73 4.91 0.80 0.55 | --scheme 1:2 | --mode finetune {short}
learned, long          | 198.85 3.92 5.69 0.78 0.58 | --scheme 1:2 | --mode finetune {long}
learned, KD            | 207.27 3.73 5.04 0.81 0.54 | --scheme 1:2 | --mode masked-kd {short}
learned, KD, long      | 234.50 2.86 4.75 0.82 0.55 | --scheme 1:2 | --mode masked-kd {long}
halved again, KD, long | 166.91 5.87 5.43 0.78 0.53 | --scheme 1:2 --ckpt {half} | --mode masked-kd {long}""",
    "table2": """steps: 800 500000; long: 800 500000; images: 1000 50000; paper: IS FID
{dit}       | 278.24 2.27 | | | | {dit}
{dit}, half | 234.50 2.86 | --scheme 1:2 | --mode masked-kd {short} | | {dit}
{sit}       | 277.5 2.06 | | | | {sit}
{sit}, half | 220.1 3.02 | --scheme 1:2 | --mode masked-kd {short} | | {sit}
{mar}       | 296.0 1.78 | | | | {mar}
{mar}, half | 283.4 2.28 | --scheme 1:2 | --mode masked-kd --steps {mar_steps} | | {mar}""",
    "table3": """steps: 800 100000; long: 800 100000; images: 1000 50000; paper: IS FID
min. loss    | 73.10 20.69 | --scheme {free} --criterion lowest-loss --candidates {candidates} | --mode finetune {short}
median loss  | 149.51 6.45 | --scheme {free} --criterion indices --layers {median} | --mode finetune {short}
max. loss    | - NaN | --scheme {free} --criterion indices --layers {highest} | --mode finetune {short}
sensitivity  | 70.36 21.15 | --scheme {free} --criterion sensitivity | --mode finetune {short}
bi           | 66.10 22.28 | --scheme {free} --criterion bi | --mode finetune {short}
flux-lite    | 54.54 25.92 | --scheme {free} --criterion flux-lite | --mode finetune {short}
oracle       | 141.18 7.43 | --scheme {free} --criterion oracle | --mode finetune {short}
learned      | 151.88 5.73 | --scheme 1:2 | --mode finetune {short}""",
    "table4": """steps: 100 10000; long: 100 10000; images: 1000 10000; paper: IS FID
LoRA, 1:2      | 54.75 33.39 | --scheme 1:2 | --mode finetune {short} | {faster}
LoRA, 2:4      | 53.07 34.21 | --scheme 2:4 | --mode finetune {short} | {faster}
LoRA, {wide}   | 34.97 49.41 | --scheme {wide} | --mode finetune {short} | {faster}
full, 1:2      | 53.11 35.77 | --scheme 1:2 --delta-w full | --mode finetune {short} | {faster}
full, 2:4      | 53.63 34.41 | --scheme 2:4 --delta-w full | --mode finetune {short} | {faster}
full, {wide}   | 45.03 38.76 | --scheme {wide} --delta-w full | --mode finetune {short} | {faster}
frozen, 1:2    | 45.08 39.56 | --scheme 1:2 --delta-w frozen | --mode finetune {short} | {faster}
frozen, 2:4    | 48.09 37.82 | --scheme 2:4 --delta-w frozen | --mode finetune {short} | {faster}
frozen, {wide} | 34.09 49.75 | --scheme {wide} --delta-w frozen | --mode finetune {short} | {faster}""",
    "table5": """steps: 800 100000; long: 800 100000; images: 1000 50000; paper: FID
fine-tuning          | 5.79 | --scheme 1:2 | --mode finetune {short}
logits KD            | 4.66 | --scheme 1:2 | --mode logits-kd {short}
RepKD                | NaN | --scheme 1:2 | --mode rep-kd {short}
masked KD, 0.1 sigma | NaN | --scheme 1:2 | --mode masked-kd {short} --mask-sigma 0.1
masked KD, 2 sigma   | 3.73 | --scheme 1:2 | --mode masked-kd {short}
masked KD, 4 sigma   | 3.75 | --scheme 1:2 | --mode masked-kd {short} --mask-sigma 4""",
    "table7": """steps: 800 10000; long: 800 500000; images: 1000 50000; paper: IS FID
the half itself | - - | --scheme 1:2 | --mode masked-kd {long} | {raw}
all, from all   | 29.46 56.18 | --scheme 1:4 | --mode masked-kd {short} | {raw}
all, from half  | 51.96 36.69 | --scheme 1:2 --ckpt {half} | --mode masked-kd {short} --teacher {model} | {raw}
half, from all  | 28.30 58.73 | --scheme 1:4 | --mode masked-kd {short} --teacher {half} | {raw}
half, from half | 57.97 32.47 | --scheme 1:2 --ckpt {half} | --mode masked-kd {short} | {raw}""",
    "table8": """steps: 800 100000; long: 800 100000; images: 1000 50000; paper: IS FID
the recipe's lr | 207.27 3.73 | --scheme 1:2 | --mode masked-kd {short}
half of it      | 194.31 4.10 | --scheme 1:2 | --mode masked-kd {short} --lr {half_lr}
a quarter of it | 161.40 6.63 | --scheme 1:2 | --mode masked-kd {short} --lr {quarter_lr}""",
    "figure4": """steps: 1 1; long: 1 1; images: 256 512; paper:
all layers |
3/4        | | --criterion oracle --scheme {three_quarters}
2/3        | | --criterion oracle --scheme {two_thirds}
1/2        | | --criterion oracle --scheme {free}
1/3        | | --criterion oracle --scheme {third}
1/4        | | --criterion oracle --scheme {quarter}""",
    "figure14": """steps: 800 500000; long: 800 500000; images: 1000 50000; paper:
fine-tuning, 1/5 of the steps | | --scheme 1:2 | --mode finetune {long} | {at_1}
fine-tuning, 2/5 of the steps | | --scheme 1:2 | --mode finetune {long} | {at_2}
fine-tuning, 3/5 of the steps | | --scheme 1:2 | --mode finetune {long} | {at_3}
fine-tuning, 4/5 of the steps | | --scheme 1:2 | --mode finetune {long} | {at_4}
fine-tuning, 5/5 of the steps | | --scheme 1:2 | --mode finetune {long}
logits KD, 1/5 of the steps | | --scheme 1:2 | --mode logits-kd {long} | {at_1}
logits KD, 2/5 of the steps | | --scheme 1:2 | --mode logits-kd {long} | {at_2}
logits KD, 3/5 of the steps | | --scheme 1:2 | --mode logits-kd {long} | {at_3}
logits KD, 4/5 of the steps | | --scheme 1:2 | --mode logits-kd {long} | {at_4}
logits KD, 5/5 of the steps | | --scheme 1:2 | --mode logits-kd {long}
masked KD, 1/5 of the steps | | --scheme 1:2 | --mode masked-kd {long} | {at_1}
masked KD, 2/5 of the steps | | --scheme 1:2 | --mode masked-kd {long} | {at_2}
masked KD, 3/5 of the steps | | --scheme 1:2 | --mode masked-kd {long} | {at_3}
masked KD, 4/5 of the steps | | --scheme 1:2 | --mode masked-kd {long} | {at_4}
masked KD, 5/5 of the steps | | --scheme 1:2 | --mode masked-kd {long}""",
}
# What differs between the digits and ImageNet.
SCALES = """
ref        | digits   | imagenet256
dit        | dit-tiny | dit-xl
sit        | sit-tiny | sit-xl
mar        | mar-tiny | mar-large
more       | 8:12     | 19:28
d19        | 2:3      | 3:4,3:4,2:4,3:4,2:4,3:4,3:4
wide       | 3:6      | 7:14
mar_steps  | 800      | 200000
half_lr    | 5e-4     | 1e-4
quarter_lr | 2.5e-4   | 5e-5
candidates | 1000     | 100000
faster     |          | --steps 64
raw        | --weights model | --weights model --steps 64
"""
# Seconds a unit where nothing was measured: of the digits on one core; of ImageNet on one GPU, a guess for an A100.
ASSUMED = [
    dict(extract_latents=12, prune=60, distill=0.2, sample=0.06, fid=10),
    dict(extract_latents=5800, prune=5000, distill=1.2, sample=0.5, fid=600),
]


def values_of(args):
    """What stands for {...} in the tables."""
    values = dict(model=args.model)
    for line in SCALES.strip().splitlines():
        name, *sizes = [cell.strip() for cell in line.split("|")]
        values[name] = sizes[args.scale]
    for words in TABLES[args.table].splitlines()[0].split("; "):
        name, sizes = words.split(":")
        values[name] = sizes.split() if name == "paper" else int(sizes.split()[args.scale])
    steps = args.steps or values["steps"]
    long = steps * values["long"] // values["steps"]
    values["mar_steps"] = args.steps or values["mar_steps"]
    values["short"] = f"--steps {steps}"
    values["long"] = f"--steps {long} --save-every {long // 5} --keep 9"
    for part in range(1, 5):
        values[f"at_{part}"] = f"--ckpt STUDENT/step-{long // 5 * part:08}.pt"

    with torch.device("meta"):  # shapes without memory
        depth = build_model(args.model).depths()[0]
    for name, share in dict(three_quarters=3 / 4, two_thirds=2 / 3, free=1 / 2, third=1 / 3, quarter=1 / 4).items():
        values[name] = f"{round(share * depth)}:{depth}"
    root = args.out / args.model
    values["half"] = root / slug("cut --scheme 1:2") / slug(f"--mode masked-kd {values['long']}") / "student.pt"
    search = slug("cut --scheme {free} --criterion lowest-loss --candidates {candidates}".format(**values))
    order = cuts_by_loss(root / search)
    values["median"] = order[len(order) // 2]
    values["highest"] = order[-1]
    return values


def cuts_by_loss(folder):
    """What a search for the lowest loss tried, the lowest first."""
    log = folder / "log.jsonl"
    if not log.exists():
        return ["unknown"]  # until it has run
    tried = json.loads(log.read_text().splitlines()[0])
    return [",".join(map(str, cut)) for _, cut in sorted(zip(tried["losses"], tried["cuts"]))]


def row_of(line, args, values):
    """-> name, the paper's numbers, steps."""
    cells = [cell.strip() for cell in line.format(**values).split("|")]
    name, paper, cut, recovery, sampling, model = cells + [""] * (6 - len(cells))
    model = model or args.model
    vae = MODELS[model]["vae"]
    latents = args.latents if vae != "kl16" else f"{args.latents}-kl16"
    more = dict(
        prune=f"--latents {latents} {args.prune}", distill=f"--latents {latents} {args.distill}", sample=args.sample,
        fid="" if args.table == "figure4" else f"--ref {values['ref']}")
    extract = Step("extract_latents", vae, Path(latents), f"--vae {vae} {args.extract}")
    samplings = [f"--num-images {values['images']} {sampling}"]
    way = engine.way(model, args.out / model, f"--model {model}", cut, recovery, samplings, more)
    return name, paper.split(), [extract, *way]


def loss_after(folder):
    """Of the cut in this folder or one above: what prune.py logged last."""
    for above in folder.parents:
        if (above / "shallow.pt").exists():
            last = (above / "log.jsonl").read_text().splitlines()[-1]
            return dict(cut_loss=json.loads(last)["calibration_loss"])
    return {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    add("--list", action="store_true", help="print how long it may take, and stop")
    add("--model", default="dit-tiny", choices=MODELS, metavar="NAME", help="default: %(default)s")
    add("--gpus", type=int, default=1, help="ranks on this machine, one per GPU (default: %(default)s)")
    add("--latents", default="out/latents", help="default: %(default)s; for MAR: the same with -kl16")
    add("--steps", type=int, help="of each recovery (default: the table's)")
    for flag in ("--extract", "--prune", "--distill", "--sample"):
        add(flag, default="", metavar="FLAGS", help=f'more flags of that stage, as in {flag}="--batch-size 64"')
    add("--out", type=Path, default=Path("out/paper"), help="default: %(default)s")
    args = parser.parse_args()
    os.chdir(ROOT)
    args.scale = 0 if MODELS[args.model]["vae"] == "digits" else 1
    lines = TABLES[args.table].splitlines()[1:]
    if args.list:
        values = values_of(args)
        steps = [step for line in lines for step in row_of(line, args, values)[-1]]
        assumed = {stage: seconds / args.gpus for stage, seconds in ASSUMED[args.scale].items()}
        return print(engine.estimate(steps, engine.timings(args.out), assumed))

    cells = []
    for line in lines:
        values = values_of(args)  # anew for each row: table 3 needs what its first row found
        name, paper, steps = row_of(line, args, values)
        notes = engine.run(steps, args.gpus)
        samples = steps[-1].folder
        (samples / "samples.npz").unlink(missing_ok=True)  # at ImageNet size, 10 GB
        facts = facts_of(samples) | loss_after(samples)
        if any(note["diverged"] for note in notes.values()):
            facts["missing"] = "diverged"
        cells.append((name, facts, paper or ["-"] * len(values["paper"])))
    text = show(cells, values["paper"])
    print(text)
    (args.out / f"{args.model}-{args.table}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
