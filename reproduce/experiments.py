"""Runs the experiments behind the README's tables on the bundled digits, cell by cell, into docs/results.

    python reproduce/experiments.py --list            # which cells docs/results lacks, and how long they would take
    python reproduce/experiments.py                   # computes them; --share 0/2 and --share 1/2: two processes
    python reproduce/experiments.py --only sit-tiny   # cells whose name contains a text
    python reproduce/experiments.py --only speed      # the timings, which the others leave out: while nothing else runs
    python reproduce/experiments.py --again 2         # computes two finished cells of each kind anew and compares
    python reproduce/experiments.py --tables          # the tables, by report.py, which draws the pictures too

A cell is a way through the stages. `losses`: the loss right after every cut of a scheme (prune.py --criterion
lowest-loss). `choice`: what one criterion keeps. `recovery`: a cut, recovered for some steps, and the Fréchet distance
of 500 samples. `speed`: a cut's forward pass. Each is written when it is done, so a kill loses one cell.
"""
import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "reproduce")]
RESULTS, OUT = ROOT / "docs" / "results", ROOT / "out" / "experiments"
FILES = {  # kind: (the fields that name a cell, how it was made)
    "losses": ("model trained scheme", "diffusion loss right after the cut, of every cut of the scheme, on 256 fixed "
               "draws (draws: on so many of another seed); trained: of a teacher of so few steps"),
    "choice": ("model trained granularity parent criterion scheme delta_w seed",
               "seed: of the search, whose recipe is 250 steps of 64; loss: right after the cut; seconds: of the "
               "choice, on a shared machine; draws: the choice was made on losses of so many draws of another seed"),
    "recovery": ("model trained granularity parent kept teacher mode steps lr sigma seed",
                 "seed: of the recovery, batch 64, lr 1e-3, EMA 0.999; parent: the layers of a half, recovered for 800 "
                 "steps, that was cut again; teacher: whole or half; fd: Fréchet distance of 500 samples, seed 0, "
                 "on the digit classifier's features (DiT: ddim, 20 steps, guidance 1.5; SiT: ode-euler, 20 grid "
                 "points; MAR: 8 rounds, guidance 3); right: share read as the digit asked for; at: fd of earlier "
                 "steps of the same run; seconds: of the recovery, on a shared machine"),
    "speed": ("model granularity kept", "milliseconds of a forward pass of 32 rows, and of the uncut network's in turn "
              "with it: medians of 15; on all cores")}
FREE = {"dit-tiny": "6:12", "sit-tiny": "6:12", "mar-tiny": "3:6"}  # a group of MAR is of encoder or decoder
SAMPLING = {"dit-tiny": "--sampler ddim --steps 20", "sit-tiny": "--sampler ode-euler --steps 20", "mar-tiny": ""}
SPREAD = ["0 1 2 3 4 7", "0 1 4 7 9 11", "0 1 3 6 7 10", "0 1 5 6 7 9", "1 2 3 5 7 11", "1 3 4 6 7 11", "0 2 5 6 8 11",
          "1 3 4 7 9 10", "0 2 4 7 9 10", "0 2 5 6 7 9", "0 4 5 9 10 11", "2 3 8 9 10 11", "3 5 6 7 9 11",
          "2 4 6 8 9 10", "4 5 6 7 8 10"]  # of all 924, evenly over the ranks of their losses on 512 draws

# ---------------------------------------------------------------------------------------------------------------------
# The plan: every cell, the most telling first.


def cell(kind: str, **settings) -> dict:
    if "kept" in settings and not isinstance(settings["kept"], str):
        settings["kept"] = " ".join(map(str, settings["kept"]))
    return dict(kind=kind, **settings)


def name(row: dict) -> str:
    """What identifies a cell, and the row that it becomes."""
    fields = [row[k] for k in FILES[row["kind"]][0].split() if row.get(k) is not None]
    return " ".join([row["kind"], *[str(v).replace(" ", ",") for v in fields]])


def recovery(model, kept, steps, seed=0, mode="masked-kd", **more) -> dict:
    return cell("recovery", model=model, kept=kept, mode=mode, steps=steps, **more, seed=seed)


def plan(rows: list):
    """rows: what is known by now, as later cells recover what earlier ones chose."""
    loss = {(r["model"], r["scheme"]): r["losses"] for r in rows if r["kind"] == "losses" and "trained" not in r}
    plain = [r for r in rows if r["kind"] == "choice" and not {"trained", "granularity", "parent"} & {*r}]
    picked = lambda model, scheme, **more: {r["kept"] for r in plain if (r["model"], r["scheme"]) == (model, scheme)
                                            and more.items() <= r.items() and ("delta_w" not in r or more)}
    yield from (cell("losses", model=model, scheme=scheme) for model, scheme in FREE.items())
    yield from (cell("losses", model="dit-tiny", scheme=scheme) for scheme in ("4:12", "3:12"))
    for model, free in FREE.items():  # tables 1 and 2, and the rivals
        for scheme in ("1:2", free):
            for criterion in ("bi", "flux-lite", "sensitivity", "probe", "oracle", "lowest-loss", "learned",
                              "distilled", "greedy", "adapted", "halving"):
                yield cell("choice", model=model, criterion=criterion, scheme=scheme, seed=0)
        yield from (cell("choice", model=model, criterion="random", scheme="1:2", seed=seed) for seed in range(3))
    for criterion, scheme, seeds in (
            ("learned", "1:2", 5), ("learned", "3:6", 2), ("learned", "6:12", 2), ("distilled", "1:2", 3),
            ("distilled", "6:12", 2), ("adapted", "1:2", 2), ("adapted", "6:12", 2), ("halving", "1:2", 2),
            ("halving", "6:12", 2), ("learned", "1:3", 2), ("learned", "4:12", 1), ("learned", "1:4", 2),
            ("learned", "3:12", 1), ("random", "1:3", 3), ("random", "1:4", 3)):  # the last ones: where depth is scarce
        yield from (cell("choice", model="dit-tiny", criterion=criterion, scheme=scheme, seed=k) for k in range(seeds))

    grid = [" ".join(map(str, c)) for c in itertools.product(*[(2 * g, 2 * g + 1) for g in range(6)])]
    yield from (recovery("dit-tiny", kept, 100) for kept in grid)  # the whole space of 1:2: figure 5, complete
    wanted = {name(recovery("dit-tiny", kept, 100)) for kept in grid}
    done = {row["kept"]: row["fd"] for row in rows if name(row) in wanted}
    learned, lowest = "0 2 4 7 8 11", "1 2 4 7 9 11"  # of 1:2
    order = sorted(done, key=done.get) if len(done) == len(grid) else []
    panel = dict.fromkeys([*[order[round(i * 63 / 8)] for i in range(9)], lowest, learned] if order else [])
    for steps, seed in (25, 0), (100, 1), (400, 0):  # cuts spread over the ranks: other lengths, and another seed
        yield from (recovery("dit-tiny", kept, steps, seed) for kept in panel)
    yield from (recovery("dit-tiny", kept, 100) for kept in SPREAD)  # free of 1:2
    yield from (recovery("dit-tiny", kept, steps) for kept in (SPREAD[0], SPREAD[7]) for steps in (25, 400, 800))
    for mode in ("masked-kd", "finetune", "logits-kd", "rep-kd"):  # table 5 and figure 14
        yield from (recovery("dit-tiny", learned, 100, seed, mode) for seed in range(3))
        yield recovery("dit-tiny", learned, 800, 0, mode, at=[200, 400])
    yield from (recovery("dit-tiny", SPREAD[0], steps, mode=mode) for mode in ("finetune", "logits-kd")
                for steps in (100, 800))
    chosen = {model: sorted(picked(model, "1:2") | picked(model, "3:6") | picked(model, "6:12")) for model in FREE}
    yield from (recovery(model, kept, 100) for model in FREE for kept in chosen[model])  # what the criteria chose
    yield from (cell("choice", model=model, criterion=criterion, scheme="1:2", seed=seed)  # the best idea, again
                for model in ("sit-tiny", "mar-tiny") for criterion in ("learned", "adapted") for seed in (1, 2))
    rivals = set.union(*(picked("mar-tiny", "1:2", criterion=k) for k in ("learned", "adapted", "lowest-loss")))
    yield from (recovery("mar-tiny", kept, 100, 1) for kept in sorted(rivals))
    yield from (recovery("sit-tiny", kept, 100, 1) for kept in chosen["sit-tiny"])
    for groups, free in ((4, "4:12"), (3, "3:12")):
        of_all = loss.get(("dit-tiny", free), {})
        of_grid = [k for k in of_all if len({int(i) // (12 // groups) for i in k.split()}) == groups]
        kept = picked("dit-tiny", f"1:{12 // groups}") | picked("dit-tiny", free)
        kept |= {min(cuts, key=of_all.get) for cuts in (of_all, of_grid) if cuts}
        yield from (recovery("dit-tiny", k, steps) for steps in (100, 800) for k in sorted(kept))

    for model in FREE:  # sublayers: 2 of the 4 halves of two blocks, and any half of a list
        for criterion, scheme in itertools.product(("learned", "sensitivity"), ("2:4", "6:12")):
            yield cell("choice", model=model, granularity="sublayer", criterion=criterion, scheme=scheme, seed=0)
        kept = {r["kept"] for r in rows if r["kind"] == "choice" and r["model"] == model and "granularity" in r}
        yield from (recovery(model, k, 100, granularity="sublayer") for k in sorted(kept))
    yield cell("choice", model="dit-tiny", parent=learned, criterion="learned", scheme="1:2", seed=0)  # table 7
    quarters = [(r.get("parent"), r["kept"]) for r in rows if r["kind"] == "choice" and r["criterion"] == "learned" and
                r["seed"] == 0 and (r.get("parent"), r["scheme"]) in ((learned, "1:2"), (None, "1:4"))]
    yield from (recovery("dit-tiny", kept, 800, **dict(parent=parent) if parent else {}, teacher=teacher)
                for parent, kept in quarters if len(quarters) == 2 for teacher in ("whole", "half"))
    young = dict(model="dit-tiny", trained=2000)  # is it the teacher?
    yield cell("losses", **young, scheme="6:12")
    for scores in [r["losses"] for r in rows if r["kind"] == "losses" and "trained" in r]:  # so it is there
        yield from (cell("choice", **young, criterion="learned", scheme=scheme, seed=0) for scheme in ("1:2", "6:12"))
        kept = {r["kept"] for r in rows if r["kind"] == "choice" and "trained" in r}
        kept |= {min(cuts, key=scores.get) for cuts in (scores, grid)}
        yield from (recovery("dit-tiny", k, 100, trained=2000) for k in sorted(kept))
    flat = [SPREAD[0], learned, *order[-1:]]  # until the curves are flat
    yield from (recovery("dit-tiny", kept, steps) for steps in (800, 1600) for kept in flat)
    for sigma in (0.1, 1, 4):  # table 5
        yield from (recovery("dit-tiny", learned, 100, seed, sigma=sigma) for seed in range(3))
    yield from (recovery("dit-tiny", learned, 800, lr=lr) for lr in (2e-3, 5e-4, 2.5e-4))  # table 8
    yield from (recovery(model, kept, 100, seed) for seed, model in ((1, "dit-tiny"), (2, "dit-tiny"), (2, "sit-tiny"))
                for kept in chosen[model])
    for delta, scheme in itertools.product(("lora", "full", "frozen"), ("1:2", "2:4", "6:12")):  # table 4
        more = {} if delta == "lora" else dict(delta_w=delta)
        yield from (cell("choice", model="dit-tiny", criterion="learned", scheme=scheme, seed=k, **more)
                    for k in range(3))
    found = set.union(*(picked("dit-tiny", scheme, criterion="learned") for scheme in ("1:2", "2:4", "6:12")))
    yield from (recovery("dit-tiny", kept, 100, seed) for kept in sorted(found) for seed in range(3))

    yield from (cell("speed", model="dit-tiny", kept=range(n)) for n in (12, 9, 6, 4, 3, 2, 1))  # figure 4
    yield from (cell("speed", model=model, kept=kept) for model in FREE
                for kept in sorted(picked(model, "1:2", criterion="learned")))
    for r in rows:
        if r["kind"] == "choice" and "granularity" in r:
            yield cell("speed", model=r["model"], granularity="sublayer", kept=r["kept"])


# ---------------------------------------------------------------------------------------------------------------------
# The cells: each calls the stages with the command lines that a reader would type.


def call(stage, *arguments):
    """stage.main() in this process, silently: loading torch anew would take longer than many a cell."""
    sys.argv = [f"{stage.__name__}.py", *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        stage.main()


def scheme_of(row: dict) -> str:
    """Keep so many of any layers of a list: MAR has two lists."""
    lists, of = 2 if row["model"] == "mar-tiny" else 1, 12 * (2 if "granularity" in row else 1)
    return f"{len(row['kept'].split()) // lists}:{of // lists // (2 if 'parent' in row else 1)}"


def made(name: str, commands) -> Path:
    """The student.pt of a folder that several cells need: computed once, and kept. commands: of its --out."""
    folder = OUT / name
    if not folder.exists():
        work = OUT / f"{name}-{os.getpid()}"
        for stage, *flags in commands(work):
            call(stage, *flags, "--out", work)
        work.rename(folder) if not folder.exists() else shutil.rmtree(work)
    return folder / "student.pt"


def half_of(kept: str, train: list) -> Path:
    """dit-tiny's half, recovered."""
    import distill
    import prune
    cut = ["--criterion", "indices", "--layers", kept.replace(" ", ","), "--scheme", "6:12", "--model", "dit-tiny"]
    return made(f"half-{kept.replace(' ', '-')}", lambda work: [
        (prune, *cut, *train), (distill, "--student", work / "shallow.pt", "--steps", 800, *train)])


def young_teacher(steps: int, train: list) -> Path:
    """dit-tiny, trained like the bundled one but for fewer steps."""
    import distill
    recipe = "--mode scratch --model dit-tiny --batch-size 64 --lr 1.5e-3 --lr-end 0.01 --warmup 200 --ema 0.9995"
    return made(f"teacher-{steps}", lambda work: [(distill, *recipe.split(), "--steps", steps, *train)])


def compute(row: dict) -> dict:
    """The finished row of a cell."""
    import distill
    import ideas  # adds its criteria to prune.py's
    import model
    prune, work = ideas.prune, OUT / f"work-{name(row).replace(' ', '-').replace(':', '_')}"
    train = ["--latents", ROOT / "out" / "latents", "--resume", "never", "--dtype", "float32", "--device", "cpu"]
    source = ["--ckpt", half_of(row["parent"], train)] if "parent" in row else ["--model", row["model"]]
    source = ["--ckpt", young_teacher(row["trained"], train)] if "trained" in row else source
    cut = [*source, "--granularity", row.get("granularity", "block"), "--out", work / "cut", *train]
    try:
        if row["kind"] in ("recovery", "speed"):
            layers = row["kept"].replace(" ", ",")
            call(prune, "--criterion", "indices", "--layers", layers, "--scheme", scheme_of(row), *cut)
            if row["kind"] == "speed":
                return row | speed(row["model"], work / "cut" / "shallow.pt")
            flags, started = ["--mode", row["mode"], "--steps", row["steps"], "--seed", row["seed"]], time.time()
            flags += [v for k, flag in (("lr", "--lr"), ("sigma", "--mask-sigma")) if k in row for v in (flag, row[k])]
            flags += ["--save-every", row["at"][0], "--keep", 99] if "at" in row else []
            if "teacher" in row:
                half = lambda: half_of(row.get("parent", "0 2 4 7 8 11"), train)
                flags += ["--teacher", row["model"] if row["teacher"] == "whole" else half()]
            call(distill, "--student", work / "cut" / "shallow.pt", "--out", work / "student", *flags, *train)
            seconds = round(time.time() - started, 1)
            found = measure(row["model"], work / "student" / "student.pt", work / "samples") | dict(seconds=seconds)
            if "at" in row:
                saved = {k: work / "student" / f"step-{k:08}.pt" for k in row["at"]}
                found["at"] = {k: measure(row["model"], path, work / "samples")["fd"] for k, path in saved.items()}
            return row | found
        criterion, started = row.get("criterion", "lowest-loss"), time.time()
        flags = ["--delta-w", row["delta_w"]] if "delta_w" in row else []
        call(prune, "--criterion", criterion, "--scheme", row["scheme"], "--seed", row.get("seed", 0), *flags, *cut)
        log = [json.loads(line) for line in (work / "cut" / "log.jsonl").read_text().splitlines()]
        if row["kind"] == "losses":
            table = next(line for line in log if "losses" in line)
            cuts = [" ".join(map(str, kept)) for kept in table["cuts"]]
            return row | dict(losses={kept: round(v, 4) for kept, v in zip(cuts, table["losses"])})
        config, seconds = model.read_state(work / "cut" / "shallow.pt")[1], round(time.time() - started, 1)
        kept, loss = " ".join(map(str, config["kept"])), round(config["calibration_loss"], 4)
        more = {k: [round(v, 5) for v in line[k]] for line in log for k in ("confidence", "scores") if k in line}
        return row | dict(kept=kept, loss=loss, seconds=seconds) | more
    finally:
        shutil.rmtree(work, ignore_errors=True)


def speed(name: str, ckpt: Path) -> dict:
    """Milliseconds of a forward pass of 32 rows, of the whole network and of the cut one, in turn."""
    import torch

    import model
    nets, times = [model.load_model(*source, "cpu")[0] for source in ((name, None), (None, ckpt))], ([], [])
    objective, y = nets[0].objective(), torch.arange(32) % nets[0].classes
    x = torch.randn(32, nets[0].channels, nets[0].input_size, nets[0].input_size)
    batch = objective.make_batch(x, y, model.RowGenerator((0, 0), 0, 32, 32, torch.device("cpu")))
    with torch.inference_mode():
        for _ in range(16):
            for net, own in zip(nets, times):
                started = time.perf_counter()
                objective.predict(net, batch)
                own.append(1000 * (time.perf_counter() - started))
    whole, cut = (round(statistics.median(own[1:]), 3) for own in times)
    return dict(ms=cut, whole_ms=whole)


def measure(model, ckpt, out) -> dict:
    import fid
    import sample
    machine = ["--batch-size", 32, "--device", "cpu"]
    call(sample, "--ckpt", ckpt, "--num-images", 500, "--out", out, *machine, *SAMPLING[model].split())
    with contextlib.redirect_stderr(io.StringIO()):
        found = fid.evaluate(str(out / "samples.npz"), "digits", pr=False)
    return dict(fd=round(found["fid"], 4), right=round(found["accuracy"], 4))


# ---------------------------------------------------------------------------------------------------------------------
# Keeping what is known: docs/results/KIND.json, and OUT for cells that just ended.


def known() -> list:
    """All finished rows."""
    rows = [dict(kind=kind) | row for kind in FILES if (RESULTS / f"{kind}.json").exists()
            for row in json.loads((RESULTS / f"{kind}.json").read_text())["rows"]]
    rows += [json.loads(file.read_text()) for file in sorted(OUT.glob("*.json"))]
    return list({name(row): row for row in rows}.values())


def write(rows: list):
    """docs/results: a file per kind, a row per line."""
    for kind, (_, about) in FILES.items():
        own = [{k: v for k, v in row.items() if k != "kind"} for row in sorted(rows, key=name) if row["kind"] == kind]
        head = json.dumps(dict(command="python reproduce/experiments.py", settings=about), ensure_ascii=False)
        lines = ",\n".join(json.dumps(row) for row in own)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{kind}.json").write_text(f'{{"about": {head},\n"rows": [\n{lines}\n]}}\n')


def seconds_of(row: dict) -> float:
    """A guess, for one core without AMX: layers that the steps and the samples go through."""
    if row["kind"] != "recovery":
        return {"losses": 60, "choice": 30, "speed": 4}[row["kind"]] * (2.5 if row["model"] == "mar-tiny" else 1)
    passes = {"finetune": 3 * 6}.get(row["mode"], 12 + 3 * 6)
    return row["steps"] * passes * (0.023 if row["model"] == "mar-tiny" else 0.006) + 12 * (1 + len(row.get("at", ())))


def again(count: int, only: str):
    """Computes finished cells from their settings, and says whether the result is the same."""
    for kind, (fields, _) in FILES.items():
        result = {"losses": "losses", "choice": "kept", "recovery": "fd", "speed": "ms"}[kind]
        for row in [row for row in known() if row["kind"] == kind and only in name(row)][:count]:
            new = compute({k: row[k] for k in ("kind", *fields.split()) if k in row})
            verdict = "same" if new[result] == row[result] else "DIFFERS"
            print(f"{verdict}: {name(row)}: {str(new[result])[:40]} now, {str(row[result])[:40]} before", flush=True)


def print_tables():
    import report
    for title, lines in report.TABLES.items():
        print(f"\n## {title}\n\n{lines()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print what is left, with an estimate, and stop")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cells whose name contains it")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every Nth cell from the Ith, for N processes")
    parser.add_argument("--again", type=int, default=0, metavar="N", help="compute N cells of each kind anew, compare")
    parser.add_argument("--tables", action="store_true", help="print the tables and stop")
    args = parser.parse_args()
    first, step = map(int, args.share.split("/"))
    if args.again or args.tables:
        return again(args.again, args.only) if args.again else print_tables()
    OUT.mkdir(parents=True, exist_ok=True)
    while not (args.list or (ROOT / "out" / "latents" / "meta.json").exists()):
        if first == 0:
            subprocess.run([sys.executable, "extract_latents.py", "--out", "out/latents"], cwd=ROOT, check=True)
        time.sleep(1)
    while True:
        rows = known()
        have = {name(row) for row in rows}
        wanted = lambda c: args.only in name(c) and (c["kind"] == "speed") == (args.only == "speed")
        left = list({name(c): c for c in plan(rows) if name(c) not in have and wanted(c)}.values())
        print(f"{len(left)} cells left: about {sum(map(seconds_of, left)) / 3600:.1f} hours of one core", flush=True)
        if args.list or not left[first::step]:
            break
        for row in left[first::step]:
            file, began = OUT / f"{name(row).replace(' ', '_').replace(':', '-')}.json", time.time()
            if not file.exists():  # by the other process, whose list may be another by now
                file.write_text(json.dumps(compute(row)))
                print(f"{name(row)}: {time.time() - began:.0f} s", flush=True)
    if args.list:
        print("\n".join(map(name, left)))
    else:
        write(known())


if __name__ == "__main__":
    main()
