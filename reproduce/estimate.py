"""How long a plan's commands will take. common.sh calls this before a script runs.

    python reproduce/estimate.py PLAN TIMINGS GPUS    # PLAN: a file with one stage's command per line

A command's units are training steps, images drawn, or cuts tried. What a unit takes is known from finished commands of
the same stage (TIMINGS, lines of seconds and command), or assumed: below.
"""
import datetime
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import MODELS

# Seconds per step, per image drawn in the model's own number of steps, and per cut tried by lowest-loss: of the digits
# on one CPU core, of ImageNet on one GPU (the README's guess for an A100, which nobody measured).
HOME = {"extract_latents.py": 12, "prune.py": 0.3, "distill.py": 0.2, "sample.py": 0.06, "fid.py": 10, "cut": 0.1}
IMAGENET = {"extract_latents.py": 5800, "prune.py": 0.5, "distill.py": 1.2, "sample.py": 0.5, "fid.py": 600,
            "cut": 0.25}

def units_of(command: str, images: int):
    """-> what a command consists of (a stage or "cut"), how often."""
    stage, *words = command.split()
    flags = {word: value for word, value in zip(words, words[1:] + [""]) if word.startswith("--")}
    name = flags.get("--model") or next((folder for folder in command.split("/") if folder in MODELS), "dit-tiny")
    if stage in ("prune.py", "distill.py"):
        recipe = MODELS[name]["recipe"][stage[:-3]]
        if stage == "prune.py" and flags.get("--criterion", "learned") != "learned":
            return "cut", int(flags.get("--candidates", 1000)) if flags["--criterion"] == "lowest-loss" else 2
        own = recipe.get("steps") or round(recipe["epochs"] * images / recipe["batch_size"])
        return stage, int(flags.get("--steps", own))
    if stage == "sample.py":
        own = MODELS[name]["sampling"]["steps"]
        steps = int(flags.get("--steps", str(own)).removeprefix("ddim"))
        return stage, int(flags["--num-images"]) * steps / own
    return stage, 1

def clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))

def main():
    plan, timings, gpus = sys.argv[1:]
    commands = list(dict.fromkeys(Path(plan).read_text().splitlines()))  # tables share cells, and cells share cuts
    home = any(name in " ".join(commands) for name in MODELS if name.endswith("-tiny"))
    images, assumed = (10_000, HOME) if home else (1_281_167, IMAGENET)
    measured = {}
    for line in Path(timings).read_text().splitlines() if Path(timings).exists() else []:
        seconds, command = line.split(" ", 1)
        kind, units = units_of(command, images)
        measured.setdefault(kind, []).append(int(seconds) / units)
    total = 0
    print("| stage | commands | steps or images | seconds each | in all |\n|---|---|---|---|---|")
    for kind in assumed:
        units = [u for k, u in (units_of(command, images) for command in commands) if k == kind]
        if units:
            each, how = assumed[kind] / (1 if home else int(gpus)), "assumed"
            if kind in measured:
                each, how = statistics.median(measured[kind]), "measured"
            total += each * sum(units)
            print(f"| {kind} | {len(units)} | {sum(units):,.0f} | {each:.3g} {how} | {clock(each * sum(units))} |")
    print(f"About {clock(total)} to do.\n" if commands else "All is there already.\n", flush=True)

if __name__ == "__main__":
    main()
