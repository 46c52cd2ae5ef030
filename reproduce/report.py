"""The experiments' tables (markdown) and pictures, from docs/results/*.json alone, which experiments.py writes.

    python reproduce/report.py --tables               # every table
    python reproduce/report.py space modes            # these
    python reproduce/report.py --readme               # puts them into the README
    python reproduce/report.py --pictures             # docs/space.png, docs/length.png

FD is the Fréchet distance of 500 samples. "a ± b (n)" is the mean and the standard deviation over n seeds of the
recovery; without ±, there is one. A cut's loss is the training loss right after the cut, before any recovery.
"""
import functools
import json
import math
import re
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[1]
FREE = {"dit-tiny": "6:12", "sit-tiny": "6:12", "mar-tiny": "3:6"}


@functools.cache
def rows(kind: str) -> list:
    return json.loads((ROOT / "docs" / "results" / f"{kind}.json").read_text())["rows"]


def recovered(model, kept, steps, mode="masked-kd", seeds=range(9)) -> list:
    """The Fréchet distances of a cut recovered so, one per seed."""
    wanted = dict(model=model, kept=kept, steps=steps, mode=mode, lr=None, sigma=None)
    fits = lambda row: row["seed"] in seeds and all(row.get(k) == v for k, v in wanted.items())
    return [row["fd"] for row in rows("recovery") if fits(row)]


def spread(values: list) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def losses(model: str, scheme: str, groups_of=None) -> dict:
    """{kept: loss right after the cut}; groups_of 2: only the cuts that keep one of each two neighbours."""
    found = next((row["losses"] for row in rows("losses") if (row["model"], row["scheme"]) == (model, scheme)), {})
    whole = lambda kept: len({int(i) // groups_of for i in kept.split()}) == len(kept.split())
    return {kept: loss for kept, loss in found.items() if not groups_of or whole(kept)}


def rank_of(kept, scores: dict) -> int:
    """1 for the lowest."""
    return 1 + sum(v < scores[kept] for v in scores.values())


def choices(model, depth=6, **wanted) -> list:
    found = [row for row in rows("choice") if row["model"] == model and all(row.get(k) == v for k, v in wanted.items())]
    return [row for row in found if len(row["kept"].split()) == depth and "delta_w" not in row]


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
        cost = f"{statistics.mean(row['seconds'] for row in same):.0f}"
        fd = [spread(recovered(model, kept, steps)) for steps in lengths]
        if {*fd} != {"-"}:
            lines.append([criterion, scheme, seeds, kept, loss, cost, *fd])
    last = "".join(f" | FD, {steps} steps" for steps in lengths)
    return table("criterion | scheme | its seeds | keeps | loss | seconds" + last, lines)


def ideas() -> str:
    """The paper's search and its rivals, averaged over what their seeds chose; one seed of the recovery."""
    lines = []
    for criterion in ("learned", "distilled", "greedy", "adapted", "halving", "lowest-loss", "random"):
        for free in (False, True):
            line = [criterion, "free" if free else "1:2"]
            for model in FREE:
                scheme = FREE[model] if free else "1:2"
                kept = [row["kept"] for row in choices(model, criterion=criterion, scheme=scheme)]
                fd = [v[0] for k in kept if (v := recovered(model, k, 100, seeds=[0]))]
                line.append(f"{statistics.mean(fd):.2f}" if fd and len(fd) == len(kept) else "-")
            lines.append(line)
    lines = [line for line in lines if set(line[2:]) != {"-"}]
    return table("criterion | scheme | FD after 100 steps, " + " | ".join(FREE), lines)


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


TABLES = dict(rivals=rivals, space=space, decisive=decisive, free=free, modes=modes, ideas=ideas, scarce=scarce) | {
    f"criteria-{model}": functools.partial(criteria, model) for model in FREE}

# ---------------------------------------------------------------------------------------------------------------------
# Pictures.

W, H, LEFT, RIGHT, TOP, BOTTOM = 1100, 700, 90, 30, 90, 80
BLUE, RED, GREY, GREEN, ORANGE, PURPLE = "#1f77b4", "#d62728", "#999999", "#2ca02c", "#ff7f0e", "#9467bd"
font = functools.cache(ImageFont.load_default)


class Chart:
    """Two logarithmic axes on a white picture."""

    def __init__(self, title, subtitle, x_name, y_name, x_range, y_range, x_ticks):
        self.image = Image.new("RGB", (W, H), "white")
        self.draw = ImageDraw.Draw(self.image)
        (x0, x1), (y0, y1) = x_range, y_range
        self.x = lambda v: LEFT + (W - LEFT - RIGHT) * math.log(v / x0) / math.log(x1 / x0)
        self.y = lambda v: TOP + (H - TOP - BOTTOM) * math.log(y1 / v) / math.log(y1 / y0)
        self.draw.text((LEFT, 12), title, fill="black", font=font(26))
        self.draw.text((LEFT, 48), subtitle, fill="#555555", font=font(19))
        for v in x_ticks:
            self.draw.line([(self.x(v), TOP), (self.x(v), H - BOTTOM)], fill="#e4e4e4")
            self.draw.text((self.x(v), H - BOTTOM + 8), f"{v:g}", fill="black", font=font(20), anchor="ma")
        for v in [v for v in (0.3, 0.5, 1, 2, 3, 5, 10, 20, 50) if y0 < v < y1]:
            self.draw.line([(LEFT, self.y(v)), (W - RIGHT, self.y(v))], fill="#e4e4e4")
            self.draw.text((LEFT - 10, self.y(v)), f"{v:g}", fill="black", font=font(20), anchor="rm")
        self.draw.rectangle([LEFT, TOP, W - RIGHT, H - BOTTOM], outline="#888888")
        self.draw.text(((W + LEFT - RIGHT) / 2, H - 38), x_name, fill="black", font=font(22), anchor="ma")
        label = Image.new("RGB", (H - TOP - BOTTOM, 30), "white")
        ImageDraw.Draw(label).text((label.width / 2, 4), y_name, fill="black", font=font(22), anchor="ma")
        self.image.paste(label.rotate(90, expand=True), (4, TOP))

    def dot(self, x, y, colour, r=6, shape="ellipse", ring=False):
        x, y = self.x(x), self.y(y)
        getattr(self.draw, shape)([x - r, y - r, x + r, y + r], fill=colour, outline="white")
        if ring:
            self.draw.ellipse([x - r - 5, y - r - 5, x + r + 5, y + r + 5], outline=colour, width=3)

    def label(self, x, y, text, colour="black", anchor="lm", dx=14, dy=0):
        self.draw.text((self.x(x) + dx, self.y(y) + dy), text, fill=colour, font=font(19), anchor=anchor)

    def legend(self, entries, x, y):
        for i, (colour, text) in enumerate(entries):
            self.draw.ellipse([x, y + 28 * i - 7, x + 14, y + 28 * i + 7], fill=colour)
            self.draw.text((x + 24, y + 28 * i), text, fill="black", font=font(19), anchor="lm")


def space_picture(steps=100):
    """Recovered distance against the loss right after the cut: all of 1:2, and cuts free of it."""
    loss, grid = losses("dit-tiny", "6:12"), losses("dit-tiny", "6:12", 2)
    fd = {kept: v[0] for kept in loss if (v := recovered("dit-tiny", kept, steps, seeds=[0]))}
    chart = Chart(f"What becomes of a cut in {steps} steps of recovery",
                  "dit-tiny, 12 layers -> 6; every dot is one cut; 500 samples each",
                  "diffusion loss right after the cut (logarithmic)", "Frechet distance after recovery (logarithmic)",
                  (0.15, 2.0), (min(fd.values()) * 0.85, max(fd.values()) * 1.2), (0.2, 0.3, 0.5, 1, 2))
    colours = {"4 11": BLUE, "4 10": ORANGE, "5 11": PURPLE, "5 10": GREY}
    for kept, value in fd.items():
        if kept in grid:
            layers = kept.split()
            chart.dot(loss[kept], value, colours[f"{4 if '4' in layers else 5} {11 if '11' in layers else 10}"])
        else:
            chart.dot(loss[kept], value, GREEN, shape="rectangle")
    marks = {}
    for scheme in ("1:2", "3:6", "6:12"):
        for row in choices("dit-tiny", criterion="learned", scheme=scheme):
            marks.setdefault(row["kept"], {}).setdefault(scheme, []).append(row["seed"])
    for n, (kept, found) in enumerate((kept, found) for kept, found in marks.items() if kept in fd):
        text = ", ".join(f"{scheme}, {len(seeds)} seed{'s' * (len(seeds) > 1)}" for scheme, seeds in found.items())
        x, y, dy = chart.x(loss[kept]), chart.y(fd[kept]), (60, 90, -30, 30, 30)[n]
        chart.draw.line([(x, y), (x + 20, y + dy)], fill=RED)
        chart.draw.text((x + 24, y + dy), f"learned {text}", fill=RED, font=font(19), anchor="lm")
        chart.dot(loss[kept], fd[kept], RED, r=7, ring=True)
    lowest = min(loss, key=loss.get), min(grid, key=grid.get)
    for kept in lowest:
        chart.dot(loss[kept], fd[kept], "black", r=7)
    chart.label(loss[lowest[0]], fd[lowest[0]], "lowest loss of all 924", dy=20)
    chart.label(loss[lowest[1]], fd[lowest[1]], "lowest loss of 1:2", anchor="rm", dx=-14)
    entries = [(colour, f"1:2, keeps {layers.replace(' ', ' and ')}") for layers, colour in colours.items()]
    chart.legend([*entries, (GREEN, "free of 1:2"), (RED, "learned")], LEFT + 16, TOP + 22)
    chart.image.save(ROOT / "docs" / "space.png", optimize=True)


def length_picture():
    """What a longer recovery makes of a good cut and of a bad one."""
    loss, grid = losses("dit-tiny", "6:12"), losses("dit-tiny", "6:12", 2)
    fd, order = whole_space(100), sorted(loss, key=loss.get)
    curves = [("highest FD of 1:2", max(fd, key=fd.get), GREY), ("median loss of all 924", "1 3 4 7 9 10", ORANGE),
              ("learned, 1:2", "0 2 4 7 8 11", RED), ("lowest loss of 1:2", min(grid, key=grid.get), BLUE),
              ("lowest loss of all 924", order[0], "black")]
    at = lambda kept: [(s, v[0]) for s in (25, 100, 400, 800) if (v := recovered("dit-tiny", kept, s, seeds=[0]))]
    curves = [curve for curve in curves if len(at(curve[1])) > 1]
    points = {text: at(kept) for text, kept, _ in curves}
    values = [v for line in points.values() for _, v in line]
    chart = Chart("What a longer recovery makes of a cut",
                  "dit-tiny, 12 -> 6, masked-kd; a dot is a run of its own, a square is a step of the run of 800",
                  "steps of recovery (logarithmic)", "Frechet distance after recovery (logarithmic)", (20, 1000),
                  (min(values) * 0.8, max(values) * 1.2), (25, 50, 100, 200, 400, 800))
    for text, _, colour in curves:
        chart.draw.line([(chart.x(s), chart.y(v)) for s, v in points[text]], fill=colour, width=3)
        for s, v in points[text]:
            chart.dot(s, v, colour)
    for row in [row for row in rows("recovery") if "at" in row and row["mode"] == "masked-kd"]:
        for s, v in row["at"].items():
            chart.dot(int(s), v, RED, r=4, shape="rectangle")
    chart.legend([(colour, f"{text}: {kept}") for text, kept, colour in curves], W - 480, TOP + 22)
    chart.image.save(ROOT / "docs" / "length.png", optimize=True)


def fill(page: str) -> str:
    """Puts the tables of today's docs/results between the marks `<!-- report NAME -->` and `<!-- end -->`."""
    marked = re.compile(r"(<!-- report ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
    return marked.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", page)


def main():
    if "--pictures" in sys.argv:
        space_picture()
        return length_picture()
    if "--readme" in sys.argv:
        return (ROOT / "README.md").write_text(fill((ROOT / "README.md").read_text()))
    for name in [argument for argument in sys.argv[1:] if not argument.startswith("-")] or TABLES:
        print(f"\n## {name}\n\n{TABLES[name]()}")


if __name__ == "__main__":
    main()
