"""Runs the experiments on the bundled digits, cell by cell, into docs/results; report.py makes tables of them.

    python reproduce/experiments.py --list            # what docs/results lacks, and how long it would take
    python reproduce/experiments.py                   # computes it; --share 0/2 and --share 1/2: two processes
    python reproduce/experiments.py --only sit-tiny   # cells whose name contains a text
    python reproduce/experiments.py --again 2         # computes two finished cells of each kind anew and compares
    python reproduce/experiments.py --score dit-tiny 0,1,2,3,4,7      # how good is a cut? looked up, or computed

A cell is a way through the stages. `losses`: the loss right after every cut of a scheme. `choice`: what one criterion
keeps. `recovery`: a cut, recovered for some steps, and the Fréchet distance of 500 samples. `teacher`: the distance of
the uncut network. Each is written to out/experiments when it is done, and all to
docs/results at the end. A kill loses one cell.
"""
import argparse
import itertools
import json
import os
import shutil
from pathlib import Path


import engine
import ideas  # noqa: F401  it adds its criteria to those of prune.py
from engine import ROOT, Step, slug
from report import FREE, FRONT, PAPER_BETA, RESULTS, of_shortlist, stored
from table import facts_of

OUT = Path("out/experiments")
LATENTS = Path("out/latents")

FIELDS = {  # what identifies a cell of each kind, and the row that it becomes
    "losses": "model trained teacher_seed scheme",
    "choice": "model trained teacher_seed granularity criterion scheme delta_w search_steps seed",
    "recovery": "model trained teacher_seed granularity kept mode steps beta seed",
    "teacher": "model trained teacher_seed",
}
ABOUT = {
    "losses": "diffusion loss right after the cut, of every cut of the scheme, on 256 fixed draws (draws: on so many "
              "of another seed); trained: of a teacher of so few steps",
    "choice": "seed: of the search, whose recipe is 250 steps of 64; loss: right after the cut; seconds: of the "
              "choice, on a shared machine; draws: the choice was made on losses of so many draws of another seed",
    "recovery": "seed: of the recovery, batch 64, lr 1e-3, EMA 0.999; beta: of L_Rep, else by the rule of distill.py; "
                "fd: Fréchet distance of 500 samples, seed 0, "
                "on the digit classifier's features (DiT: ddim, 20 steps, guidance 1.5; SiT: ode-euler, 20 grid "
                "points; MAR: 8 rounds, guidance 3); right: share read as the digit asked for; "
                "seconds: of the recovery, on a shared machine",
    "teacher": "the uncut network: fd and right as in recovery.json",
}
SAMPLING = {
    "dit-tiny": "--sampler ddim --steps 20",
    "sit-tiny": "--sampler ode-euler --steps 20",
    "mar-tiny": "",
}
TEACHERS = {  # how the bundled weights were trained: steps, and what differs between the families
    "dit-tiny": (11_000, "--batch-size 64 --ema 0.9995"),
    "sit-tiny": (4_000, "--batch-size 64 --ema 0.999"),
    "mar-tiny": (16_000, "--batch-size 32 --ema 0.9995"),
}
ASSUMED = dict(prune=60, distill=0.3, sample=0.03, fid=6)  # seconds a unit, on one core

# ---------------------------------------------------------------------------------------------------------------------
# The plan, the most telling first. A line stands for all combinations of its values. scheme=free: report.FREE.
# kept is a name of CUTS, or front: see `chosen`.

PLAN = """
recovery model=dit-tiny kept=learned steps=100 seed=0,1 mode=masked-kd,rep-kd                      # b by the rule
recovery model=dit-tiny kept=learned steps=100 seed=0,1 mode=masked-kd,rep-kd beta=10
recovery model=dit-tiny kept=learned steps=800 seed=0 mode=masked-kd,rep-kd
recovery model=sit-tiny kept=learned-sit steps=100 seed=0,1 mode=masked-kd,rep-kd,logits-kd
recovery model=sit-tiny kept=learned-sit steps=100 seed=0,1 beta=10
recovery model=mar-tiny kept=learned-mar steps=100 seed=0,1 mode=masked-kd,rep-kd,logits-kd

teacher model=dit-tiny,sit-tiny,mar-tiny
losses model=dit-tiny,sit-tiny,mar-tiny scheme=free
choice model=dit-tiny,sit-tiny,mar-tiny scheme=1:2,free seed=0 criterion=learned,sensitivity,bi,lowest-loss
choice model=dit-tiny,sit-tiny,mar-tiny scheme=free seed=0 criterion=shortlist
choice model=dit-tiny,sit-tiny,mar-tiny scheme=free seed=0,1,2 criterion=random
recovery model=dit-tiny,sit-tiny,mar-tiny kept=front steps=100 seed=0                # tables 1 and 2
teacher model=sit-tiny teacher_seed=1
choice model=sit-tiny teacher_seed=1 scheme=1:2 seed=0 criterion=learned
choice model=sit-tiny teacher_seed=1 scheme=free seed=0 criterion=learned,sensitivity,bi,lowest-loss
choice model=sit-tiny teacher_seed=1 scheme=free seed=0 criterion=shortlist
choice model=sit-tiny teacher_seed=1 scheme=free seed=0,1,2 criterion=random
recovery model=sit-tiny teacher_seed=1 kept=front steps=100 seed=0
teacher model=dit-tiny teacher_seed=1 trained=6000
choice model=dit-tiny teacher_seed=1 trained=6000 scheme=1:2 seed=0 criterion=learned
choice model=dit-tiny teacher_seed=1 trained=6000 scheme=free seed=0 criterion=learned,sensitivity,bi,lowest-loss
choice model=dit-tiny teacher_seed=1 trained=6000 scheme=free seed=0 criterion=shortlist
choice model=dit-tiny teacher_seed=1 trained=6000 scheme=free seed=0,1,2 criterion=random
recovery model=dit-tiny teacher_seed=1 trained=6000 kept=front steps=100 seed=0
teacher model=sit-tiny teacher_seed=2
choice model=sit-tiny teacher_seed=2 scheme=1:2 seed=0 criterion=learned
choice model=sit-tiny teacher_seed=2 scheme=free seed=0 criterion=learned,sensitivity,bi,lowest-loss
choice model=sit-tiny teacher_seed=2 scheme=free seed=0 criterion=shortlist
choice model=sit-tiny teacher_seed=2 scheme=free seed=0,1,2 criterion=random
recovery model=sit-tiny teacher_seed=2 kept=front steps=100 seed=0
choice model=dit-tiny,sit-tiny,mar-tiny scheme=free seed=0 criterion=learned search_steps=2500
choice model=dit-tiny,sit-tiny,mar-tiny scheme=free seed=0 criterion=gates
recovery model=dit-tiny,sit-tiny,mar-tiny kept=front steps=100 seed=1
recovery model=dit-tiny kept=lowest,learned steps=800 seed=0

choice model=dit-tiny scheme=1:2,2:4,6:12 seed=0,1,2 criterion=learned               # table 4
choice model=dit-tiny scheme=1:2,2:4,6:12 seed=0,1,2 criterion=learned delta_w=full,frozen

choice model=dit-tiny scheme=1:2 seed=3,4 criterion=learned
choice model=dit-tiny,sit-tiny,mar-tiny scheme=2:4,6:12 seed=0 criterion=learned,sensitivity granularity=sublayer

recovery model=dit-tiny kept=grid steps=100 seed=0 beta=paper                        # figure 5, complete
recovery model=dit-tiny kept=panel,panel-ends steps=25,400 seed=0 beta=paper
recovery model=dit-tiny kept=panel,panel-ends steps=100 seed=1 beta=paper
recovery model=dit-tiny kept=spread,spread-more steps=100 seed=0 beta=paper
recovery model=dit-tiny kept=lowest,median steps=25,400,800 seed=0 beta=paper
recovery model=dit-tiny kept=learned steps=100 seed=0,1,2 mode=finetune,logits-kd,rep-kd,masked-kd beta=paper
recovery model=dit-tiny kept=learned steps=800 seed=0 mode=finetune,logits-kd,rep-kd,masked-kd beta=paper
recovery model=dit-tiny,sit-tiny,mar-tiny kept=front steps=100 seed=0 granularity=sublayer beta=paper
recovery model=dit-tiny kept=lowest,learned,worst steps=1600 seed=0 beta=paper
"""
# Cuts of dit-tiny. learned: by the search at 1:2. lowest, median: in the loss, of all 924 cuts to 6. worst: of 1:2,
# after 100 steps. panel: of 1:2, spread over the ranks of their distances after 100 steps. spread: of all, spread over
# the ranks of their losses.
NAMED_CUTS = """
learned: 0 2 4 7 8 11
lowest: 0 1 2 3 4 7
median: 1 3 4 7 9 10
worst: 1 2 5 6 9 10
panel: 1 2 4 7 9 11, 0 3 4 6 8 11, 0 3 5 7 8 11, 1 3 5 7 8 11, 1 2 5 7 8 11, 0 2 4 6 9 10, 1 2 4 6 8 10, 0 3 5 6 9 10
panel-ends: 1 2 5 6 9 10, 0 2 4 7 8 11
spread: 0 1 2 3 4 7, 0 1 4 7 9 11, 0 1 3 6 7 10, 0 1 5 6 7 9, 1 2 3 5 7 11, 1 3 4 6 7 11, 0 2 5 6 8 11, 1 3 4 7 9 10
spread-more: 0 2 4 7 9 10, 0 2 5 6 7 9, 0 4 5 9 10 11, 2 3 8 9 10 11, 3 5 6 7 9 11, 2 4 6 8 9 10, 4 5 6 7 8 10
learned-sit: 0 2 4 7 9 10
learned-mar: 0 2 5 6 8 10
"""
CUTS = dict(grid=[" ".join(kept) for kept in itertools.product("01", "23", "45", "67", "89", ["10", "11"])])  # 1:2
for line in NAMED_CUTS.strip().splitlines():
    cuts_name, cuts = line.split(": ")
    CUTS[cuts_name] = cuts.split(", ")


def plan(rows):
    """Every cell. rows: what is known by now, as later cells recover what earlier ones chose."""
    planned = {}
    for line in filter(None, PLAN.splitlines()):
        kind, *words = line.split("#")[0].split()
        settings = dict(word.split("=") for word in words)
        for values in itertools.product(*[text.split(",") for text in settings.values()]):
            row = dict(kind=kind) | dict(zip(settings, map(number, values)))
            for cell in spelled_out(row, rows):
                planned.setdefault(name(cell), cell)
    return list(planned.values())


def spelled_out(row, rows):
    """The cells that a combination of values stands for."""
    if row["kind"] == "recovery":
        row.setdefault("mode", "masked-kd")
        if row.get("beta") == "paper":
            row["beta"] = PAPER_BETA[row["model"]]
        if row["mode"] in ("finetune", "logits-kd"):
            row.pop("beta", None)
    if row.get("scheme") == "free":
        row["scheme"] = FREE[row["model"]]
    kept = row.get("kept")
    if kept is None:
        return [row]
    cuts = chosen(rows, row) if kept == "front" else CUTS[kept]
    return [row | dict(kept=cut) for cut in cuts]


def chosen(rows, wanted):
    """The cuts to half the layers that the criteria of the README's table chose."""
    depth = 12 if "granularity" in wanted else 6
    found = set()
    for row in rows:
        if row["kind"] == "choice" and row["model"] == wanted["model"] and source_of(row) == source_of(wanted):
            unconstrained = row["scheme"] == FREE[row["model"]] or "granularity" in row
            in_table = row["criterion"] == "learned" or row["criterion"] in (*FRONT, "gates") and unconstrained
            if in_table and len(row["kept"].split()) == depth:
                found.add(row["kept"])
                if "tried" in row:
                    found.add(of_shortlist(row, 12))
    return sorted(found)


def number(text):
    """A setting in a text is a number or a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def source_of(row):
    """Which network is cut, and into what, where it isn't the bundled one into blocks."""
    return {key: row[key] for key in ("trained", "teacher_seed", "granularity") if key in row}


def name(row):
    """What identifies a cell, and the row that it becomes."""
    words = [row["kind"]]
    for field in FIELDS[row["kind"]].split():
        if row.get(field) is not None:
            value = str(row[field]).replace(" ", ",")
            words.append(f"{field}={value}" if field in ("teacher_seed", "search_steps", "beta") else value)
    return " ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# A cell: the command lines that a reader would type, and what they leave.

TRAIN = f"--latents {LATENTS} --dtype float32 --device cpu"
MORE = dict(prune=TRAIN, distill=TRAIN, sample="--num-images 500 --batch-size 32 --device cpu", fid="--device cpu")


def teacher(row):
    """A teacher like the bundled one, of another seed or after fewer steps; kept, since many cells need it."""
    model = row["model"]
    steps, flags = TEACHERS[model]
    steps = row.get("trained", steps)
    seed = row.get("teacher_seed", 0)
    recipe = f"--mode scratch --model {model} --lr 1.5e-3 --lr-end 0.01 --warmup 200 {flags}"
    folder = OUT / f"teacher-{model}-{steps}-{seed}"
    return Step("distill", model, folder, f"{recipe} --steps {steps} --seed {seed} {TRAIN}")


def steps_of(row, work):
    """What a cell needs: what other cells need too, which is kept, then its own, in the folder `work`."""
    model = row["model"]
    source = f"--model {model}"
    steps = []
    if "trained" in row or "teacher_seed" in row:
        steps.append(teacher(row))
        source = f"--ckpt {steps[-1].folder}/student.pt"
    if row["kind"] == "teacher":
        return steps + engine.way(model, work, source, "", "", [SAMPLING[model]], MORE)
    recovery = ""
    samplings = []
    if "kept" in row:
        cut = f"--criterion indices --layers {row['kept'].replace(' ', ',')} --scheme {scheme_of(row)}"
    else:
        cut = f"--criterion {row.get('criterion', 'lowest-loss')} --scheme {row['scheme']} --seed {row.get('seed', 0)}"
    cut += options(row, delta_w="--delta-w", granularity="--granularity", search_steps="--steps")
    if row["kind"] == "recovery":
        recovery = f"--mode {row['mode']} --steps {row['steps']} --seed {row['seed']}"
        recovery += options(row, beta="--beta")
        samplings = [SAMPLING[model]]
    return steps + engine.way(model, work, source, cut, recovery, samplings, MORE)


def folders(steps, stage):
    return [step.folder for step in steps if step.stage == stage]


def options(row, **flags):
    """The flags of those settings that the row has."""
    return "".join(f" {flag} {row[key]}" for key, flag in flags.items() if key in row)


def scheme_of(row):
    """Keep so many of any layers of a list: MAR has two lists."""
    lists = 2 if row["model"] == "mar-tiny" else 1
    layers = 24 if "granularity" in row else 12
    return f"{len(row['kept'].split()) // lists}:{layers // lists}"


def compute(row):
    """The finished row of a cell."""
    work = OUT / slug(f"work {name(row)}")
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    steps = steps_of(row, work)
    notes = engine.run(steps)
    found = result_of(row, steps, notes)
    shutil.rmtree(work)
    return row | found


def result_of(row, steps, notes):
    if row["kind"] == "teacher":
        return distance(folders(steps, "fid")[-1])
    cut = folders(steps, "prune")[-1]
    if row["kind"] == "recovery":
        return distance(folders(steps, "fid")[-1]) | dict(seconds=notes["distill"]["seconds"])
    log = [json.loads(line) for line in (cut / "log.jsonl").read_text().splitlines()]
    if row["kind"] == "losses":
        tried = next(line for line in log if "losses" in line)
        cuts = [" ".join(map(str, kept)) for kept in tried["cuts"]]
        return dict(losses={kept: round(loss, 4) for kept, loss in zip(cuts, tried["losses"])})
    loss = round(log[-1]["calibration_loss"], 4)
    found = dict(kept=" ".join(map(str, log[-1]["cut"])), loss=loss, seconds=notes["prune"]["seconds"])
    for line in log:
        for key in ("confidence", "scores"):
            if key in line:
                found[key] = [round(value, 5) for value in line[key]]
        if "cuts" in line and row["criterion"] == "shortlist":
            cuts = [" ".join(map(str, kept)) for kept in line["cuts"]]
            found["tried"] = {kept: round(loss, 4) for kept, loss in zip(cuts, line["losses"])}
    return found


def distance(samples):
    """Not a number where the recovery diverged."""
    facts = dict(fid=float("nan"), accuracy=float("nan")) | facts_of(samples)
    return dict(fd=round(facts["fid"], 4), right=round(facts["accuracy"], 4))


# ---------------------------------------------------------------------------------------------------------------------
# Keeping what is known: docs/results/KIND.json, and OUT for cells that just ended.


def known():
    """All finished rows."""
    rows = []
    for kind in FIELDS:
        rows += [dict(kind=kind) | row for row in stored(kind)]
    rows += [json.loads(file.read_text()) for file in sorted(OUT.glob("*.json"))]
    return list({name(row): row for row in rows}.values())


def write(rows):
    """docs/results: a file per kind, a row per line."""
    for kind, about in ABOUT.items():
        head = json.dumps(dict(command="python reproduce/experiments.py", settings=about), ensure_ascii=False)
        lines = []
        for row in sorted(rows, key=name):
            if row["kind"] == kind:
                lines.append(json.dumps({k: v for k, v in row.items() if k != "kind"}))
        text = ",\n".join(lines)
        (RESULTS / f"{kind}.json").write_text(f'{{"about": {head},\n"rows": [\n{text}\n]}}\n')


def seconds_of(rows):
    """{kind of step: [seconds a unit, ...]}, for the estimate."""
    found = {}
    for row in rows:
        if "seconds" in row:
            stage = "distill" if row["kind"] == "recovery" else "prune"
            found.setdefault(f"{stage} {row['model']}", []).append(row["seconds"] / row.get("steps", 1))
    return found


def again(count, only):
    """Computes finished cells from their settings, and says whether the result is the same."""
    for kind, result in dict(losses="losses", choice="kept", recovery="fd").items():
        rows = [row for row in known() if row["kind"] == kind and only in name(row) and "draws" not in row]
        for row in rows[:count]:
            new = compute({key: row[key] for key in ("kind", *FIELDS[kind].split()) if key in row})
            print("same" if new[result] == row[result] else f"DIFFERS, {new[result]}", name(row))


def score(model, layers):
    """Prints a cut's distance after 100 steps of recovery, and its rank among the cuts whose distance is known."""
    kept = layers.replace(",", " ")
    cell = dict(kind="recovery", model=model, kept=kept, mode="masked-kd", steps=100, seed=0)
    found = {}
    for row in known():
        if name(row) == name(cell | dict(kept=row.get("kept"))):
            found[row["kept"]] = row["fd"]
    if kept not in found:
        found[kept] = compute(cell)["fd"]
    rank = 1 + sum(fd < found[kept] for fd in found.values())
    print(f"{model}, layers {kept}: FD {found[kept]:.2f} after 100 steps, rank {rank} of {len(found)} known cuts")


def missing(rows, only):
    """The cells of the plan that have no row."""
    have = {name(row) for row in rows}
    return [cell for cell in plan(rows) if name(cell) not in have and only in name(cell)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print what is left, with an estimate, and stop")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cells whose name contains it")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every Nth cell from the Ith, counted from 0")
    parser.add_argument("--score", nargs=2, metavar=("MODEL", "I,J,..."), help="print the distance and rank of a cut")
    parser.add_argument("--again", type=int, default=0, metavar="N", help="compute N of each kind anew, and compare")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.list:
        left = missing(known(), args.only)
        steps = [step for cell in left for step in steps_of(cell, OUT / slug(name(cell)))]
        print("\n".join(map(name, left)), engine.estimate(steps, seconds_of(known()), ASSUMED), sep="\n\n")
        return
    engine.run([Step("extract_latents", "digits", LATENTS, "--device cpu")])
    if args.score:
        return score(*args.score)
    if args.again:
        return again(args.again, args.only)
    first, step = map(int, args.share.split("/"))
    while left := missing(known(), args.only)[first::step]:  # anew each time: later cells recover what these choose
        for cell in left:
            file = OUT / f"{slug(name(cell))}.json"
            if not file.exists():  # by the other process, whose list may be another by now
                file.write_text(json.dumps(compute(cell)))
                print(name(cell), flush=True)
    write(known())


if __name__ == "__main__":
    main()
