"""Runs the experiments behind the README's tables on the bundled digits, cell by cell, into docs/results.

    python reproduce/experiments.py --list            # which cells docs/results lacks, and how long they would take
    python reproduce/experiments.py                   # computes them (--share 0/2 and --share 1/2: two processes share them)
    python reproduce/experiments.py --only sit-tiny   # cells whose name contains a text
    python reproduce/experiments.py --again 2         # computes two finished cells of each kind anew and compares
    python reproduce/experiments.py --tables          # every table, as markdown; --table NAME: one; --pictures: docs/*.png

A cell is one call of the stages: a choice (prune.py), a recovery (prune.py --criterion indices, distill.py, sample.py, fid.py), the loss
right after each possible cut, or scores of each layer. Each leaves a file in out/experiments at once, so that a kill loses one cell.
The recovery of a cut that a criterion chose waits until that choice is there: run the script again until nothing is left.
"""
import argparse
import contextlib
import io
import itertools
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "reproduce")]
RESULTS, SCRATCH, LATENTS = ROOT / "docs" / "results", ROOT / "out" / "experiments", ROOT / "out" / "latents"
FREE = {"dit-tiny": "6:12", "sit-tiny": "6:12", "mar-tiny": "3:6"}  # a MAR group never straddles encoder and decoder
SAMPLING = {"dit-tiny": "--sampler ddim --steps 20", "sit-tiny": "--sampler ode-euler --steps 20", "mar-tiny": ""}
SECONDS = {"dit-tiny": 0.18, "sit-tiny": 0.18, "mar-tiny": 0.6}  # per step of recovery, one core without AMX

# ---------------------------------------------------------------------------------------------------------------------
# The plan: every cell, in order of importance.


def cell(kind: str, **settings) -> dict:
    return dict(kind=kind, **{k: " ".join(map(str, v)) if k == "kept" and not isinstance(v, str) else v for k, v in settings.items()})


def name(row: dict) -> str:
    """The identity of a cell, and of the row of docs/results that it becomes."""
    kinds = dict(losses="model keep", layers="model", choice="model scheme criterion delta_w seed",
                 recovery="model source kept mode steps sigma lr seed")
    return " ".join([row["kind"], *[str(row[k]).replace(" ", ",") for k in kinds[row["kind"]].split() if row.get(k) is not None]])


def plan(rows: list):
    """rows: what is known by now, since later cells recover what earlier ones chose."""
    chosen = lambda **wanted: [r["kept"] for r in rows if r["kind"] == "choice" and all(r[k] == v for k, v in wanted.items())]
    loss = {(r["model"], r["keep"]): r["losses"] for r in rows if r["kind"] == "losses"}
    yield from (cell("losses", model=m, keep=6) for m in FREE)
    yield from (cell("losses", model="dit-tiny", keep=k) for k in (4, 3))
    yield from (cell("layers", model=m) for m in FREE)
    for model, free in FREE.items():  # tables 1, 2, and the rivals
        for criterion in ("bi", "flux-lite", "sensitivity", "probe", "oracle", "lowest-loss", "greedy"):
            yield from (cell("choice", model=model, criterion=criterion, scheme=s, seed=0) for s in ("1:2", free))
        for criterion, seeds in ("learned", 3), ("distilled", 2), ("adapted", 2), ("halving", 2):
            yield from (cell("choice", model=model, criterion=criterion, scheme=s, seed=k) for s in ("1:2", free) for k in range(seeds))
        yield from (cell("choice", model=model, criterion="random", scheme="1:2", seed=k) for k in range(3))
    yield from (cell("choice", model="dit-tiny", criterion="learned", scheme=s, seed=k) for s in ("1:2", "3:6") for k in range(5))
    for kept in itertools.product(*[(2 * g, 2 * g + 1) for g in range(6)]):  # the whole space of 1:2: figure 5, complete
        yield from (cell("recovery", model="dit-tiny", kept=kept, mode="masked-kd", steps=s, seed=0) for s in (25, 100))

# ---------------------------------------------------------------------------------------------------------------------
# The cells.


def call(stage, *arguments) -> str:
    """stage.main() with a command line, in this process: loading torch takes longer than most cells' sampling."""
    sys.argv = [f"{stage.__name__}.py", *map(str, arguments)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        stage.main()
    return printed.getvalue()


def log_of(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def choice(work, *, model, criterion, scheme, seed, delta_w=None):
    """One criterion's choice -> the kept layers, how sure it is, the seconds it took."""
    extra = ["--delta-w", delta_w] if delta_w else []
    started = time.time()
    call(prune, "--model", model, "--criterion", criterion, "--scheme", scheme, "--seed", seed, "--latents", LATENTS, "--out", work,
         "--resume", "never", *extra)
    seconds = round(time.time() - started, 1)
    config = read_state(work / "shallow.pt")[1]
    return dict(kept=" ".join(map(str, config["kept"])), seconds=seconds)


def recovery(work, *, model, kept, mode, steps, seed, source=None, lr=None, sigma=None, at=()):
    """Cut, recover, draw 500 samples, measure -> Fréchet distance, share of right digits, seconds of training."""
    cut, student = work / "cut", work / "student"
    scheme = f"{len(kept.split())}:12" if model != "mar-tiny" else "3:6"
    call(prune, "--model", model, "--criterion", "indices", "--layers", kept.replace(" ", ","), "--scheme", scheme, "--latents", LATENTS,
         "--out", cut, "--resume", "never")
    extra = [v for flag, value in (("--lr", lr), ("--mask-sigma", sigma)) if value is not None for v in (flag, value)]
    started = time.time()
    call(distill, "--student", cut / "shallow.pt", "--mode", mode, "--steps", steps, "--seed", seed, "--latents", LATENTS, "--out", student,
         "--resume", "never", "--save-every", 100 if at else steps, "--keep", 100, *extra)
    result = dict(seconds=round(time.time() - started, 1))
    result |= measure(model, student / "student.pt", work / "samples")
    if at:
        result["at"] = {k: measure(model, student / f"step-{k:07d}.pt", work / "samples")["fd"] for k in at}
    return result


def measure(model, ckpt, out) -> dict:
    call(sample, "--ckpt", ckpt, "--num-images", 500, "--batch-size", 32, "--out", out, *SAMPLING[model].split())
    found = fid.evaluate(str(out / "samples.npz"), str(ROOT / "data" / "mnist_train10k.npz"), pr=False)
    return dict(fd=round(found["fid"], 4), right=round(found["accuracy"], 4))
