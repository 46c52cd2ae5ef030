"""The experiments' tables (markdown) and pictures, from docs/results/*.json alone, which experiments.py writes.

    python reproduce/report.py --tables               # every table
    python reproduce/report.py space modes            # these
    python reproduce/report.py --readme               # puts them into the README, and all into docs/results/README.md
    python reproduce/report.py --pictures             # docs/space.png, length.png, modes.png, speed.png

FD is the Fréchet distance of 500 samples. "a ± b (n)" is the mean and the standard deviation over n seeds of the
recovery; without ±, there is one. A cut's loss is the training loss right after the cut, before any recovery.
What `experiments.py --list` still names is a "-" here.
"""
import functools
import json
import re
import statistics
import sys
from pathlib import Path

from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "reproduce"))
from chart import Axes

FREE = {"dit-tiny": "6:12", "sit-tiny": "6:12", "mar-tiny": "3:6"}


@functools.cache
def rows(kind: str) -> list:
    file = ROOT / "docs" / "results" / f"{kind}.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


PLAIN = dict(trained=None, granularity=None, parent=None, teacher=None, lr=None, sigma=None, delta_w=None)


def fits(row, **wanted) -> bool:
    """Whether a row has these settings, and the usual ones otherwise."""
    return all(row.get(k) == v for k, v in (PLAIN | wanted).items())


def recovered(model, kept, steps, mode="masked-kd", seeds=range(9), **settings) -> list:
    """The Fréchet distances of a cut recovered so, one per seed."""
    wanted = dict(model=model, kept=kept, steps=steps, mode=mode, **settings)
    return [row["fd"] for row in rows("recovery") if row["seed"] in seeds and fits(row, **wanted)]


def spread(values: list) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def losses(model: str, scheme: str, groups_of=None, trained=None) -> dict:
    """{kept: loss right after the cut}; groups_of 2: only the cuts that keep one of each two neighbours."""
    wanted = dict(model=model, scheme=scheme, trained=trained)
    found = next((row["losses"] for row in rows("losses") if fits(row, **wanted)), {})
    whole = lambda kept: len({int(i) // groups_of for i in kept.split()}) == len(kept.split())
    return {kept: loss for kept, loss in found.items() if not groups_of or whole(kept)}


def rank_of(kept, scores: dict) -> int:
    """1 for the lowest."""
    return 1 + sum(v < scores[kept] for v in scores.values())


def choices(model, depth=6, **wanted) -> list:
    return [row for row in rows("choice") if fits(row, model=model, **wanted) and len(row["kept"].split()) == depth]


def table(header: str, lines: list) -> str:
    if not lines:
        return "Nothing was measured yet."
    names = header.split(" | ")
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [names, ["---"] * len(names), *lines])


# ---------------------------------------------------------------------------------------------------------------------
# Tables.


def whole_space(steps, seed=0) -> dict:
    """{kept: FD} of the cuts of 1:2 that were recovered so."""
    found = {kept: recovered("dit-tiny", kept, steps, seeds=[seed]) for kept in losses("dit-tiny", "6:12", 2)}
    return {kept: fd[0] for kept, fd in found.items() if fd}


def space() -> str:
    """The cuts of 1:2, dit-tiny, by length of the recovery; and the rank of what the search chose."""
    loss, lines = losses("dit-tiny", "6:12", 2), []
    lowest = min(loss, key=loss.get)
    lengths = {"25": whole_space(25), "100": whole_space(100), "400": whole_space(400)}
    lengths["100, another seed"] = whole_space(100, 1)
    for steps, fd in lengths.items():
        if len(fd) < 3 or lowest not in fd:
            continue
        ordered, correlation = sorted(fd.values()), spearmanr([loss[kept] for kept in fd], list(fd.values()))
        at_100 = spearmanr([lengths["100"][kept] for kept in fd], list(fd.values()))
        lines.append([steps, len(fd), f"{ordered[0]:.2f}", f"{statistics.median(ordered):.2f}", f"{ordered[-1]:.2f}",
                      f"{correlation.statistic:.2f} (p = {correlation.pvalue:.1g})", f"{at_100.statistic:.2f}",
                      f"{fd[lowest]:.2f} (rank {rank_of(lowest, fd)})"])
    text = table("recovery steps | cuts | best FD | median | worst | rank correlation with the loss | "
                 "with FD after 100 steps | the lowest loss", lines)
    lines = []
    for row in choices("dit-tiny", criterion="learned", scheme="1:2"):
        fd = lengths["100"]
        kept = row["kept"]
        lines.append([row["seed"], kept, rank_of(kept, loss), f"{fd[kept]:.2f}", rank_of(kept, fd), len(fd) / 2 + 0.5])
    return text + "\n\n" + table("search seed | keeps | rank of its loss of 64 | FD, 100 steps | its rank of 64 | "
                                 "expected rank of a random cut", lines)


def decisive() -> str:
    """What each choice of a group is worth over the whole space, beside what the loss and the search say of it."""
    fd, loss, lines, right = whole_space(100), losses("dit-tiny", "6:12", 2), [], [0, 0]
    found = choices("dit-tiny", criterion="learned", scheme="1:2")
    mean = lambda scores, i: statistics.mean(scores[kept] for kept in fd if str(i) in kept.split())
    for a, b in [(2 * g, 2 * g + 1) for g in range(6)]:
        sure, better = [row["confidence"][a] for row in found], mean(fd, a) < mean(fd, b)
        right[0] += (mean(loss, a) < mean(loss, b)) == better
        right[1] += (statistics.mean(sure) > 0.5) == better
        lines.append([f"{a} or {b}", f"{mean(fd, a):.2f} or {mean(fd, b):.2f}",
                      f"{mean(loss, a):.3f} or {mean(loss, b):.3f}",
                      f"{100 * statistics.mean(sure):.0f} % ({100 * min(sure):.0f} to {100 * max(sure):.0f})"])
    alike = [[kept for kept in fd if {a, b} <= {*kept.split()}] for a in ("4", "5") for b in ("10", "11")]
    within = [f"{spearmanr([loss[k] for k in cuts], [fd[k] for k in cuts]).statistic:.2f}" for cuts in alike]
    return table("layers | mean FD with one or the other, 32 cuts each | mean loss right after the cut | the search's "
                 "probability of the first, mean (range) of 5 seeds", lines) + (
        f"\n\nThe lower loss is the lower FD too in {right[0]} of 6 groups, the search's favourite in {right[1]} of 6. "
        "Rank correlation of loss and FD among the 16 cuts that agree in 4 or 5 and in 10 or 11: "
        f"{', '.join(within)}.")


def free() -> str:
    """Free of 1:2: cuts out of all 924, dit-tiny."""
    loss, grid = losses("dit-tiny", "6:12"), losses("dit-tiny", "6:12", 2)
    ordered, named = sorted(loss, key=loss.get), {}
    note = lambda kept, what: named.setdefault(kept, []).append(what)
    for kept, what in ((ordered[0], "lowest loss of all"), (ordered[-1], "highest loss of all"),
                       (min(grid, key=grid.get), "lowest loss of 1:2"), (max(grid, key=grid.get), "highest of 1:2")):
        note(kept, what)
    for scheme in ("1:2", "3:6", "6:12"):
        for row in choices("dit-tiny", criterion="learned", scheme=scheme):
            named.setdefault(row["kept"], []).append(f"learned {scheme}, seed {row['seed']}")
    for kept in loss:
        if kept not in grid and kept not in named and recovered("dit-tiny", kept, 100):
            note(kept, "some other")
    lines = [["; ".join(what), kept, f"{loss[kept]:.3f}", rank_of(kept, loss),
              *[spread(recovered("dit-tiny", kept, s)) for s in (25, 100, 400, 800)]]
             for kept, what in sorted(named.items(), key=lambda item: loss[item[0]])]
    fd = {kept: v[0] for kept in loss if kept not in grid and (v := recovered("dit-tiny", kept, 100, seeds=[0]))}
    correlation = spearmanr([loss[kept] for kept in fd], list(fd.values()))
    return table("cut | keeps | loss | rank of 924 | FD, 25 steps | 100 | 400 | 800", lines) + (
        f"\n\nRank correlation of loss and FD after 100 steps, {len(fd)} cuts outside 1:2: "
        f"{correlation.statistic:.2f} (p = {correlation.pvalue:.1g})")


def criteria(model: str) -> str:
    """Every criterion at 12 -> 6, equal budgets."""
    lines, found, lengths = [], {}, (100, 800) if model == "dit-tiny" else (100,)
    for row in choices(model):
        found.setdefault((row["scheme"] != "1:2", row["scheme"], row["criterion"], row["kept"]), []).append(row)
    for (_, scheme, criterion, kept), same in sorted(found.items()):
        seeds = ", ".join(str(row["seed"]) for row in same)
        loss = f"{same[0]['loss']:.3f}" if "loss" in same[0] else "-"
        fd = [spread(recovered(model, kept, steps)) for steps in lengths]
        if {*fd} != {"-"}:
            lines.append([criterion, scheme, seeds, kept, loss, *fd])
    last = "".join(f" | FD, {steps} steps" for steps in lengths)
    return table("criterion | scheme | its seeds | keeps | loss" + last, lines)


def ideas() -> str:
    """The paper's search and its rivals: mean (range) over what their seeds chose and over the recovery's seeds."""
    lines, first = [], {}
    for criterion in ("learned", "distilled", "greedy", "adapted", "halving", "lowest-loss", "random"):
        for free in (False, True):
            line, means = [criterion, "free" if free else "1:2"], []
            for model in FREE:
                found = choices(model, criterion=criterion, scheme=FREE[model] if free else "1:2")
                fd = [v for row in found for v in recovered(model, row["kept"], 100)]
                means.append(statistics.mean(fd) if fd else None)
                alike = len(set(fd)) < 2
                line.append(f"{means[-1]:.2f}" + ("" if alike else f" ({min(fd):.2f} to {max(fd):.2f})") if fd else "-")
            if None not in means:
                together = statistics.geometric_mean(means)
                line.append(f"{together / first.setdefault(free, together):.2f}")
                lines.append(line)
    names = " | ".join(f"FD, {model}" for model in FREE)
    return table(f"criterion | scheme | {names} | all three, beside learned (geometric mean)", lines)


def rivals(model="dit-tiny") -> str:
    """What each criterion keeps, of 1:2 and free of it, and what becomes of it; a mean over its seeds."""
    lines = []
    for criterion in ("learned", "distilled", "lowest-loss", "greedy", "halving", "sensitivity", "oracle", "adapted",
                      "probe", "bi", "flux-lite", "random"):
        line = [criterion]
        for scheme in ("1:2", FREE[model]):
            loss = losses(model, FREE[model], 2 if scheme == "1:2" else None)
            kept = [row["kept"] for row in choices(model, criterion=criterion, scheme=scheme)]
            kept = [min(loss, key=loss.get)] if criterion == "lowest-loss" else kept
            fd = [v[0] for k in kept if (v := recovered(model, k, 100, seeds=[0]))]
            cuts = "; ".join(sorted(set(kept))) if len(set(kept)) < 3 else f"{len(set(kept))} cuts"
            line += [cuts or "-", f"{statistics.mean(fd):.2f}" if fd and len(fd) == len(kept) else "-"]
        lines.append(line)
    return table(f"criterion | keeps at 1:2 | FD, 100 steps | keeps at {FREE[model]} | FD, 100 steps", lines)


def modes() -> str:
    """Table 5 and figure 14 at home: one cut, recovered in every way."""
    kept, lines = "0 2 4 7 8 11", []
    for mode in ("finetune", "logits-kd", "rep-kd", "masked-kd"):
        long = [row for row in rows("recovery") if (row["kept"], row["mode"], row["steps"]) == (kept, mode, 800)]
        along = next((row["at"] for row in long if "at" in row), {})
        lines.append([mode, spread(recovered("dit-tiny", kept, 100, mode)),
                      *[f"{along[s]:.2f}" if s in along else "-" for s in ("200", "400")],
                      spread(recovered("dit-tiny", kept, 800, mode))])
    return table("mode | FD, a run of 100 steps | a run of 800: at 200 | at 400 | at its end", lines)


def young() -> str:
    """Is it the teacher? The same cuts of a teacher that was trained for 2,000 steps, not 11,000."""
    lines = []
    for trained in (None, 2000):
        loss, named = losses("dit-tiny", "6:12", trained=trained), {}
        grid = losses("dit-tiny", "6:12", 2, trained)
        for scores, what in ((loss, "lowest loss of all 924"), (grid, "lowest loss of 1:2")):
            if scores:
                named.setdefault(min(scores, key=scores.get), []).append(what)
        for scheme in ("6:12", "1:2"):
            for row in choices("dit-tiny", criterion="learned", scheme=scheme, seed=0, trained=trained):
                named.setdefault(row["kept"], []).append(f"learned {scheme}")
        for kept, what in named.items():
            fd = recovered("dit-tiny", kept, 100, seeds=[0], trained=trained)
            lines.append([trained or 11000, "; ".join(what), kept, f"{loss[kept]:.3f}", rank_of(kept, loss),
                          spread(fd)])
    return table("teacher's steps | cut | keeps | loss | rank of 924 | FD, 100 steps", lines)


def alone() -> str:
    """What each layer is worth alone: the loss with it left out, less the whole network's."""
    lines = []
    for model in FREE:
        for row in choices(model, criterion="sensitivity", scheme="1:2"):
            lines.append([model, *[f"{score:.4f}" for score in row["scores"]]])
    return table("model | " + " | ".join(map(str, range(12))), lines)


def scarce() -> str:
    """Fewer layers: 12 -> 4 and 12 -> 3, dit-tiny."""
    lines = []
    for depth in (4, 3):
        grid, free = f"1:{12 // depth}", f"{depth}:12"
        loss, named = losses("dit-tiny", free), {}
        of_grid = losses("dit-tiny", free, 12 // depth)
        named.setdefault(min(loss, key=loss.get), []).append(f"lowest loss of all {len(loss)}")
        named.setdefault(min(of_grid, key=of_grid.get), []).append(f"lowest loss of {grid}")
        for row in choices("dit-tiny", depth):
            named.setdefault(row["kept"], []).append(f"{row['criterion']} {row['scheme']}, seed {row['seed']}")
        for kept, what in named.items():
            fd = [spread(recovered("dit-tiny", kept, steps)) for steps in (100, 800)]
            if {*fd} != {"-"}:
                lines.append([depth, "; ".join(what), kept, f"{loss[kept]:.3f}", *fd])
    return table("layers | cut | keeps | loss | FD, 100 steps | 800", lines)


def groups() -> str:
    """Table 4 at home: groups and dW; three searches each, and three recoveries of each cut."""
    lines = []
    for delta in ("lora", "full", "frozen"):
        line = [delta]
        for scheme in ("1:2", "2:4", "6:12"):
            wanted = dict(criterion="learned", scheme=scheme, delta_w=None if delta == "lora" else delta)
            kept = [row["kept"] for row in choices("dit-tiny", **wanted) if row["seed"] < 3]
            fd = [v for k in kept for v in recovered("dit-tiny", k, 100)]
            line += [f"{len(set(kept))} of {len(kept)}", spread(fd)] if fd else ["-", "-"]
        lines.append(line)
    return table("dW | cuts at 1:2 | FD | cuts at 2:4 | FD | cuts at 6:12 | FD", lines)


def thresholds() -> str:
    """Table 5 at home: which activations are masked, after 100 steps."""
    masked = [(f"{sigma or 2}", recovered("dit-tiny", "0 2 4 7 8 11", 100, sigma=sigma)) for sigma in (0.1, 1, None, 4)]
    masked += [("none is (rep-kd)", recovered("dit-tiny", "0 2 4 7 8 11", 100, "rep-kd"))]
    return table("masked beyond, in std | FD", [[what, spread(fd)] for what, fd in masked])


def rates() -> str:
    """Table 8 at home: the recovery's learning rate."""
    return table("lr | FD, 800 steps", [
        [f"{lr or 1e-3:g}", spread(recovered("dit-tiny", "0 2 4 7 8 11", 800, lr=lr))]
        for lr in (2e-3, None, 5e-4, 2.5e-4)])


def quarters() -> str:
    """Table 7 at home: 12 -> 3 at once, or by way of a recovered half; and who teaches."""
    lines = []
    for parent, scheme, what in ((None, "1:4", "the whole, 1:4"), ("0 2 4 7 8 11", "1:2", "the half, 1:2")):
        for row in choices("dit-tiny", 3, criterion="learned", scheme=scheme, parent=parent, seed=0):
            layers = [int(i) for i in row["kept"].split()]
            kept = [int(parent.split()[i]) for i in layers] if parent else layers
            for teacher in ("whole", "half"):
                fd = spread(recovered("dit-tiny", row["kept"], 800, parent=parent, teacher=teacher))
                lines.append([what, " ".join(map(str, kept)), f"the {teacher}", fd])
    return table("cut from | keeps, of the whole's layers | teacher | FD, 800 steps", lines)


def sublayers() -> str:
    """Blocks against halves of blocks (attention or MLP), half of the network each."""
    lines, speeds = [], {(row["model"], row["kept"]): row["whole_ms"] / row["ms"] for row in rows("speed")}
    for model in FREE:
        for scheme in ("1:2", FREE[model]):
            for row in choices(model, criterion="learned", scheme=scheme, seed=0):
                fd, speed = spread(recovered(model, row["kept"], 100, seeds=[0])), speeds.get((model, row["kept"]))
                lines.append([model, f"blocks, learned {scheme}", 6, f"{speed:.2f}" if speed else "-", fd])
        for row in [row for row in rows("choice") if row["model"] == model and "granularity" in row]:
            kept = [int(i) for i in row["kept"].split()]
            fd = spread(recovered(model, row["kept"], 100, granularity="sublayer", seeds=[0]))
            speed = speeds.get((model, row["kept"]))
            lines.append([model, f"halves, {row['criterion']} {row['scheme']}", sum(i % 2 == 0 for i in kept),
                          f"{speed:.2f}" if speed else "-", fd])
    return table("model | layers | attentions (of 6 blocks or 12 halves) | times as fast | FD, 100 steps", lines)


def cost() -> str:
    """What a choice takes beside a recovery, in seconds of one core: the least of the seeds."""
    lines = []
    for criterion in ("bi", "probe", "sensitivity", "greedy", "halving", "adapted", "learned", "distilled",
                      "lowest-loss"):
        line = [criterion]
        for scheme in ("1:2", "6:12"):
            seconds = [row["seconds"] for row in choices("dit-tiny", criterion=criterion, scheme=scheme)]
            line.append(f"{min(seconds):.0f}" if seconds else "-")
        lines.append(line)
    for steps in (100, 800):
        seconds = [row["seconds"] for row in rows("recovery") if fits(
            row, model="dit-tiny", mode="masked-kd", steps=steps) and len(row["kept"].split()) == 6]
        lines.append([f"recovery, {steps} steps", *[f"{min(seconds):.0f}"] * 2])
    return table("what | seconds, 1:2 | 6:12", lines)


def speeds() -> str:
    """Figure 4 at home: the forward pass against depth."""
    first = {" ".join(map(str, range(n))) for n in range(1, 13)}
    found = [r for r in rows("speed") if fits(r, model="dit-tiny") and r["kept"] in first]
    found.sort(key=lambda row: -len(row["kept"].split()))
    return table("layers | ms | times as fast | 12 / layers", [
        [n := len(row["kept"].split()), f"{row['ms']:.1f}", f"{row['whole_ms'] / row['ms']:.2f}", f"{12 / n:.2f}"]
        for row in found])


TABLES = dict(
    rivals=rivals, space=space, decisive=decisive, free=free, modes=modes, ideas=ideas, scarce=scarce, groups=groups,
    thresholds=thresholds, rates=rates, quarters=quarters, young=young, alone=alone, sublayers=sublayers, cost=cost,
    speeds=speeds,
    **{f"criteria-{model}": functools.partial(criteria, model) for model in FREE})

# ---------------------------------------------------------------------------------------------------------------------
# Pictures.

BLUE, RED, GREY, GREEN, ORANGE, PURPLE = "#1f77b4", "#d62728", "#999999", "#2ca02c", "#ff7f0e", "#9467bd"


def key(axes, entries, x, y):
    """What the colours are: entries of (colour, text), one below the other."""
    for i, (colour, text) in enumerate(entries):
        axes.draw.ellipse([x, y + 28 * i - 7, x + 14, y + 28 * i + 7], fill=colour)
        axes.draw.text((x + 24, y + 28 * i), text, "black", axes.font, anchor="lm")


def space_picture(steps=100):
    """Recovered distance against the loss right after the cut: all of 1:2, and cuts free of it."""
    loss, grid = losses("dit-tiny", "6:12"), losses("dit-tiny", "6:12", 2)
    fd = {kept: v[0] for kept in loss if (v := recovered("dit-tiny", kept, steps, seeds=[0]))}
    axes = Axes(f"dit-tiny, 12 layers -> 6: what becomes of a cut in {steps} steps of recovery", "loss right after "
                "the cut (both axes logarithmic)", "Frechet distance", [loss[kept] for kept in fd], fd.values(),
                (1100, 720), "xy")
    colours = {"4 and 11": BLUE, "4 and 10": ORANGE, "5 and 11": PURPLE, "5 and 10": GREY}
    for kept, value in fd.items():
        layers = kept.split()
        colour = colours[f"{4 if '4' in layers else 5} and {11 if '11' in layers else 10}"]
        axes.dot(loss[kept], value, colour if kept in grid else GREEN, r=6)
    marks = {}
    for scheme in ("1:2", "3:6", "6:12"):
        for row in choices("dit-tiny", criterion="learned", scheme=scheme):
            marks.setdefault(row["kept"], {}).setdefault(scheme, []).append(row["seed"])
    for n, (kept, found) in enumerate((kept, found) for kept, found in marks.items() if kept in fd):
        text = ", ".join(f"{scheme}, {len(seeds)} seed{'s' * (len(seeds) > 1)}" for scheme, seeds in found.items())
        axes.note(loss[kept], fd[kept], f"learned {text}", RED, 24, (60, 90, 40, -40, 40)[n % 5])
        axes.dot(loss[kept], fd[kept], RED, r=7, ring=True)
    for scores, text, dx, anchor in ((loss, "lowest loss of all 924", 14, "lm"),
                                     (grid, "lowest loss of 1:2", -14, "rm")):
        kept = min(scores, key=scores.get)
        axes.dot(loss[kept], fd[kept], "black", r=7)
        axes.note(loss[kept], fd[kept], text, "black", dx, 0, anchor)
    entries = [(colour, f"1:2, keeps {layers}") for layers, colour in colours.items()]
    key(axes, [*entries, (GREEN, "free of 1:2"), (RED, "learned")], axes.left + 16, axes.top + 22)
    axes.image.save(ROOT / "docs" / "space.png", optimize=True)


def length_picture():
    """What a longer recovery makes of a good cut and of a bad one."""
    loss, grid = losses("dit-tiny", "6:12"), losses("dit-tiny", "6:12", 2)
    fd, order = whole_space(100), sorted(loss, key=loss.get)
    curves = [("worst of 1:2", max(fd, key=fd.get), GREY), ("median loss of all 924", "1 3 4 7 9 10", ORANGE),
              ("learned, 1:2", "0 2 4 7 8 11", RED), ("lowest loss of 1:2", min(grid, key=grid.get), BLUE),
              ("lowest loss of all 924", order[0], "black")]
    at = lambda kept: [(s, v[0]) for s in (25, 100, 400, 800, 1600)
                       if (v := recovered("dit-tiny", kept, s, seeds=[0]))]
    points = {text: at(kept) for text, kept, _ in curves}
    axes = Axes("dit-tiny, 12 layers -> 6: what a longer recovery makes of a cut", "steps of recovery, each dot a run "
                "of its own (both axes logarithmic)", "Frechet distance", [25, 1600],
                [v for line in points.values() for _, v in line], (1100, 720), "xy")
    for text, _, colour in curves:
        axes.line(points[text], colour)
    key(axes, [(colour, f"{text}: {kept}") for text, kept, colour in curves], axes.right - 440, axes.top + 22)
    axes.image.save(ROOT / "docs" / "length.png", optimize=True)


def modes_picture():
    """Figure 14 at home."""
    modes = dict(zip(("finetune", "logits-kd", "rep-kd", "masked-kd"), (GREY, ORANGE, GREEN, RED)))
    lines = {}
    for row in rows("recovery"):
        if "at" in row and row["steps"] == 800 and row["mode"] in modes:
            lines[row["mode"]] = [*((int(s), v) for s, v in row["at"].items()), (800, row["fd"])]
    axes = Axes("dit-tiny, the learned cut: four ways to recover it", "step of a run of 800", "Frechet distance",
                [200, 800], [v for line in lines.values() for _, v in line])
    for mode, line in lines.items():
        axes.line(line, modes[mode])
    axes.legend(lines, [modes[mode] for mode in lines])
    axes.image.save(ROOT / "docs" / "modes.png", optimize=True)


def speed_picture():
    """Figure 4 at home: how many times as fast a network of fewer layers is."""
    found = sorted((len(row["kept"].split()), row["whole_ms"] / row["ms"]) for row in rows("speed")
                   if fits(row, model="dit-tiny"))
    curve = [(n / 4, 48 / n) for n in range(4, 49)]
    axes = Axes("dit-tiny: speed of the forward pass against depth", "layers", "times as fast as 12 layers",
                [1, 12], [1, 12])
    axes.line(curve, GREY, dots=False)
    axes.line(found, RED)
    axes.legend(["measured", "12 / layers"], [RED, GREY])
    axes.image.save(ROOT / "docs" / "speed.png", optimize=True)


def fill(page: str) -> str:
    """Puts the tables of today's docs/results between the marks `<!-- report NAME -->` and `<!-- end -->`."""
    marked = re.compile(r"(<!-- report ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
    return marked.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", page)


def page() -> str:
    """Every table, under the first line of its function's docstring."""
    text = "# The experiments\n\nWritten by `python reproduce/report.py --readme`. What the numbers are:\n\n"
    text += "\n".join(__doc__.strip().splitlines()[-3:]) + "\n"
    for name, lines in TABLES.items():
        text += f"\n## {name}\n\n{getattr(lines, 'func', lines).__doc__.splitlines()[0]}\n\n{lines()}\n"
    return text


def main():
    if "--pictures" in sys.argv:
        return [draw() for draw in (space_picture, length_picture, modes_picture, speed_picture)]
    if "--readme" in sys.argv:
        (ROOT / "docs" / "results" / "README.md").write_text(page())
        return (ROOT / "README.md").write_text(fill((ROOT / "README.md").read_text()))
    for name in [argument for argument in sys.argv[1:] if not argument.startswith("-")] or TABLES:
        print(f"\n## {name}\n\n{TABLES[name]()}")


if __name__ == "__main__":
    main()
